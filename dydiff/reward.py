"""The reward model: one MLP from observation and action to the reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dydiff.data.transitions import Transitions
from dydiff.networks.mlp import MLP


class RewardModel(nn.Module):
    """`r(o, a)` in policy space, trained on the squared error (SPEC section 4)."""

    num_nets = 1

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.network = MLP(observation_dim + action_dim, hidden_dims, 1, generator=generator)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Reward `[...]` of observations `[..., O]` and actions `[..., A]`."""
        return self.network(torch.cat([observation, action], dim=-1)).squeeze(-1)

    # What `fit.Fit` needs to know of a model.

    def target(self, batch: Transitions) -> Tensor:
        """What is to be predicted from observation and action: the reward `[...]`."""
        return batch.reward

    def loss(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, 0-dim."""
        return (self(observation, action) - target).square().mean()

    def error_per_network(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Mean squared error `[1]`."""
        return self.loss(observation, action, target)[None]

    def parameter_groups(self) -> list[dict]:
        """Adam's only group."""
        return [{"params": list(self.parameters())}]

    def tensors_per_network(self) -> list[Tensor]:
        """Every weight as a view with a leading dimension of one network, `[1, ...]`."""
        return [parameter.detach()[None] for parameter in self.parameters()]

    def set_elites(self, error: Tensor) -> None:
        """There is one network, and it is used: nothing to choose."""
