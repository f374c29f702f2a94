"""The tanh-Gaussian policy of TD3+BC and CQL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.networks.mlp import MLP

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class TanhGaussianPolicy(nn.Module):
    """`a = tanh(mean + std * noise)`, with mean and log-std (clamped to [-20, 2]) from one MLP (SPEC section 7).

    The last layer holds the means first and the log-stds after them. Noise (standard normal, of the action's shape)
    is an argument, so that every method is a pure function. Works on any leading dimensions: observation `[..., O]`,
    action `[..., A]`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.network = MLP(observation_dim, hidden_dims, 2 * action_dim, generator=generator)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std of the Gaussian under the tanh, `[..., A]` each."""
        mean, log_std = self.network(observation).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def mean_action(self, observation: Tensor) -> Tensor:
        """The deterministic action `tanh(mean)`, `[..., A]`."""
        return torch.tanh(self(observation)[0])

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The action that `noise [..., A]` selects, differentiable in the weights."""
        mean, log_std = self(observation)
        return torch.tanh(mean + log_std.exp() * noise)

    def sample_with_log_prob(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action `[..., A]` and its log-density `[...]`.

        log(1 - tanh(u)^2) = 2 (ln 2 - u - softplus(-2u)) stays finite where tanh saturates (SAC, arXiv 1801.01290,
        eq. 21).
        """
        mean, log_std = self(observation)
        pre_tanh = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
        return torch.tanh(pre_tanh), (gaussian - log_jacobian).sum(-1)
