"""Programs of dydiff that run in a process beside this one, and the messages that the two exchange: tensors and plain values."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch


class ChildEnded(Exception):
    """The process is no more; the message says how it ended."""


class Child:
    """A module of dydiff as a process of its own, which ends with this object.

    The module's program finds the other end of the connection with `connect_to_parent`.
    """

    def __init__(self, module: str):
        self._connection, theirs = Pipe()
        command = [*module_command(module), str(theirs.fileno())]
        # A session of its own: an interrupt from the terminal is for this process alone, which then ends the other.
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.close = weakref.finalize(self, _end, self._connection, self.process)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; raises ChildEnded."""
        try:
            self._connection.send_bytes(encode(message))
        except OSError as error:
            raise self._death() from error

    def receive(self, patience: float | None = None) -> dict[str, Any]:
        """Wait for the next message, `patience` seconds at most; raises ChildEnded, or TimeoutError."""
        try:
            if self._connection.poll(patience):
                return decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        raise TimeoutError

    def has_message(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return self._connection.closed or self._connection.poll()

    def _death(self) -> ChildEnded:
        self._connection.close()
        code = self.process.wait()
        return ChildEnded(f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}")


def module_command(module: str) -> list[str]:
    """What starts a module of dydiff as a program of its own, found where this process finds it.

    `python -m` would look in the working folder first, where a clone of the repository, which has the package's name, hides it.
    """
    path = list(map(str, sys.path))
    code = f"import sys; sys.path[:] = {path!r}; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code]


def connect_to_parent() -> Connection:
    """The connection to the process that started this one as a `Child`."""
    return Connection(int(sys.argv[1]))


def end_with_parent(connection: Connection) -> None:
    """End this process at once, whatever it does, when its parent is no more, which from now on sends nothing."""

    def watch() -> None:
        connection.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def decode(data: bytes) -> dict[str, Any]:
    """The inverse of `encode`."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _end(connection: Connection, process: subprocess.Popen) -> None:
    connection.close()
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it back
        process.wait(10)
