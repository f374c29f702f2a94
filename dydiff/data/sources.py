"""One way to every dataset: by a D4RL name, a "-local" name, a Minari id, or the path of a file."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydiff.data import d4rl, legacy_reader, minari_reader
from dydiff.data.dataset import COLLECTOR, OPTIONAL, REQUIRED, Dataset, dataset_from_arrays
from dydiff.data.download import download_dataset
from dydiff.data.files import SUFFIXES, Scalar, read_file
from dydiff.errors import DydiffError

DOWNLOAD_VARIABLE = "DYDIFF_DOWNLOAD"


@dataclass(frozen=True)
class RawDataset:
    """A dataset as its source gives it: nothing of it is checked."""

    name: str
    path: Path | None
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Scalar]


def load_dataset(name_or_path: str | Path, download: bool | None = None) -> Dataset:
    """Load a dataset by its D4RL name, its "-local" name, its Minari id, or the path of a .hdf5, .h5 or .npz file.

    Names are looked up in `$D4RL_DATASET_DIR` (else `~/.d4rl/datasets`), Minari ids in Minari's own folder. download: fetch
    what is missing; None: only if the environment variable DYDIFF_DOWNLOAD is 1, because a training that is started where
    there is no network must say so at once, and not after minutes of attempts. A D4RL name that dydiff does not know is left
    to the `d4rl` package, where that can be imported.
    Raises DydiffError for an unknown name, a dataset that is missing, broken or not in D4RL's schema, and for data of another
    origin under a D4RL name.
    """
    raw = read_dataset(name_or_path, REQUIRED + OPTIONAL, download)
    return dataset_from_arrays(raw.arrays, raw.name, raw.path, raw.metadata)


def read_dataset(
    name_or_path: str | Path, wanted: Collection[str] | None = None, download: bool | None = None
) -> RawDataset:
    """Read a dataset as `load_dataset` does, unchecked; `wanted` names the arrays to read from a file (None: all)."""
    text = str(name_or_path)
    if Path(text).suffix.lower() in SUFFIXES:
        path = Path(os.path.expanduser(text))  # unlike Path's, it takes any name
        # The suffix stays in the name, so that a file can never pass for the D4RL dataset that it may be named after.
        return RawDataset(path.name, path, *read_file(path, wanted))
    if download is None:
        download = os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes")
    if minari_reader.is_minari_id(text):
        return RawDataset(text, None, *minari_reader.read_episodes(text, download))
    if not d4rl.is_d4rl_name(text) and not d4rl.is_local_name(text):
        if obstacle := legacy_reader.find_obstacle():
            raise d4rl.unknown_dataset(text, obstacle)
        return RawDataset(text, None, *legacy_reader.read_environment(text))
    path = d4rl.dataset_path(text)
    if not path.is_file():
        if not (download and d4rl.is_d4rl_name(text)):
            raise DydiffError(_describe_missing(text, path))
        download_dataset(text)
    arrays, metadata = read_file(path, wanted)
    if d4rl.is_d4rl_name(text) and "source" in metadata:  # which no file of D4RL's has
        raise DydiffError(
            f"{str(path)!r} was made by `{metadata['source']}`, so it is not the D4RL dataset {text!r}: its scores could not "
            f"be compared with anybody's. Put {d4rl.dataset_url(text)} in its place, or load the file by its path."
        )
    return RawDataset(text, path, arrays, metadata)


def check_dataset(name: str) -> None:
    """Raise DydiffError where there is no such dataset, without reading it; what Minari keeps is left to whoever reads it."""
    if not minari_reader.is_minari_id(name):
        read_dataset(name, wanted=())


def _describe_missing(name: str, path: Path) -> str:
    if d4rl.is_d4rl_name(name):
        remedy = f"Get it with `dydiff data download {name}` or put {d4rl.dataset_url(name)} into that folder by hand"
    elif name in d4rl.LOCAL_DATASETS:
        remedy = f"Make it with `{COLLECTOR} {name}`"
    else:
        nearest = ", ".join(d4rl.nearest_names(name))
        remedy = f"`{COLLECTOR}` has no recipe for it; the nearest names are {nearest}. Take one of these"
    return (
        f"The dataset {name!r} is not on this machine: there is no file {path.name!r} in {str(path.parent)!r}. "
        f"{remedy}, set the environment variable {d4rl.CACHE_VARIABLE} to the folder that holds it, or give the path "
        "of a .hdf5, .h5 or .npz file instead of a name."
    )
