"""Pair the rows of a dataset into transitions, as D4RL's `qlearning_dataset` does (arXiv 2004.07219)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dydiff.data import d4rl
from dydiff.data.dataset import Dataset
from dydiff.errors import DydiffError


class Transitions(NamedTuple):
    """N steps with their outcome: numpy arrays in raw space, or torch tensors (then `terminal` is float32 0/1)."""

    observation: np.ndarray | torch.Tensor  # [N, O]
    action: np.ndarray | torch.Tensor  # [N, A]
    reward: np.ndarray | torch.Tensor  # [N]
    next_observation: np.ndarray | torch.Tensor  # [N, O]
    terminal: np.ndarray | torch.Tensor  # [N]


def make_transitions(
    dataset: Dataset,
    terminate_on_end: bool = False,
    max_episode_steps: int | None = None,
    next_observation: str = "shift",
) -> Transitions:
    """Turn the N rows of a dataset into at most N - 1 transitions in raw space, all float32 but `terminal` (bool).

    The last row is left out, and so is every row that ends an episode by time alone, because the row behind it begins
    another episode; `terminate_on_end=True` keeps those. `max_episode_steps` finds them in a file without `timeouts`
    (default: D4RL's limit for the dataset's environment) and is not used where the file has them. `next_observation`
    is "shift" (the observation of the row behind, as D4RL does) or "stored" (the file's own `next_observations`, for
    the same rows). Antmaze rewards are shifted by -1.
    Raises DydiffError where the time limit or the stored next observations are needed and absent, or nothing is left.
    """
    if next_observation not in ("shift", "stored"):
        raise DydiffError(f"next_observation must be 'shift' or 'stored', not {next_observation!r}.")
    if next_observation == "stored" and dataset.next_observations is None:
        raise DydiffError(
            f"Dataset {dataset.name!r} stores no next_observations. "
            "Use next_observation='shift', which takes them from the row behind."
        )
    following = dataset.observations[1:] if next_observation == "shift" else dataset.next_observations[:-1]
    if terminate_on_end:
        keep = slice(None)
    else:
        timeouts = dataset.timeouts
        if timeouts is None:
            timeouts = _count_timeouts(dataset.terminals, _episode_limit(dataset, max_episode_steps))
        keep = np.flatnonzero(~timeouts[:-1])
        if len(keep) == 0:
            raise DydiffError(
                f"Dataset {dataset.name!r} has no transition left: every row but the last ends an episode by time. "
                "Correct its timeouts array: it must mark only the last row of each episode that time ended."
            )
    reward = dataset.rewards[:-1][keep]
    if (dataset.environment or "").startswith("antmaze"):
        reward = reward - np.float32(1.0)
    return Transitions(
        observation=dataset.observations[:-1][keep],
        action=dataset.actions[:-1][keep],
        reward=reward,
        next_observation=following[keep],
        terminal=dataset.terminals[:-1][keep],
    )


def _episode_limit(dataset: Dataset, max_episode_steps: int | None) -> int:
    limit = d4rl.max_episode_steps(dataset.environment) if max_episode_steps is None else max_episode_steps
    if limit is None:
        raise DydiffError(
            f"Dataset {dataset.name!r} has no timeouts, and the time limit of its environment "
            f"({dataset.environment or 'unknown'}) is not known. Store a timeouts array in the file that marks the last row of "
            "every episode that time ended."
        )
    if limit < 1:
        raise DydiffError(f"max_episode_steps must be at least 1, not {limit}.")
    return limit


def _count_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Mark [N] the rows at which D4RL's step counter reaches the time limit.

    The counter restarts at 0 behind a row that it dropped, but at 1 behind a terminal row: D4RL sets it to 0 there and
    still counts the row. An episode that follows a terminal is thus cut one row early; kept, so that data are the same.
    """
    timeouts = np.zeros(len(terminals), dtype=bool)
    start, counter = 0, 0
    for end in (*np.flatnonzero(terminals), len(terminals) - 1):
        # Never negative: with a limit of 1 every row is dropped, so that the counter never starts at 1.
        timeouts[start + max_episode_steps - 1 - counter : end + 1 : max_episode_steps] = True
        start, counter = end + 1, 0 if timeouts[end] else 1
    return timeouts
