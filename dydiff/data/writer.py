"""Write a dataset in D4RL's schema, so that any D4RL reader can use it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from dydiff.data.dataset import dataset_from_arrays
from dydiff.data.files import METADATA, SUFFIXES, Scalar
from dydiff.errors import DydiffError


def write_dataset(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Scalar]) -> Path:
    """Write arrays and metadata to a compressed HDF5 file, or NumPy archive, in D4RL's flat schema, whole or not at all.

    arrays: observations [N, O], actions [N, A], rewards [N], terminals [N] and any of timeouts [N],
    next_observations [N, O], infos/qpos [N, ...], infos/qvel [N, ...]; each keeps its dtype. metadata: one text or
    number per key, stored as a scalar under `metadata/`. A path that ends in .npz gives an archive. Folders are made. Returns
    the path.
    Raises DydiffError for arrays and a name that `load_dataset` would refuse and where the file cannot be written.
    """
    path = check_suffix(path)
    dataset_from_arrays(arrays, path.name, path)
    # A reader sees the old file or the whole new one, never a part: rename is atomic within a folder.
    with _part_of(path) as part:
        write = _write_npz if path.suffix.lower() == ".npz" else _write_hdf5
        write(part, arrays, {f"{METADATA}{key}": value for key, value in metadata.items()})
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    return path


def check_writable(path: str | Path) -> Path:
    """Make sure, before the work, that `write_dataset` can write to `path`: makes its folder; returns the path.

    Raises DydiffError, as `write_dataset` would.
    """
    path = check_suffix(path)
    with _part_of(path) as part:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        part.touch()
    return path


def check_suffix(path: str | Path) -> Path:
    """Return the path, its `~` expanded; raises DydiffError where the name is not that of a file that can be loaded."""
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() not in SUFFIXES:
        raise DydiffError(f"The dataset file {str(path)!r} to write must have a name that ends in one of {', '.join(SUFFIXES)}.")
    return path


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, in a folder that exists; it is removed if it is still there at the end."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as error:
        raise DydiffError(f"Cannot write the dataset {str(path)!r}: {error}. Free space or choose another path.") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder itself is at fault, so is this
            part.unlink()


def _write_hdf5(path: Path, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, Scalar]) -> None:
    # Made in memory: on a full disk the HDF5 library fails in destructors, which print and cannot be caught.
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, compression="gzip" if np.ndim(values) else None)
        for key, value in scalars.items():
            file[key] = value
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, Scalar]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays, **scalars)


def _flush(path: Path) -> None:
    """Force a file's or a folder's content onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
