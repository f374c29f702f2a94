"""Model-free offline-RL algorithms behind one interface: the rollout sees `act`, the trainer what `Agent` lists."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dydiff.agents.cql import CQL
from dydiff.agents.diffusion_ql import DiffusionQL
from dydiff.agents.td3_bc import TD3BC
from dydiff.data.transitions import Transitions


class Agent(Protocol):
    """What an algorithm offers; everything is in policy space, and batches hold float32 tensors on its device.

    `update(batch, noise)` is `apply_update(batch, noise, variant())` followed by `step += 1`. A captured graph of
    `apply_update` may stand in for it, one graph per variant; whoever replays it increments `step`.
    """

    device: torch.device
    step: int
    rhythm: int  # how many updates are compiled as one: fewer calls, and variants that repeat after them

    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Action `[B, A]` for rollouts: deterministic, or one sample of a stochastic actor."""

    def act_for_evaluation(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Action `[B, A]` for evaluation in the environment."""

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> Any:
        """A NamedTuple of tensors with all randomness of one update."""

    def variant(self) -> tuple[bool, ...]:
        """What the host's step counter decides for the next update."""

    def apply_update(self, batch: Transitions, noise: Any, variant: tuple[bool, ...]) -> dict[str, Tensor]:
        """The device work of one update: no host synchronisation, weights keep their storage."""

    def update(self, batch: Transitions, noise: Any) -> dict[str, Tensor]:
        """One gradient step; returns 0-dim detached tensors by log key."""

    def end_epoch(self) -> None:
        """Called after the last update of an epoch."""

    def state_dict(self) -> dict:
        """A tree of tensors and plain values that continues the run exactly."""

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken."""


AGENTS: dict[str, type[TD3BC] | type[DiffusionQL] | type[CQL]] = {
    "td3_bc": TD3BC,
    "diffusion_ql": DiffusionQL,
    "cql": CQL,
}
