"""Windows of consecutive rows for the diffusion model, gathered on the device from one flat array."""

from __future__ import annotations

import numpy as np
import torch

from dydiff.data import d4rl
from dydiff.data.dataset import Dataset
from dydiff.data.spaces import Limits
from dydiff.errors import DydiffError

PADDING = -1.0 - 1e-4  # in model space, just outside of the data's [-1, 1]


class Windows:
    """All windows of `horizon` rows that lie within one episode of a dataset, in model space.

    Rows are cut into episodes behind every terminal or timeout; rows behind the last such mark are left out. An episode
    longer than the horizon gives every window (stride 1); a shorter one gives a single window, padded at its end with
    -1 - 1e-4 in every column. Windows keep the dataset's order.
    dataset: N rows; limits: of the O + A columns (or of the O observation columns where include_action is False).
    max_episode_steps: the time limit that cuts episodes in a file without `timeouts` (default: D4RL's limit for the
    dataset's environment, if it has one); not used where the file has them.
    Memory: one [N + 1, D] float32 array and two numbers a window; windows overlap there, `gather` alone copies rows.
    Raises DydiffError where the horizon is below 1, the limits do not fit, or the dataset marks no end of an episode.
    """

    def __init__(
        self,
        dataset: Dataset,
        horizon: int,
        limits: Limits,
        include_action: bool = True,
        device: torch.device | str = "cpu",
        max_episode_steps: int | None = None,
    ):
        if horizon < 1:
            raise DydiffError(f"The length of a window (max_length_of_trajectory) must be at least 1, not {horizon}.")
        self.horizon = horizon
        self.observation_dim = dataset.observation_dim
        self.action_dim = dataset.action_dim if include_action else 0
        self.limits = self._fit_limits(limits, dataset, include_action).to(device)
        start, length = find_windows(dataset, horizon, max_episode_steps)
        self.start = torch.from_numpy(start).to(device)  # [W] first row
        self.length = torch.from_numpy(length).to(device)  # [W] rows that are data; the rest is padding
        self.rows = torch.empty(len(dataset) + 1, self.dim, device=device)  # [N + 1, D] in model space
        columns = [dataset.observations, dataset.actions] if include_action else [dataset.observations]
        raw = torch.from_numpy(np.concatenate(columns, axis=1)).to(device)
        self.rows[:-1] = self.limits.normalize(raw)
        self.rows[-1] = PADDING  # the row that every padded position points to
        self._offset = torch.arange(horizon, device=device)  # [H]

    @property
    def dim(self) -> int:
        """D, the number of columns of a window."""
        return self.observation_dim + self.action_dim

    @property
    def device(self) -> torch.device:
        """Where the data live and where `gather` works."""
        return self.rows.device

    def __len__(self) -> int:
        return len(self.start)

    @property
    def padding(self) -> float:
        """Share of all windows' rows that are padding: large where most episodes are shorter than the horizon."""
        return 1 - self.length.double().mean().item() / self.horizon

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Return the windows [B, H, D] float32 in model space for window numbers `index` [B] (int64, on `device`)."""
        start, length = self.start[index, None], self.length[index, None]  # [B, 1]
        row = torch.where(self._offset < length, start + self._offset, len(self.rows) - 1)  # [B, H]
        return self.rows[row]

    @staticmethod
    def _fit_limits(limits: Limits, dataset: Dataset, include_action: bool) -> Limits:
        both = dataset.observation_dim + dataset.action_dim
        if limits.dim == both:
            return limits if include_action else limits.part(slice(0, dataset.observation_dim))
        if limits.dim == dataset.observation_dim and not include_action:
            return limits
        raise DydiffError(
            f"The limits have {limits.dim} columns, but dataset {dataset.name!r} has {dataset.observation_dim} "
            f"observation and {dataset.action_dim} action columns. Both must come from the same environment."
        )


def find_episodes(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row and the number of rows of every episode that ends, [E] int64 each; marks [N]: its last row."""
    ends = np.flatnonzero(marks) + 1
    begins = np.concatenate([[0], ends])[: len(ends)]
    return begins, ends - begins


def find_windows(dataset: Dataset, horizon: int, max_episode_steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row [W] and the number of data rows [W] (at most `horizon`) of every window, both int64.

    Raises DydiffError where the dataset marks no end of an episode.
    """
    limit = d4rl.max_episode_steps(dataset.environment) if max_episode_steps is None else max_episode_steps
    marks = dataset.terminals
    if dataset.timeouts is not None:
        marks = marks | dataset.timeouts
    elif limit is not None:
        marks = marks | _find_time_limits(marks, limit)
    begins, lengths = find_episodes(marks)
    if len(begins) == 0:
        raise DydiffError(
            f"Dataset {dataset.name!r} marks no end of an episode, by terminals or timeouts, in its {len(dataset)} "
            "rows: there is no whole episode to cut windows from. Store a timeouts array that marks the last row of "
            "every episode that time ended."
        )
    counts = np.maximum(lengths - horizon + 1, 1)  # [E] windows per episode
    first = np.cumsum(counts) - counts  # [E] number of the episode's first window
    within = np.arange(counts.sum()) - np.repeat(first, counts)  # [W]
    start = np.repeat(begins, counts) + within
    length = np.repeat(np.minimum(lengths, horizon), counts)
    return start.astype(np.int64), length.astype(np.int64)


def _find_time_limits(terminals: np.ndarray, limit: int) -> np.ndarray:
    """Mark [N] the rows at which an episode has lasted `limit` steps.

    Unlike the counter behind D4RL's transitions, it counts every episode from its first row: a window must not reach
    into the next episode, while there a row more or less is harmless.
    """
    if limit < 1:
        raise DydiffError(f"max_episode_steps must be at least 1, not {limit}.")
    row = np.arange(len(terminals))
    begins = np.zeros(len(terminals), dtype=np.int64)  # where the episode of each row begins
    begins[1:] = np.maximum.accumulate(np.where(terminals[:-1], row[1:], 0))
    return (row - begins) % limit == limit - 1
