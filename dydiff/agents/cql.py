"""CQL(H) (arXiv 2006.04779): soft actor-critic whose critics are pushed down on actions that the data do not hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydiff.agents.updates import Adam, make_target, move_target, restore_parts, store_parts
from dydiff.data.transitions import Transitions
from dydiff.networks.ensemble import EnsembleMLP
from dydiff.networks.policy import TanhGaussianPolicy


class CQLNoise(NamedTuple):
    """Randomness of one update; R is `num_random`."""

    next_action: Tensor  # [B, A] normal: the target's action
    policy_action: Tensor  # [B, A] normal: the policy loss's action
    random_actions: Tensor  # [B, R, A] uniform in [-1, 1]: actions themselves
    current_actions: Tensor  # [B, R, A] normal: policy samples at the observation
    next_actions: Tensor  # [B, R, A] normal: policy samples at the next observation


class CQL:
    """Twin soft critics with a conservative term, `min_q_weight (log-integral exp Q - Q(data))`; in policy space.

    The entropy temperature alpha starts at 1 and is tuned towards an entropy of -A; the critics' target holds no entropy, as in
    the paper's D4RL runs.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        discount: float = 0.99,
        tau: float = 0.005,
        policy_lr: float = 1e-4,
        qf_lr: float = 3e-4,
        min_q_weight: float = 5.0,
        num_random: int = 10,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ):
        self.action_dim = action_dim
        self.discount = discount
        self.tau = tau
        self.min_q_weight = min_q_weight
        self.num_random = num_random
        self.target_entropy = -float(action_dim)
        self.device = torch.device(device)
        self.policy = TanhGaussianPolicy(observation_dim, action_dim, hidden_dims, generator=generator).to(self.device)
        self.critics = EnsembleMLP(2, observation_dim + action_dim, hidden_dims, 1, generator=generator).to(self.device)
        self.target_critics = make_target(self.critics)
        self.log_alpha = torch.zeros((), device=self.device, requires_grad=True)
        self.policy_optimizer = Adam(self.policy.parameters(), policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), qf_lr)
        self.alpha_optimizer = Adam([self.log_alpha], policy_lr)
        self.rhythm = 1  # updates so long that calls do not matter
        self.step = 0

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Deterministic action `[B, A]` of `observation [B, O]`; `generator` is not needed."""
        return self.policy.mean_action(observation)

    def act_for_evaluation(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The same as `act`."""
        return self.act(observation)

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> CQLNoise:
        """All randomness of one update."""
        single = (2, batch_size, self.action_dim)
        several = (batch_size, self.num_random, self.action_dim)
        normal = torch.randn(single, generator=generator, device=generator.device).to(self.device)
        normals = torch.randn((2, *several), generator=generator, device=generator.device).to(self.device)
        uniform = torch.rand(several, generator=generator, device=generator.device).to(self.device)
        return CQLNoise(normal[0], normal[1], 2 * uniform - 1, normals[0], normals[1])

    def critic_loss(self, batch: Transitions, noise: CQLNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each critic `[2]`, its conservative part before the weight `[2]`, and the values `[2, B]`."""
        with torch.no_grad():
            next_action = self.policy.sample(batch.next_observation, noise.next_action)
            next_value = _evaluate(self.target_critics, batch.next_observation, next_action).amin(dim=-2)
            target = batch.reward + self.discount * (1 - batch.terminal) * next_value
        value = _evaluate(self.critics, batch.observation, batch.action)
        conservative = self._soft_maximum(batch, noise).mean(dim=-1) - value.mean(dim=-1)
        error = (value - target.unsqueeze(-2)).square().mean(dim=-1)
        return error + self.min_q_weight * conservative, conservative, value

    def _soft_maximum(self, batch: Transitions, noise: CQLNoise) -> Tensor:
        """Log of the integral of exp Q over all actions, `[2, B]`, by importance sampling (appendix F): a third of the
        actions each is uniform, from the policy here, and from the policy at the next observation."""
        with torch.no_grad():
            here, there = batch.observation.unsqueeze(-2), batch.next_observation.unsqueeze(-2)  # [B, 1, O]
            current, current_log_prob = self.policy.sample_with_log_prob(here, noise.current_actions)
            following, following_log_prob = self.policy.sample_with_log_prob(there, noise.next_actions)
            uniform_log_prob = torch.full_like(current_log_prob, -self.action_dim * math.log(2))
            action = torch.cat([noise.random_actions, current, following], dim=-2)  # [B, 3R, A]
            log_prob = torch.cat([uniform_log_prob, current_log_prob, following_log_prob], dim=-1)  # [B, 3R]
            observation = here.expand(*action.shape[:-1], -1)
        value = _evaluate(self.critics, observation.flatten(-3, -2), action.flatten(-3, -2))  # [2, B * 3R]
        value = value.unflatten(-1, log_prob.shape[-2:]) - log_prob.unsqueeze(-3)
        return torch.logsumexp(value, dim=-1) - math.log(log_prob.shape[-1])

    def policy_loss(self, batch: Transitions, noise: CQLNoise) -> tuple[Tensor, Tensor]:
        """`mean(alpha log pi - min Q)` and log pi `[B]`."""
        action, log_prob = self.policy.sample_with_log_prob(batch.observation, noise.policy_action)
        value = _evaluate(self.critics, batch.observation, action).amin(dim=-2)
        return (self.log_alpha.detach().exp().unsqueeze(-1) * log_prob - value).mean(dim=-1), log_prob

    def variant(self) -> tuple[bool, ...]:
        """What the host's step counter decides for the next update: nothing."""
        return ()

    def apply_update(self, batch: Transitions, noise: CQLNoise, variant: tuple[bool, ...]) -> dict[str, Tensor]:
        """The device work of one update, free of host synchronisation."""
        critic_loss, conservative, value = self.critic_loss(batch, noise)
        self.critic_optimizer.descend(critic_loss)
        policy_loss, log_prob = self.policy_loss(batch, noise)
        self.policy_optimizer.descend(policy_loss)
        self.alpha_optimizer.descend(-self.log_alpha * (log_prob.detach().mean(dim=-1) + self.target_entropy))
        move_target(self.target_critics, self.critics, self.tau)
        return {
            "critic_loss": critic_loss.detach().sum(dim=-1),
            "conservative_loss": conservative.detach().sum(dim=-1),
            "q_mean": value.detach().mean(dim=(-2, -1)),
            "policy_loss": policy_loss.detach(),
            "entropy": -log_prob.detach().mean(dim=-1),
            "alpha": self.log_alpha.detach().exp(),
        }

    def update(self, batch: Transitions, noise: CQLNoise) -> dict[str, Tensor]:
        """One gradient step of critics, policy and temperature; returns 0-dim device tensors."""
        log = self.apply_update(batch, noise, self.variant())
        self.step += 1
        return log

    def end_epoch(self) -> None:
        """Nothing changes between epochs."""

    def state_dict(self) -> dict:
        """Networks, targets, temperature, optimizers and the step counter (references, not copies)."""
        return store_parts(self) | {"log_alpha": self.log_alpha.detach(), "step": self.step}

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken."""
        restore_parts(self, tree)
        with torch.no_grad():
            self.log_alpha.copy_(tree["log_alpha"])
        self.step = tree["step"]


def _evaluate(critics: EnsembleMLP, observation: Tensor, action: Tensor) -> Tensor:
    return critics(torch.cat([observation, action], dim=-1)).squeeze(-1)  # [2, B]
