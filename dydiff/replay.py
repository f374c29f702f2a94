"""Transitions on the device: a ring buffer that is written and read in whole batches, and batches mixed from two of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.data import Transitions
from dydiff.errors import DydiffError


class ReplayBuffer:
    """A ring buffer of at most `capacity` transitions in policy space; the oldest are overwritten first.

    Raises:
        DydiffError: a capacity below 1.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device | str):
        if capacity < 1:
            raise DydiffError(f"A replay buffer must hold at least 1 transition, not {capacity}.")
        self.capacity = capacity
        self.size = 0
        self.position = 0  # where the next transition goes
        widths = Transitions((observation_dim,), (action_dim,), (), (observation_dim,), ())
        self.storage = Transitions(*(torch.empty((capacity, *width), device=device) for width in widths))

    @classmethod
    def from_transitions(cls, transitions: Transitions, capacity: int) -> ReplayBuffer:
        """A buffer that holds the newest `capacity` of these transitions and no room beyond them; storage is shared."""
        newest = Transitions(*(field[-capacity:] for field in transitions))
        count, observation_dim = newest.observation.shape
        buffer = cls(1, observation_dim, newest.action.shape[1], newest.action.device)
        buffer.capacity, buffer.size, buffer.storage = count, count, newest
        return buffer

    def extend(self, transitions: Transitions) -> None:
        """Append N transitions in order, as if one by one; of more than `capacity`, the last ones stay."""
        count = len(transitions.reward)
        kept = min(count, self.capacity)
        # Every slot is written once: a scatter with repeated indices would have no defined order.
        slots = (self.position + count - kept + torch.arange(kept, device=self.storage.reward.device)) % self.capacity
        for stored, new in zip(self.storage, transitions, strict=True):
            stored[slots] = new[count - kept :]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        """Draw `batch_size` transitions uniformly with replacement."""
        index = torch.randint(self.size, (batch_size,), generator=generator, device=self.storage.reward.device)
        return Transitions(*(field[index] for field in self.storage))

    def state_dict(self) -> dict[str, Tensor | int]:
        """What is stored, in slot order (unused slots left out), and where the next transition goes."""
        filled = {name: field[: self.size] for name, field in self.storage._asdict().items()}
        return {"position": self.position, **filled}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.position = state["position"]
        self.size = len(state["reward"])
        for name, field in self.storage._asdict().items():
            field[: self.size] = state[name]


def sample_mixed(
    real: ReplayBuffer, synthetic: ReplayBuffer, batch_size: int, real_ratio: float, generator: torch.Generator
) -> Transitions:
    """Draw int(batch_size * real_ratio) real transitions and the rest synthetic ones (SPEC section 6).

    All are real while the synthetic buffer holds fewer transitions than its share of the batch.
    """
    num_real = int(batch_size * real_ratio)
    if synthetic.size < batch_size - num_real:
        num_real = batch_size
    if num_real == batch_size:
        return real.sample(batch_size, generator)
    if num_real == 0:
        return synthetic.sample(batch_size, generator)
    parts = real.sample(num_real, generator), synthetic.sample(batch_size - num_real, generator)
    return Transitions(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
