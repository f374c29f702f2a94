"""An offline dataset in D4RL's schema: whole, checked, and as float32."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dydiff.data import d4rl
from dydiff.data.files import Scalar
from dydiff.environments import D4RL_COMPAT, ENVIRONMENTS, GYMNASIUM_V5
from dydiff.errors import DydiffError

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
NEXT_TOLERANCE = 1e-4  # within which next_observations is the observation of the row behind, relative to 1 + its size
COLLECTOR = "dydiff collect"  # `metadata/source` of the files that the local collector writes


def environment_of_file(name: str, metadata: dict[str, Scalar]) -> str | None:
    """The environment's name: from the metadata of a dataset, else from its own name, else None."""
    stated = str(metadata.get("environment", ""))
    return d4rl.environment_of(stated or name) or stated or None


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
        return environment_of_file(self.name, self.metadata)

    @property
    def backend(self) -> str | None:
        """The simulator to evaluate on unless another is asked for: the one that made the data, as far as that is known.

        What a file says of itself, or d4rl-compat for D4RL's locomotion names: their scores are compared with those of
        others, and today's stock MuJoCo moves them by half. None where nothing is known, or it was a simulator from elsewhere.
        """
        spec = ENVIRONMENTS.get(self.environment or "")
        stated = self.metadata.get("backend")
        if stated is None and str(self.metadata.get("environment", "")).endswith("-v5"):
            stated = GYMNASIUM_V5
        if spec is not None and stated in spec.backends:
            return stated
        return D4RL_COMPAT if spec is not None and d4rl.is_d4rl_name(self.name) and D4RL_COMPAT in spec.backends else None

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
    if "timeouts" not in checked and "next_observations" in checked:
        breaks = find_breaks(checked, d4rl.max_episode_steps(environment_of_file(name, metadata or {})))
        if len(breaks):
            raise DydiffError(
                f"Dataset {where!r} has no timeouts, but {len(breaks)} episode(s) end within it, first in row {breaks[0]}, whose "
                "next_observations is not the observation of the row behind: they would be glued together. Store a timeouts array "
                "that marks the last row of every episode that time ended."
            )
    return Dataset(name=name, path=path, metadata=dict(metadata or {}), **checked)


def differs_from_row_behind(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether next_observations is not the observation of the row behind, for all rows but the last: [N - 1] bool."""
    stored, shifted = arrays["next_observations"][:-1], arrays["observations"][1:]
    with np.errstate(invalid="ignore"):
        return (np.abs(stored - shifted) > NEXT_TOLERANCE * (1 + np.abs(shifted))).any(axis=1)


def find_breaks(arrays: Mapping[str, np.ndarray], limit: int | None) -> np.ndarray:
    """Rows that end an episode by next_observations alone: neither terminals nor `limit` steps since the last end say so."""
    differs, terminals = differs_from_row_behind(arrays), arrays["terminals"][:-1]
    ends = np.flatnonzero(differs | terminals)
    lengths = np.diff(ends, prepend=-1)
    early = np.full(len(ends), True) if limit is None else lengths < limit - 1
    return ends[early & ~terminals[ends]]


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
