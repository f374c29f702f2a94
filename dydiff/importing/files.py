"""The kinds of file that published checkpoints come in, read as data: plain pickles, torch's two formats, joblib with zlib.

torch's own reader is not used, not even with `weights_only`: it reserves whatever sizes a file claims, and its archive reader
in C++ was not made for hostile files.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from dydiff.errors import DydiffError
from dydiff.importing.records import Global, Storage
from dydiff.importing.unpickler import STORAGES, DataUnpickler

TORCH_MAGIC, TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_UNPACKED = 1 << 30  # bytes that a compressed file may unpack to
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"]\x00\x00\x80\x00": "lzma",
    b"\x04\x22\x4d\x18": "lz4",
    b"ZF": "joblib before 0.10",
    b"\x89HDF": "HDF5",
}


def read_file(path: Path) -> bytes:
    """The bytes of a file; DydiffError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a name with a NUL in it
        raise DydiffError(f"Cannot read '{path}': {error}. Correct the path.") from error


def read_published(content: bytes, source: str) -> Any:
    """What a published checkpoint holds: dicts, lists, scalars, tensors, and records of everything else.

    Raises:
        DydiffError: damaged, of another format, or asking for something that checkpoints do not need; `source` names it.
    """
    for magic, name in OTHER_FORMATS.items():
        if content.startswith(magic):
            raise DydiffError(
                f"'{source}' is in the format of {name}; published checkpoints are pickles, torch files or joblib with zlib."
            )
    try:
        if content.startswith(b"PK"):
            return _read_torch_zip(content, source)
        if content.startswith(b"x"):
            content = _unpack(content)
        return _read_stream(content, source)
    except DydiffError:
        raise
    except Exception as error:  # the file decides what happens in there, so anything can go wrong
        raise DydiffError(
            f"'{source}' is not a published checkpoint or is damaged ({type(error).__name__}: {str(error)[:200]}). Get the "
            "file again; nothing of it was run."
        ) from error


def _read_stream(content: bytes, source: str) -> Any:
    """A plain pickle, or torch's older format, which begins with a pickled magic number."""
    stream = io.BytesIO(content)
    first = DataUnpickler(stream, source, load_bytes=lambda blob: _read_storage(blob, source)).load()
    if type(first) is int and first == TORCH_MAGIC:
        return _read_torch_stream(content, source)
    return first


def _read_storage(blob: bytes, source: str) -> Storage:
    """The storage that `torch.storage._load_from_bytes` would load."""
    storage = _read_torch_stream(blob, source)
    if not isinstance(storage, Storage):
        raise ValueError("bytes that hold no storage")
    return storage


def _read_torch_stream(content: bytes, source: str) -> Any:
    """torch's older format: magic, version, machine, object, names of storages (a pickle each), then their numbers."""
    stream = io.BytesIO(content)
    storages: dict[str, Storage] = {}
    left = len(content)

    def load_storage(identity: Any) -> Storage:
        nonlocal left
        dtype, key, count = _parse_identity(identity)
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:  # before memory is reserved for it
                raise ValueError("storages that are larger than the file")
            storages[key] = Storage(torch.zeros(count, dtype=dtype))  # filled below
        if storages[key].flat.dtype != dtype or len(storages[key].flat) != count:
            raise ValueError("two descriptions of one storage that differ")
        return storages[key]

    magic, version, machine = (DataUnpickler(stream, source).load() for _ in range(3))
    if magic != TORCH_MAGIC or version != TORCH_PROTOCOL or machine["little_endian"] is not True:
        raise ValueError("bytes in an unknown format of torch, or from a big-endian machine")
    tree = DataUnpickler(stream, source, load_storage).load()
    keys = DataUnpickler(stream, source).load()
    if sorted(keys) != sorted(storages):
        raise ValueError("storages without numbers, or numbers without a storage")
    for key in keys:
        flat = storages[key].flat
        if int.from_bytes(stream.read(8), "little") != len(flat):
            raise ValueError("a storage of another length than described")
        flat.copy_(_to_tensor(stream.read(flat.nbytes), flat.dtype, len(flat)))
    return tree


def _read_torch_zip(content: bytes, source: str) -> Any:
    """torch's format since 1.6: an uncompressed archive of one pickle and a record per storage."""
    storages: dict[str, Storage] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a compressed archive, which torch does not write")
        if sum(record.file_size for record in records) > len(content):
            raise ValueError("an archive whose records overlap")
        (pickled,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers from a big-endian machine")

        def load_storage(identity: Any) -> Storage:
            dtype, key, count = _parse_identity(identity)
            if key not in storages:
                storages[key] = Storage(_to_tensor(archive.read(f"{folder}data/{key}"), dtype, count))
            if storages[key].flat.dtype != dtype:
                raise ValueError("two descriptions of one storage that differ")
            return storages[key]

        return DataUnpickler(io.BytesIO(archive.read(pickled)), source, load_storage).load()


def _parse_identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and length of a storage from its persistent id."""
    word, kind, key, location, count, *view = identity
    if word != "storage" or not isinstance(kind, Global) or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a persistent id that is not a storage's")
    if view not in ([], [None]):
        raise ValueError("a storage that is a view of another")
    return STORAGES[kind.path], key, count


def _to_tensor(raw: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    if len(raw) != count * dtype.itemsize:
        raise ValueError("a storage of another length than described")
    if dtype == torch.bool:  # any other byte than 0 and 1 would be undefined behaviour
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8) != 0 if raw else torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _unpack(content: bytes) -> bytes:
    """joblib's compression: one stream of zlib."""
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, MAX_UNPACKED)
    if not unpacker.eof:
        raise ValueError(f"a compressed stream that is cut short or unpacks to more than {MAX_UNPACKED >> 20} MiB")
    return unpacked
