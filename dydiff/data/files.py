"""Read the arrays of a dataset file (HDF5 or NumPy archive) as they are stored."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from dydiff.data.child import ChildError, run_in_child
from dydiff.errors import DydiffError

HDF5_SUFFIXES = (".hdf5", ".h5")
SUFFIXES = (*HDF5_SUFFIXES, ".npz")
METADATA = "metadata/"
DEFLATE_RATIO = 1100  # no file holds more, for gzip cannot compress better

Scalar = str | int | float | bool
Contents = tuple[dict[str, np.ndarray], dict[str, Scalar]]


def read_file(path: Path, wanted: Collection[str] | None = None) -> Contents:
    """Read a .hdf5, .h5 or .npz file: its arrays by their whole keys ("infos/qpos"), and the scalars under `metadata/`.

    wanted: the arrays to read; of others only the key is kept, with an empty array, for messages. None: all of them, with
    the behaviour policies that D4RL stores under `metadata/`. Raises DydiffError for a file that is missing or broken.
    """
    if not os.path.isfile(path):  # unlike Path's, it takes any name, however long
        raise DydiffError(f"There is no dataset file {str(path)!r}. Check the path, or give the name of a dataset.")
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, Scalar] = {}
    # Whatever the file is called: a download has no suffix until it is whole.
    for key, value in _read_npz(path, wanted) if path.suffix.lower() == ".npz" else _read_hdf5(path, wanted):
        if key.startswith(METADATA) and value.shape == ():
            keep_scalar(metadata, key.removeprefix(METADATA), value[()])
        elif wanted is None or not key.startswith(METADATA):
            arrays[key] = value
    return arrays, metadata


def keep_scalar(metadata: dict[str, Scalar], key: str, value: object) -> None:
    """Put a value into the metadata if it is one number or one text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, Scalar):
        metadata[key] = value


def _is_wanted(key: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or key in wanted


def _read_hdf5(path: Path, wanted: Collection[str] | None) -> list[tuple[str, np.ndarray]]:
    if not os.access(path, os.R_OK):
        raise DydiffError(f"{str(path)!r} may not be read by this user. Change its permissions or its owner.")
    if not h5py.is_hdf5(path):
        raise DydiffError(
            f"{str(path)!r} is not an HDF5 file. A broken download often leaves a web page under that name: look into "
            "it and get the file again."
        )
    try:
        return list(run_in_child(partial(_visit_hdf5, path, wanted)))
    except ChildError as error:
        raise DydiffError(
            f"{str(path)!r} cannot be read: it is truncated or damaged (HDF5 says: {error}). Get the file again."
        ) from error


def _visit_hdf5(path: Path, wanted: Collection[str] | None) -> Iterator[tuple[str, np.ndarray]]:
    size = path.stat().st_size
    found: list[tuple[str, h5py.Dataset]] = []
    # No lock: datasets are put in place whole and never changed, and many network file systems cannot lock.
    with h5py.File(path, "r", locking=False) as file:
        file.visititems(lambda key, node: found.append((key, node)) if isinstance(node, h5py.Dataset) else None)
        for key, node in found:
            if node.nbytes > DEFLATE_RATIO * size:  # rows that were never stored, which reading would make up
                raise ValueError(f"{key} claims {node.nbytes:,} bytes in a file of {size:,}")
            scalar = key.startswith(METADATA) and node.shape == ()
            yield key, np.asarray(node[()] if scalar or _is_wanted(key, wanted) else np.empty(0))


def _read_npz(path: Path, wanted: Collection[str] | None) -> list[tuple[str, np.ndarray]]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with file:
            return [
                (key, file[key] if key.startswith(METADATA) or _is_wanted(key, wanted) else np.empty(0)) for key in file.files
            ]
    except Exception as error:  # what is damaged where decides what zipfile, zlib or NumPy says
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DydiffError(
            f"{str(path)!r} cannot be read as a NumPy archive of plain arrays ({reason}). Write it with numpy.savez, "
            "without object arrays, or get it again."
        ) from error
