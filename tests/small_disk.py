"""A real file system of a megabyte, mounted for a function that runs in a process of its own."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import children

NEW_USER, NEW_MOUNTS, PRIVATE = 0x10000000, 0x00020000, (1 << 18) | (1 << 14)
READ_ONLY = 1
SIZE = 1 << 20
NOT_PERMITTED = 77  # exit status


def run_on_small_disk(body: Callable[..., None], folder: Path, *arguments: object, read_only: bool = False) -> None:
    """Run `body(folder, *arguments)` with an empty file system mounted on `folder`; what it raises fails the test.

    Skips where mounting is not permitted: neither to root nor in a user namespace.
    """
    folder.mkdir()
    report = folder.with_name("report")
    child = children.Process(target=_run, args=(body, folder, read_only, report, arguments))
    child.start()
    child.join(120)
    if child.exitcode == NOT_PERMITTED:
        pytest.skip("mounting a file system is not permitted here")
    assert child.exitcode == 0, report.read_text() if report.exists() else f"exit status {child.exitcode}"


def _run(body: Callable[..., None], folder: Path, read_only: bool, report: Path, arguments: tuple) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (0 if os.geteuid() == 0 else NEW_USER)):
        os._exit(NOT_PERMITTED)
    libc.mount(b"none", b"/", None, PRIVATE, None)  # what is mounted here stays here
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", READ_ONLY if read_only else 0, f"size={SIZE}".encode()):
        os._exit(NOT_PERMITTED)
    try:
        body(folder, *arguments)
    except BaseException:
        report.write_text(traceback.format_exc())
        os._exit(1)


def fill(folder: Path) -> Path:
    """Write a file that takes all the space that is left."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler
