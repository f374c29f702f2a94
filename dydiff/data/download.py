"""Fetch a file of D4RL's: resumed where it broke off, checked, and put in place whole or not at all."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from tqdm import tqdm

from dydiff.data import d4rl
from dydiff.data.dataset import OPTIONAL, REQUIRED, dataset_from_arrays
from dydiff.data.files import read_file
from dydiff.environments import ENVIRONMENTS
from dydiff.errors import DydiffError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 100  # connections in all
PATIENCE = 5  # connections in a row that bring nothing
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the next connection; doubled after each that brought nothing
BLOCK = 1 << 18  # bytes
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # the first bytes of an HDF5 file
ANTMAZE_DIMS = (29, 8)


class _Interrupted(Exception):
    """A connection ended too early, or the server asks for patience: another one may do better."""


def download_dataset(name: str) -> Path:
    """Download the D4RL dataset `name` into D4RL's cache folder, unless it is there, and return its path.

    The file grows as NAME.part and keeps what it has when the download is interrupted; it gets its name once it has the
    length that the server announced, and its content is in D4RL's schema with the environment's sizes. `DYDIFF_D4RL_URL` names
    a mirror. Several processes may call this at once: one downloads, the others wait for it.
    Raises DydiffError for a name that is not D4RL's, a server that cannot be reached or sends something else, and a full disk.
    """
    path = d4rl.dataset_path(name)
    if path.is_file():
        return path
    if not d4rl.is_d4rl_name(name):
        raise DydiffError(f"{name!r} is not published anywhere: make it with `dydiff collect {name}`.")
    part = path.with_name(f"{path.name}.part")
    with _open_alone(part) as file:
        if path.is_file():  # another process was faster
            return path
        try:
            with tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                _Download(name, path, part, file, bar).fetch()
        except KeyboardInterrupt as error:
            arrived = f"{os.fstat(file.fileno()).st_size / 1e6:,.1f} MB"
            raise DydiffError(f"Interrupted. The same command goes on from the {arrived} in {str(part)!r}.") from error
        try:
            os.fsync(file.fileno())
            _check(name, part, file)
            os.replace(part, path)
            _tag_of(part).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(part, error) from error
    return path


@contextmanager
def _open_alone(part: Path) -> Iterator[FileIO]:
    """Open a partial file for appending once no other process has it open; leave none behind that is empty."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(part, "ab+", buffering=0)  # what does not fit onto the disk must not wait in a buffer to fail again
            with suppress(OSError):  # a network file system may have no locks; the content is checked in any case
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                    break
            file.close()  # whoever had it open before has renamed or removed it
    except OSError as error:
        raise DydiffError(
            f"Cannot write to {str(part.parent)!r}: {error.strerror}. Set {d4rl.CACHE_VARIABLE} to a folder of yours."
        ) from error
    with file:
        try:
            yield file
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
                _tag_of(part).unlink(missing_ok=True)


def _cannot_write(part: Path, error: OSError) -> DydiffError:
    return DydiffError(
        f"Cannot write {str(part)!r}: {error.strerror}. Free space and repeat the command, which goes on from there, or set "
        f"{d4rl.CACHE_VARIABLE} to another folder."
    )


def _tag_of(part: Path) -> Path:
    """Return where a partial file's version is noted, so that it is never continued with another version's bytes."""
    return part.with_name(f"{part.name}.tag")


class _Download:
    """One file on its way: connection after connection until it is whole."""

    def __init__(self, name: str, path: Path, part: Path, file: FileIO, bar: tqdm):
        self.url = d4rl.dataset_url(name)
        self.by_hand = (
            f"Try again later (what has arrived is kept), set {d4rl.URL_VARIABLE} to a mirror, or get the file elsewhere and "
            f"put it into {str(path.parent)!r} as {path.name!r}."
        )
        self.part, self.file, self.bar = part, file, bar

    def fetch(self) -> None:
        """Connect until the file is whole."""
        fruitless, pause, reason = 0, PAUSE, "nothing came"
        for _ in range(ATTEMPTS):
            before = self.size
            try:
                self.receive()
                return
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise DydiffError(f"{self.url} answers {error.code} {error.reason}. {self.by_hand}") from error
                reason = f"it answers {error.code} {error.reason}"
            except (_Interrupted, OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            fruitless, pause = (0, PAUSE) if self.size > before else (fruitless + 1, min(2 * pause, LONGEST_PAUSE))
            if fruitless == PATIENCE:
                break
            self.bar.set_postfix_str(f"{reason}; trying again")
            time.sleep(pause)
        raise DydiffError(f"Cannot download {self.url}: {reason}. {self.by_hand}")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return os.fstat(self.file.fileno()).st_size

    def receive(self) -> None:
        """Take from one connection what it gives; raises if the file is not whole thereafter."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "dydiff", "Accept-Encoding": "identity"})
        if self.size:
            request.add_header("Range", f"bytes={self.size}-")
            tag = _tag_of(self.part)
            if tag.is_file():
                request.add_header("If-Range", tag.read_text())  # the rest if the file is unchanged, else all of it
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            # The server has nothing beyond what is here: the file is whole, or the partial file is not of this file.
            if error.headers.get("Content-Range") == f"bytes */{self.size}":
                return
            self.file.truncate(0)
            raise _Interrupted("the partial file does not fit the server's") from error
        with answer:
            total = self._find_total(answer)
            self._make_room(total)
            while block := answer.read1(BLOCK):  # what has come so far, so that a connection that breaks loses nothing
                if self.size == 0 and block[: len(SIGNATURE)] != SIGNATURE[: len(block)]:
                    kind = answer.headers.get("Content-Type", "no content type")
                    raise DydiffError(f"What {self.url} sends is not an HDF5 file ({kind}). {self.by_hand}")
                self._write(block)
                self.bar.update(len(block))
        if total is not None and self.size != total:
            raise _Interrupted(f"the connection ended after {self.size:,} of {total:,} bytes")

    def _find_total(self, answer: http.client.HTTPResponse) -> int | None:
        """Return how long the whole file will be, and empty the partial file unless the answer continues it."""
        length = answer.headers.get("Content-Length")
        if answer.status == 206:
            extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if extent is None or int(extent[1]) != self.size:
                self.file.truncate(0)
                raise _Interrupted("the server sent another part than the one asked for")
            total = int(extent[2])
        else:
            self.file.truncate(0)
            total = int(length) if length and length.isdigit() else None
            version = answer.headers.get("ETag", "")
            version = answer.headers.get("Last-Modified", "") if version.startswith("W/") or not version else version
            if version:
                try:
                    _tag_of(self.part).write_text(version)
                except OSError as error:
                    raise _cannot_write(self.part, error) from error
            else:
                _tag_of(self.part).unlink(missing_ok=True)
        self.bar.total = total
        self.bar.n = self.size
        self.bar.refresh()
        return total

    def _make_room(self, total: int | None) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if total is not None and total - self.size > free:
            raise DydiffError(
                f"{self.url} needs {(total - self.size) / 1e6:,.0f} MB more in {str(self.part.parent)!r}, where "
                f"{free / 1e6:,.0f} MB are free. Free space, or set {d4rl.CACHE_VARIABLE} to another folder."
            )

    def _write(self, block: bytes) -> None:
        try:
            while block:
                block = block[self.file.write(block) :]
        except OSError as error:  # not the network's fault: another connection would not help
            raise _cannot_write(self.part, error) from error


def _check(name: str, part: Path, file: FileIO) -> None:
    """Refuse, and discard, a file that is not D4RL's dataset `name`."""
    environment = d4rl.environment_of(name)
    spec = ENVIRONMENTS.get(environment)
    expected = (spec.observation_dim, spec.action_dim) if spec else ANTMAZE_DIMS
    try:
        dataset = dataset_from_arrays(*read_file(part, REQUIRED + OPTIONAL)[:1], part.name, part)
        found = (dataset.observation_dim, dataset.action_dim)
        if found != expected:
            raise DydiffError(
                f"It has {found[0]} observation and {found[1]} action columns, but {environment} has {expected[0]} and "
                f"{expected[1]}."
            )
    except DydiffError as error:
        file.truncate(0)
        raise DydiffError(
            f"What {d4rl.dataset_url(name)} sent is not the dataset {name!r} and was removed: {error} If this happens again, "
            f"set {d4rl.URL_VARIABLE} to another server."
        ) from error
