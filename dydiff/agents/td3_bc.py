"""TD3+BC (arXiv 2106.06860) with a tanh-Gaussian policy (SPEC section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydiff.agents.updates import Adam, make_target, move_target, restore_parts, store_parts
from dydiff.data.transitions import Transitions
from dydiff.networks.ensemble import EnsembleMLP
from dydiff.networks.policy import TanhGaussianPolicy


class TD3BCNoise(NamedTuple):
    """Standard normal noise of one update, `[B, A]` each."""

    next_action: Tensor
    policy_action: Tensor


class TD3BC:
    """Twin critics with delayed policy updates and behaviour cloning; observations and actions in policy space.

    The target action is a sample of the target policy, without further smoothing noise. Policy and targets move in
    every `policy_freq`-th update, after the critics.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        discount: float = 0.99,
        tau: float = 0.005,
        alpha: float = 2.5,
        policy_freq: int = 2,
        policy_lr: float = 3e-4,
        qf_lr: float = 3e-4,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ):
        self.action_dim = action_dim
        self.discount = discount
        self.tau = tau
        self.alpha = alpha
        self.policy_freq = policy_freq
        self.device = torch.device(device)
        self.policy = TanhGaussianPolicy(observation_dim, action_dim, hidden_dims, generator=generator).to(self.device)
        self.critics = EnsembleMLP(2, observation_dim + action_dim, hidden_dims, 1, generator=generator).to(self.device)
        self.target_policy = make_target(self.policy)
        self.target_critics = make_target(self.critics)
        self.policy_optimizer = Adam(self.policy.parameters(), policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), qf_lr)
        self.rhythm = policy_freq if policy_freq <= 4 else 1
        self.step = 0

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Deterministic action `[B, A]` of `observation [B, O]`; `generator` is not needed."""
        return self.policy.mean_action(observation)

    def act_for_evaluation(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The same as `act`."""
        return self.act(observation)

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> TD3BCNoise:
        """All randomness of one update."""
        shape = (2, batch_size, self.action_dim)
        return TD3BCNoise(*torch.randn(shape, generator=generator, device=generator.device).to(self.device))

    def critic_loss(self, batch: Transitions, noise: TD3BCNoise) -> tuple[Tensor, Tensor]:
        """Loss of each critic `[2]`, 0.5 mean((Q - y)^2), and the values `[2, B]`."""
        with torch.no_grad():
            next_action = self.target_policy.sample(batch.next_observation, noise.next_action)
            next_value = self.target_critics(torch.cat([batch.next_observation, next_action], dim=-1)).squeeze(-1)
            target = batch.reward + self.discount * (1 - batch.terminal) * next_value.amin(dim=-2)  # [B]
        value = self.critics(torch.cat([batch.observation, batch.action], dim=-1)).squeeze(-1)
        return 0.5 * (value - target.unsqueeze(-2)).square().mean(dim=-1), value

    def policy_loss(self, batch: Transitions, noise: TD3BCNoise) -> tuple[Tensor, Tensor]:
        """`-lambda mean Q1 + 0.5 mean((pi(o) - a)^2)` with lambda = alpha / mean|Q1|, and the cloning term alone."""
        action = self.policy.sample(batch.observation, noise.policy_action)
        value = self.critics(torch.cat([batch.observation, action], dim=-1), self.critics.gather(0)).squeeze(-1)
        cloning = 0.5 * (action - batch.action).square().mean(dim=(-2, -1))
        return cloning - self.alpha * value.mean(dim=-1) / value.detach().abs().mean(dim=-1), cloning

    def variant(self) -> tuple[bool, ...]:
        """What the host's step counter decides for the next update: equal variants run the same device work."""
        return ((self.step + 1) % self.policy_freq == 0,)

    def apply_update(self, batch: Transitions, noise: TD3BCNoise, variant: tuple[bool, ...]) -> dict[str, Tensor]:
        """The device work of one update, free of host synchronisation."""
        critic_loss, value = self.critic_loss(batch, noise)
        self.critic_optimizer.descend(critic_loss)
        log = {"critic_loss": critic_loss.detach().sum(dim=-1), "q_mean": value.detach().mean(dim=(-2, -1))}
        (moves_policy,) = variant
        if moves_policy:
            policy_loss, cloning = self.policy_loss(batch, noise)
            self.policy_optimizer.descend(policy_loss)
            move_target(self.target_policy, self.policy, self.tau)
            move_target(self.target_critics, self.critics, self.tau)
            log |= {"policy_loss": policy_loss.detach(), "cloning_loss": cloning.detach()}
        return log

    def update(self, batch: Transitions, noise: TD3BCNoise) -> dict[str, Tensor]:
        """One gradient step; returns 0-dim device tensors (the policy's only when it moves)."""
        log = self.apply_update(batch, noise, self.variant())
        self.step += 1
        return log

    def end_epoch(self) -> None:
        """Nothing changes between epochs."""

    def state_dict(self) -> dict:
        """Networks, targets, optimizers and the step counter (references, not copies)."""
        return store_parts(self) | {"step": self.step}

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken."""
        restore_parts(self, tree)
        self.step = tree["step"]
