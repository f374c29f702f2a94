"""Datasets of Minari, turned into D4RL's schema. They are other data than D4RL's of a like name: scores do not compare."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

import numpy as np

from dydiff.data.files import Contents, Scalar
from dydiff.environments import GYMNASIUM_V4, GYMNASIUM_V5
from dydiff.errors import DydiffError


def is_minari_id(text: str) -> bool:
    """Tell whether a text has the form of a Minari id, for example "mujoco/hopper/medium-v0" or "D4RL/door/human-v2"."""
    return re.fullmatch(r"[\w-]+(/[\w-]+)+-v\d+", text) is not None


def read_episodes(minari_id: str, download: bool = False) -> Contents:
    """Read a Minari dataset into the arrays of D4RL's schema, episode after episode.

    Row t holds observation t of an episode's T + 1 and what the step from there gave; the last observation is kept in
    `next_observations` alone. A row that was truncated, or after which the recording of an episode stops, is a timeout.
    Dictionary observations become one vector, in the alphabetical order of their keys.
    Raises DydiffError where minari is missing, the dataset is neither here nor to be downloaded, or it is not made of numbers.
    """
    minari = _import_minari(minari_id)
    try:
        dataset = minari.load_dataset(minari_id, download=download)
    except FileNotFoundError as error:
        raise DydiffError(
            f"The Minari dataset {minari_id!r} is not on this machine: get it with `dydiff data download {minari_id}`. If a "
            "file was meant, its name must end in .hdf5, .h5 or .npz."
        ) from error
    except Exception as error:  # what a missing network or a wrong id raises depends on where Minari keeps its data
        raise DydiffError(f"Minari cannot give {minari_id!r}: {type(error).__name__}: {error}") from error
    parts = [_convert_episode(episode, minari_id) for episode in dataset.iterate_episodes()]
    parts = [part for part in parts if len(part["rewards"])]
    if not parts:
        raise DydiffError(f"The Minari dataset {minari_id!r} holds no steps.")
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return arrays, _describe(minari_id, dataset, minari)


def download_minari(minari_id: str) -> None:
    """Let Minari download a dataset into its own folder; raises DydiffError where it cannot."""
    minari = _import_minari(minari_id)
    try:
        minari.load_dataset(minari_id, download=True)
    except Exception as error:
        raise DydiffError(f"Minari cannot download {minari_id!r}: {type(error).__name__}: {error}") from error


def list_minari() -> list[str]:
    """Return the ids of the Minari datasets on this machine: none where minari is missing."""
    try:
        minari = importlib.import_module("minari")
    except ImportError:
        return []
    return sorted(minari.list_local_datasets())


def _import_minari(minari_id: str) -> ModuleType:
    try:
        return importlib.import_module("minari")
    except ImportError as error:
        raise DydiffError(
            f"{minari_id!r} is a Minari id, and importing minari failed ({error}): install it with "
            '`pip install "dydiff[minari]"`. If a file was meant, its name must end in .hdf5, .h5 or .npz.'
        ) from error


def _convert_episode(episode: Any, minari_id: str) -> dict[str, np.ndarray]:
    observations = _to_matrix(episode.observations, "observations", minari_id)  # [T + 1, O]
    terminals = np.asarray(episode.terminations, bool)
    timeouts = np.asarray(episode.truncations, bool) & ~terminals
    if len(timeouts):
        timeouts[-1] |= not terminals[-1]
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": _to_matrix(episode.actions, "actions", minari_id),
        "rewards": np.asarray(episode.rewards),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def _to_matrix(values: Any, what: str, minari_id: str) -> np.ndarray:
    """Flatten an episode's observations or actions to [T, width]."""
    if isinstance(values, dict):
        return np.concatenate([_to_matrix(values[key], what, minari_id) for key in sorted(values)], axis=1)
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or values.ndim == 0:
        raise DydiffError(f"The {what} of the Minari dataset {minari_id!r} are not numbers; dydiff cannot use them.")
    return values.reshape(len(values), -1)


def _describe(minari_id: str, dataset: Any, minari: ModuleType) -> dict[str, Scalar]:
    metadata: dict[str, Scalar] = {"source": "Minari", "minari_id": minari_id, "minari_version": str(minari.__version__)}
    env_spec = dataset.spec.env_spec
    if env_spec is not None:
        metadata["environment"] = env_spec.id
        for suffix, backend in (("-v4", GYMNASIUM_V4), ("-v5", GYMNASIUM_V5)):
            if env_spec.id.endswith(suffix):
                metadata["backend"] = backend
    return metadata
