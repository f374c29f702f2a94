"""Read an offline dataset in D4RL's schema, whole, checked, and as float32."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from dydiff.data import d4rl
from dydiff.errors import DydiffError

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
HDF5_SUFFIXES = (".hdf5", ".h5")
COLLECTOR = "dydiff collect"  # `metadata/source` of the files that the local collector writes

Scalar = str | int | float | bool


@dataclass(frozen=True, eq=False)
class Dataset:
    """An offline dataset in raw space: N consecutive environment steps, episode after episode."""

    name: str
    path: Path | None
    observations: np.ndarray  # [N, O] float32
    actions: np.ndarray  # [N, A] float32
    rewards: np.ndarray  # [N] float32
    terminals: np.ndarray  # [N] bool
    timeouts: np.ndarray | None = None  # [N] bool
    next_observations: np.ndarray | None = None  # [N, O] float32
    metadata: dict[str, Scalar] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def observation_dim(self) -> int:
        """O, the number of observation columns."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """A, the number of action columns."""
        return self.actions.shape[1]

    @property
    def environment(self) -> str | None:
        """The environment's name: from the metadata, else from the dataset's name, else None."""
        stated = str(self.metadata.get("environment", ""))
        return d4rl.environment_of(stated or self.name) or stated or None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the names, shapes and bytes of all arrays: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for key in (*REQUIRED, *OPTIONAL):
            values = getattr(self, key)
            if values is not None:
                digest.update(f"{key} {values.dtype} {values.shape};".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def load_dataset(name_or_path: str | Path) -> Dataset:
    """Load a dataset by its D4RL name, its "-local" name, or the path of a .hdf5, .h5 or .npz file.

    Names are looked up in `$D4RL_DATASET_DIR` (else `~/.d4rl/datasets`). Raises DydiffError for an unknown name, a
    file that is missing, broken or not in D4RL's schema, and for locally collected data under a D4RL name.
    """
    text = str(name_or_path)
    suffix = Path(text).suffix.lower()
    if suffix == ".npz" or suffix in HDF5_SUFFIXES:
        path = Path(text).expanduser()
        if not path.is_file():
            raise DydiffError(f"There is no dataset file {str(path)!r}. Check the path, or give the name of a dataset.")
        arrays, metadata = _read_npz(path) if suffix == ".npz" else _read_hdf5(path)
        # The suffix stays in the name, so that a file can never pass for the D4RL dataset that it may be named after.
        return dataset_from_arrays(arrays, path.name, path, metadata)
    path = d4rl.dataset_path(text)
    if not path.is_file():
        raise DydiffError(_describe_missing(text, path))
    arrays, metadata = _read_hdf5(path)
    if d4rl.is_d4rl_name(text) and metadata.get("source") == COLLECTOR:
        raise DydiffError(
            f"{str(path)!r} was made by `{COLLECTOR}`, so it is not the D4RL dataset {text!r}: its scores could not be "
            f"compared with anybody's. Download {d4rl.dataset_url(text)} in its place, or load the file by its path."
        )
    return dataset_from_arrays(arrays, text, path, metadata)


def dataset_from_arrays(
    arrays: Mapping[str, np.ndarray],
    name: str,
    path: Path | None = None,
    metadata: dict[str, Scalar] | None = None,
) -> Dataset:
    """Check arrays that follow D4RL's schema and make a Dataset of them.

    arrays: observations [N, O], actions [N, A], rewards [N] or [N, 1], terminals [N]; and, optionally, timeouts [N]
    and next_observations [N, O]; other keys are left out. Numbers of any width become float32, flags become bool.
    Raises DydiffError, which names the array and the row, for anything missing, misshapen or not finite.
    """
    where = str(path) if path is not None else name
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        present = ", ".join(sorted(arrays)) or "nothing"
        raise DydiffError(
            f"Dataset {where!r} lacks {', '.join(missing)}; it holds {present}. "
            f"D4RL's schema needs {', '.join(REQUIRED)}."
        )
    observations = _to_matrix(arrays["observations"], "observations", where)
    rows = len(observations)
    if rows < 2:
        raise DydiffError(f"Dataset {where!r} has {rows} rows of observations; one transition needs at least 2.")
    checked = {
        "observations": observations,
        "actions": _to_matrix(arrays["actions"], "actions", where),
        "rewards": _to_float32(_to_vector(arrays["rewards"], "rewards", where), "rewards", where),
        "terminals": _to_flags(arrays["terminals"], "terminals", where),
    }
    if "timeouts" in arrays:
        checked["timeouts"] = _to_flags(arrays["timeouts"], "timeouts", where)
    if "next_observations" in arrays:
        checked["next_observations"] = _to_matrix(arrays["next_observations"], "next_observations", where)
    for key, values in checked.items():
        if len(values) != rows:
            raise DydiffError(
                f"Dataset {where!r}: {key} has {len(values)} rows but observations has {rows}. "
                "The file is damaged or was cut; get it again."
            )
    following = checked.get("next_observations", observations)
    if following.shape != observations.shape:
        raise DydiffError(
            f"Dataset {where!r}: next_observations has shape {following.shape} but observations {observations.shape}; "
            "the two must agree."
        )
    return Dataset(name=name, path=path, metadata=dict(metadata or {}), **checked)


def _describe_missing(name: str, path: Path) -> str:
    if d4rl.is_d4rl_name(name):
        remedy = f"Download {d4rl.dataset_url(name)} into that folder"
    else:
        remedy = f"Make it with `{COLLECTOR} {name}`"
    return (
        f"The dataset {name!r} is not on this machine: there is no file {path.name!r} in {str(path.parent)!r}. "
        f"{remedy}, set the environment variable {d4rl.CACHE_VARIABLE} to the folder that holds it, or give the path "
        "of a .hdf5, .h5 or .npz file instead of a name."
    )


def _read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    if not os.access(path, os.R_OK):
        raise DydiffError(f"{str(path)!r} may not be read by this user. Change its permissions or its owner.")
    if not h5py.is_hdf5(path):
        raise DydiffError(
            f"{str(path)!r} is not an HDF5 file. A broken download often leaves a web page under that name: look into "
            "it and get the file again."
        )
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, Scalar] = {}
    try:
        with h5py.File(path, "r") as file:
            for key, node in file.items():
                if isinstance(node, h5py.Dataset):
                    # Only what is used is read: the keys of the others are wanted for messages alone.
                    arrays[key] = node[()] if key in REQUIRED + OPTIONAL else np.empty(0)
            if isinstance(file.get("metadata"), h5py.Group):
                file["metadata"].visititems(lambda key, node: _collect_scalar(metadata, key, node))
    except (OSError, RuntimeError, KeyError) as error:
        raise DydiffError(
            f"{str(path)!r} cannot be read: it is truncated or damaged (HDF5 says: {error}). Get the file again."
        ) from error
    return arrays, metadata


def _collect_scalar(metadata: dict[str, Scalar], key: str, node: h5py.Dataset | h5py.Group) -> None:
    """Keep a node that is one number or one text; D4RL also stores whole policies under `metadata`."""
    if isinstance(node, h5py.Dataset) and node.shape == ():
        _keep_scalar(metadata, key, node[()])


def _keep_scalar(metadata: dict[str, Scalar], key: str, value: object) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, Scalar):
        metadata[key] = value


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, Scalar] = {}
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with file:
            for key in file.files:
                if key.startswith("metadata/"):
                    value = file[key]
                    if value.shape == ():
                        _keep_scalar(metadata, key.removeprefix("metadata/"), value[()])
                else:
                    arrays[key] = file[key] if key in REQUIRED + OPTIONAL else np.empty(0)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DydiffError(
            f"{str(path)!r} cannot be read as a NumPy archive of plain arrays ({error}). Write it with numpy.savez, "
            "without object arrays, or get it again."
        ) from error
    return arrays, metadata


def _to_matrix(values: np.ndarray, key: str, where: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] == 0:
        raise DydiffError(
            f"Dataset {where!r}: {key} has shape {values.shape}, but must be a matrix with one row per step and at "
            "least one column."
        )
    return _to_float32(values, key, where)


def _to_vector(values: np.ndarray, key: str, where: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DydiffError(f"Dataset {where!r}: {key} has shape {values.shape}, but must hold one number per step.")
    return values


def _to_float32(values: np.ndarray, key: str, where: str) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise DydiffError(f"Dataset {where!r}: {key} holds {values.dtype} values, but must hold real numbers.")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is reported as such below
        values = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
        raise DydiffError(
            f"Dataset {where!r}: {key} holds NaN or infinite numbers in {len(bad)} of {len(values)} rows, first in row "
            f"{bad[0]}. Drop or repair those episodes, or get the file again."
        )
    return values


def _to_flags(values: np.ndarray, key: str, where: str) -> np.ndarray:
    values = _to_vector(values, key, where)
    if values.dtype == bool:
        return np.ascontiguousarray(values)
    numbers = _to_float32(values, key, where)
    wrong = np.flatnonzero((numbers != 0) & (numbers != 1))
    if len(wrong):
        raise DydiffError(
            f"Dataset {where!r}: {key} must hold flags (false or true, 0 or 1), but row {wrong[0]} holds "
            f"{numbers[wrong[0]]:g}."
        )
    return np.ascontiguousarray(numbers != 0)
