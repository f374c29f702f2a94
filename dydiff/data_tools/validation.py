"""Everything that is wrong or noteworthy with a dataset, with the rows where it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dydiff.data import RawDataset, d4rl
from dydiff.data.dataset import OPTIONAL, REQUIRED, differs_from_row_behind, find_breaks
from dydiff.data.windows import find_episodes
from dydiff.environments import ENVIRONMENTS
from dydiff.environments.terminal import terminal_function

MATRICES = ("observations", "actions", "next_observations", "infos/qpos", "infos/qvel")
SHOWN_ROWS = 10
ACTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing about a dataset. A defect keeps it from being used, or from being used rightly; anything else is a note."""

    text: str
    is_defect: bool
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # where it is; empty: everywhere

    def __str__(self) -> str:
        where = ""
        if len(self.rows):
            shown = ", ".join(map(str, self.rows[:SHOWN_ROWS].tolist()))
            more = f", ... ({len(self.rows):,} rows)" if len(self.rows) > SHOWN_ROWS else ""
            where = f": row{'s' if len(self.rows) > 1 else ''} {shown}{more}"
        return f"{'defect' if self.is_defect else 'note  '}  {self.text}{where}"


def find_problems(raw: RawDataset, environment: str | None) -> list[Finding]:
    """Examine a dataset against D4RL's schema and, where one is known, its environment; defects first."""
    findings = check_structure(raw.arrays)
    if not findings:  # otherwise rows do not belong together
        findings = _check_values(raw.arrays)
        # Rows with odd numbers are named already; the rest is examined without them.
        arrays = {key: _to_plain(key, values) for key, values in raw.arrays.items() if key in _known(raw.arrays)}
        findings += _check_episodes(arrays, environment)
        findings += _check_environment(arrays, environment)
    return sorted(findings, key=lambda finding: not finding.is_defect)


def _known(arrays: dict[str, np.ndarray]) -> list[str]:
    return [key for key in (*REQUIRED, *OPTIONAL, "infos/qpos", "infos/qvel") if key in arrays]


def _to_plain(key: str, values: np.ndarray) -> np.ndarray:
    if key in MATRICES:
        return np.asarray(values, np.float64)
    values = values.reshape(len(values))
    return values.astype(np.float64) if key == "rewards" else values.astype(np.float64) != 0


def check_structure(arrays: dict[str, np.ndarray]) -> list[Finding]:
    """Return what keeps the rows of arrays from belonging together: missing ones, wrong shapes and types."""
    findings = [Finding(f"{key} is missing", True) for key in REQUIRED if key not in arrays]
    rows = len(arrays["observations"]) if "observations" in arrays and arrays["observations"].ndim else 0
    for key in _known(arrays):
        shape, kind = arrays[key].shape, arrays[key].dtype
        if kind.kind not in "fiub":
            findings.append(Finding(f"{key} holds {kind} values, not real numbers", True))
        if key in MATRICES and (len(shape) != 2 or shape[1] == 0):
            findings.append(Finding(f"{key} has shape {shape}; it must be a matrix with one row per step", True))
        elif key not in MATRICES and len(shape) != 1 and shape[1:] != (1,):
            findings.append(Finding(f"{key} has shape {shape}; it must hold one number per step", True))
        elif shape[0] != rows:
            findings.append(Finding(f"{key} has {shape[0]:,} rows, but observations has {rows:,}", True))
    if "observations" in arrays and rows < 2:
        findings.append(Finding(f"there are {rows} rows; one transition needs 2", True))
    following = arrays.get("next_observations")
    if not findings and following is not None and following.shape != arrays["observations"].shape:
        findings.append(Finding(f"next_observations has {following.shape[1]} columns, observations has others", True))
    return findings


