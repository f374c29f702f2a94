"""Implicit Q-learning (arXiv 2110.06169) as an algorithm of one's own: `python run_experiment.py -e examples/iql.yaml`.

A class with what `dydiff.agents.Agent` lists. It gets its updates captured as CUDA graphs or compiled, evaluation beside training,
resuming, several seeds at once and DyDiff's rollouts from that alone. Four rules make it so: all randomness of an update comes from
`draw_noise`; weights keep their storage (`Adam`, `move_target`); nothing in `apply_update` waits for the device; and sums and means
name the dimensions that they run over, because several seeds that train together have one of their own in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydiff.agents.updates import Adam, make_target, move_target, restore_parts, store_parts
from dydiff.data import Transitions
from dydiff.networks.ensemble import EnsembleMLP
from dydiff.networks.policy import TanhGaussianPolicy

EDGE = 1e-4  # recorded actions are kept so far inside (-1, 1), where the policy's density is finite
LARGEST_WEIGHT = 100.0


class Noise(NamedTuple):
    """An update of IQL draws nothing: one unused number, because a batch's noise is a tuple of tensors."""

    unused: Tensor


class IQL:
    """A value by expectile regression, and a policy by advantage-weighted regression; all in policy space."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        discount: float = 0.99,
        tau: float = 0.005,
        expectile: float = 0.7,
        temperature: float = 3.0,
        lr: float = 3e-4,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ):
        self.discount, self.tau, self.expectile, self.temperature = discount, tau, expectile, temperature
        self.device = torch.device(device)
        self.policy = TanhGaussianPolicy(observation_dim, action_dim, hidden_dims, generator=generator).to(self.device)
        self.value = EnsembleMLP(1, observation_dim, hidden_dims, 1, generator=generator).to(self.device)
        self.critics = EnsembleMLP(2, observation_dim + action_dim, hidden_dims, 1, generator=generator).to(self.device)
        self.target_critics = make_target(self.critics)
        self.policy_optimizer = Adam(self.policy.parameters(), lr)
        self.value_optimizer = Adam(self.value.parameters(), lr)
        self.critic_optimizer = Adam(self.critics.parameters(), lr)
        self.rhythm = 1  # all updates are alike
        self.step = 0

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.policy.mean_action(observation)

    act_for_evaluation = act

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> Noise:
        return Noise(torch.zeros((), device=self.device))

    def variant(self) -> tuple[bool, ...]:
        return ()

    def apply_update(self, batch: Transitions, noise: Noise, variant: tuple[bool, ...]) -> dict[str, Tensor]:
        pairs = torch.cat([batch.observation, batch.action], dim=-1)
        with torch.no_grad():
            target = self.target_critics(pairs).squeeze(-1).amin(dim=-2)  # [B]
        advantage = target - self._value(batch.observation)
        weight = torch.where(advantage > 0, self.expectile, 1 - self.expectile)
        value_loss = (weight * advantage.square()).mean(dim=-1)
        self.value_optimizer.descend(value_loss)

        with torch.no_grad():
            goal = batch.reward + self.discount * (1 - batch.terminal) * self._value(batch.next_observation)
        error = self.critics(pairs).squeeze(-1) - goal.unsqueeze(-2)  # [2, B]
        critic_loss = error.square().mean(dim=-1)
        self.critic_optimizer.descend(critic_loss)

        weight = (self.temperature * advantage.detach()).exp().clamp(max=LARGEST_WEIGHT)
        policy_loss = -(weight * self._log_prob(batch.observation, batch.action)).mean(dim=-1)
        self.policy_optimizer.descend(policy_loss)
        move_target(self.target_critics, self.critics, self.tau)
        losses = {"value_loss": value_loss, "critic_loss": critic_loss.sum(dim=-1), "policy_loss": policy_loss}
        return {name: loss.detach() for name, loss in losses.items()}

    def _value(self, observation: Tensor) -> Tensor:
        return self.value(observation).squeeze(-1).squeeze(-2)  # [1, B, 1] -> [B]

    def _log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log-density [B] of the Gaussian under the tanh; what the tanh adds has no gradient in the weights."""
        mean, log_std = self.policy(observation)
        deviation = (torch.atanh(action.clamp(-1 + EDGE, 1 - EDGE)) - mean) * (-log_std).exp()
        return (-0.5 * deviation.square() - log_std).sum(dim=-1)

    def update(self, batch: Transitions, noise: Noise) -> dict[str, Tensor]:
        log = self.apply_update(batch, noise, self.variant())
        self.step += 1
        return log

    def end_epoch(self) -> None:
        pass

    def state_dict(self) -> dict:
        return store_parts(self) | {"step": self.step}

    def load_state_dict(self, tree: dict) -> None:
        restore_parts(self, tree)
        self.step = tree["step"]
