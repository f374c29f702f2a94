"""Arrays read by a process of its own, because the HDF5 library crashes on some damaged files and would take ours along."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np


class ChildError(Exception):
    """What the child says went wrong, or how it died."""


def run_in_child(read: Callable[[], Iterator[tuple[str, np.ndarray]]]) -> Iterator[tuple[str, np.ndarray]]:
    """Run `read` in a forked process and yield the named arrays that it yields; an array of Python objects comes as one of bytes.

    Forked rather than started: that takes milliseconds where importing takes a second, and `read` uses neither threads nor GPUs.

    Raises:
        ChildError: `read` raised, or its process died.
    """
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()  # a crash is told by whoever waits for it
            os.close(source)
            with open(sink, "wb") as pipe:
                _send(read, pipe)
        finally:
            os._exit(0)
    os.close(sink)
    ended = False
    try:
        with open(source, "rb") as pipe:
            while header := pipe.readline():
                told = json.loads(header)
                if "error" in told:
                    raise ChildError(told["error"])
                if "end" in told:
                    ended = True
                    break
                values = bytearray(told["bytes"])
                if pipe.readinto(values) < len(values):
                    break
                yield told["key"], np.frombuffer(values, np.dtype(told["dtype"])).reshape(told["shape"])
    finally:  # closing the pipe ends a child that is still sending
        status = os.waitpid(pid, 0)[1]
    if not ended:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        raise ChildError(f"reading it ended by {how}")


def _send(read: Callable[[], Iterator[tuple[str, np.ndarray]]], pipe: BinaryIO) -> None:
    try:
        for key, values in read():
            if values.dtype.hasobject:
                values = np.zeros(values.shape, "S1")
            content = values.tobytes()
            _tell(pipe, {"key": key, "dtype": values.dtype.str, "shape": values.shape, "bytes": len(content)})
            pipe.write(content)
        _tell(pipe, {"end": True})
    except BrokenPipeError:  # nobody listens any more
        pass
    except Exception as error:  # what is damaged where decides what HDF5, h5py or NumPy says
        _tell(pipe, {"error": " ".join(str(error).split())[:300] or type(error).__name__})


def _tell(pipe: BinaryIO, words: dict[str, object]) -> None:
    pipe.write(json.dumps(words).encode() + b"\n")