def _check_values(arrays: dict[str, np.ndarray]) -> list[Finding]:
    findings = []
    for key in _known(arrays):
        with np.errstate(over="ignore"):  # beyond float32 counts as infinite
            values = np.asarray(arrays[key], np.float32).reshape(len(arrays[key]), -1)
        odd = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(odd):
            findings.append(Finding(f"{key} holds NaN or infinite numbers", True, odd))
        if key in ("terminals", "timeouts"):
            odd = np.flatnonzero((values[:, 0] != 0) & (values[:, 0] != 1))
            if len(odd):
                findings.append(Finding(f"{key} holds something else than true and false", True, odd))
        elif key in ("observations", "actions", "rewards"):
            low, high = values.min(axis=0), values.max(axis=0)
            constant = np.flatnonzero(low == high)
            if len(constant):
                columns = "" if key == "rewards" else f" in {'all' if len(constant) == len(low) else constant.tolist()} columns"
                findings.append(Finding(f"{key} is constant{columns}", False))
    return findings


def _check_episodes(arrays: dict[str, np.ndarray], environment: str | None) -> list[Finding]:
    findings = []
    terminals, limit = arrays["terminals"], d4rl.max_episode_steps(environment)
    timeouts = arrays.get("timeouts")
    if timeouts is None:
        if limit is None:
            findings.append(Finding("there are no timeouts, and no time limit of the environment is known", True))
        breaks = find_breaks(arrays, limit) if "next_observations" in arrays else []
        if len(breaks):
            text = "there are no timeouts, but episodes end where next_observations is not the observation of the row behind"
            findings.append(Finding(text, True, breaks))
        return findings
    if timeouts[:-1].all():
        findings.append(Finding("no transition is left: every row but the last ends an episode by time", True))
    both = np.flatnonzero(terminals & timeouts)
    if len(both):
        findings.append(Finding("terminals and timeouts mark the same row; such a row counts as a timeout", False, both))
    begins, lengths = find_episodes(terminals | timeouts)
    if len(lengths) == 0:
        findings.append(Finding("no episode ends: neither terminals nor timeouts mark a row", True))
        return findings
    # D4RL's maze files count from 0 up to and including the limit.
    long = begins[lengths > limit + 1] if limit is not None else begins[:0]
    if len(long):
        findings.append(Finding(f"episodes last longer than the {limit} steps of {environment}; they begin here", True, long))
    rest = len(terminals) - begins[-1] - lengths[-1]
    if rest:
        findings.append(Finding(f"the episode of the last {rest:,} rows does not end; windows leave them out", False))
    if "next_observations" in arrays:
        differs = np.flatnonzero(differs_from_row_behind(arrays) & ~(terminals | timeouts)[:-1])
        if len(differs):
            findings.append(Finding("next_observations is not the observation of the row behind", False, differs))
    return findings


def _check_environment(arrays: dict[str, np.ndarray], environment: str | None) -> list[Finding]:
    spec = ENVIRONMENTS.get(environment or "")
    if spec is None:
        return [Finding(f"no simulator of its environment ({environment or 'unknown'}) ships: ranges were not checked", False)]
    widths = {spec.with_backend(backend).observation_dim for backend in spec.backends}
    findings = []
    found = (arrays["observations"].shape[1], arrays["actions"].shape[1])
    if found[0] not in widths or found[1] != spec.action_dim:
        return [
            Finding(
                f"it has {found[0]} observation and {found[1]} action columns, but {environment} has "
                f"{' or '.join(map(str, sorted(widths)))} and {spec.action_dim}",
                True,
            )
        ]
    low, high = np.array(spec.action_low) - ACTION_TOLERANCE, np.array(spec.action_high) + ACTION_TOLERANCE
    outside = np.flatnonzero(((arrays["actions"] < low) | (arrays["actions"] > high)).any(axis=1))
    if len(outside):
        findings.append(Finding(f"actions lie outside the range of {environment}", True, outside))
    if not spec.is_maze and "next_observations" in arrays:
        with np.errstate(over="ignore"):
            ended = terminal_function(environment)(torch.from_numpy(arrays["next_observations"].astype(np.float32))).numpy()
        contrary = np.flatnonzero(ended != arrays["terminals"])
        if len(contrary):
            findings.append(Finding(f"terminals contradict the rule of {environment} on next_observations", False, contrary))
    return findings
