"""Transitions on the device: a ring buffer that is written and read in whole batches, and batches mixed from two of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.data import Transitions
from dydiff.errors import DydiffError


class ReplayBuffer:
    """A ring buffer of at most `capacity` transitions in policy space; the oldest are overwritten first.

    A transition is one row of `rows`, so that drawing a batch is one gather; `storage` shows the columns by name.
    Raises:
        DydiffError: a capacity below 1.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device | str):
        if capacity < 1:
            raise DydiffError(f"A replay buffer must hold at least 1 transition, not {capacity}.")
        self.capacity = capacity
        self.widths = (observation_dim, action_dim, 1, observation_dim, 1)
        self.rows = torch.empty((capacity, sum(self.widths)), device=device)
        self.storage = split_rows(self.rows, self.widths)
        self.position = 0  # where the next transition goes
        self.size = 0
        self._size = torch.zeros((), dtype=torch.long, device=device)  # the same, where a captured graph reads it

    @classmethod
    def from_transitions(cls, transitions: Transitions, capacity: int) -> ReplayBuffer:
        """A full buffer with a copy of the newest `capacity` of these transitions, and no room beyond them."""
        newest = Transitions(*(field[-capacity:] for field in transitions))
        count, observation_dim = newest.observation.shape
        buffer = cls(count, observation_dim, newest.action.shape[1], newest.action.device)
        buffer.extend(newest)
        return buffer

    def extend(self, transitions: Transitions) -> None:
        """Append N transitions in order, as if one by one; of more than `capacity`, the last ones stay."""
        count = len(transitions.reward)
        kept = min(count, self.capacity)
        first = (self.position + count - kept) % self.capacity
        until_end = min(kept, self.capacity - first)
        for stored, new in zip(self.storage, transitions, strict=True):
            newest = new[count - kept :]
            stored[first : first + until_end] = newest[:until_end]
            stored[: kept - until_end] = newest[until_end:]
        self.position = (self.position + count) % self.capacity
        self._set_size(min(self.size + count, self.capacity))

    def draw_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` rows uniformly with replacement: `[count, width]`.

        64-bit numbers modulo the size (biased by less than 1e-12) rather than a bound that a captured graph would freeze.
        """
        index = torch.randint(2**62, (count,), generator=generator, device=self.rows.device) % self._size
        return self.rows.index_select(0, index)

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        """Draw `batch_size` transitions uniformly with replacement."""
        return split_rows(self.draw_rows(batch_size, generator), self.widths)

    def state_dict(self) -> dict[str, Tensor | int]:
        """What is stored, in slot order (unused slots left out), and where the next transition goes."""
        filled = {name: field[: self.size] for name, field in self.storage._asdict().items()}
        return {"position": self.position, **filled}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.position = state["position"]
        self._set_size(len(state["reward"]))
        for name, field in self.storage._asdict().items():
            field[: self.size] = state[name]

    def _set_size(self, size: int) -> None:
        self.size = size
        self._size.fill_(size)


def split_rows(rows: Tensor, widths: tuple[int, ...]) -> Transitions:
    """Rows `[..., sum of widths]` as transitions: views, of which the last axis of width 1 is dropped."""
    observation, action, reward, next_observation, terminal = rows.split(widths, dim=-1)
    return Transitions(observation, action, reward.squeeze(-1), next_observation, terminal.squeeze(-1))


def count_real(synthetic: ReplayBuffer, batch_size: int, real_ratio: float) -> int:
    """How many transitions of a batch are real: int(batch_size * real_ratio) (SPEC section 6).

    All are while the synthetic buffer holds fewer transitions than its share of the batch.
    """
    num_real = int(batch_size * real_ratio)
    return batch_size if synthetic.size < batch_size - num_real else num_real


def draw_mixed_rows(
    real: ReplayBuffer, synthetic: ReplayBuffer, batch_size: int, num_real: int, generator: torch.Generator
) -> Tensor:
    """Draw `num_real` rows of real transitions and the rest of synthetic ones: `[batch_size, width]`."""
    if num_real == batch_size:
        return real.draw_rows(batch_size, generator)
    if num_real == 0:
        return synthetic.draw_rows(batch_size, generator)
    return torch.cat([real.draw_rows(num_real, generator), synthetic.draw_rows(batch_size - num_real, generator)])


def sample_mixed(
    real: ReplayBuffer, synthetic: ReplayBuffer, batch_size: int, num_real: int, generator: torch.Generator
) -> Transitions:
    """Draw `num_real` real transitions and the rest synthetic ones."""
    return split_rows(draw_mixed_rows(real, synthetic, batch_size, num_real, generator), real.widths)
