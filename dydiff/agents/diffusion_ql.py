"""Diffusion-QL (arXiv 2208.06193): a diffusion actor trained by cloning and by the critics' values (SPEC section 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydiff.agents.diffusion_actor import DiffusionActor
from dydiff.agents.updates import Adam, make_target, move_target, restore_parts, store_parts
from dydiff.data.transitions import Transitions
from dydiff.errors import DydiffError
from dydiff.networks.ensemble import EnsembleMLP

BACKUP_SAMPLES = 10  # next actions per state with max_q_backup


class DiffusionQLNoise(NamedTuple):
    """Randomness of one update; M is 1, or 10 with `max_q_backup`."""

    next_initial: Tensor  # [M * B, A] normal: where the next actions start
    next_steps: Tensor  # [T, M * B, A] normal: their denoising steps
    step: Tensor  # [B] long, 0 .. T-1: the diffusion step of the cloning loss
    action: Tensor  # [B, A] normal: its noise
    numerator: Tensor  # [1] long, 0 or 1: the critic in the q-loss's numerator


class DiffusionQL:
    """Twin critics and a diffusion actor, whose moving average gives the target actions; policy space throughout.

    `lr_decay` anneals the learning rate to 0 by a cosine over `num_epochs` (see `end_epoch`); `max_q_backup` takes
    the best of 10 next actions in the target. The moving average follows with `ema_decay` every `ema_every` updates
    from update `ema_start` on; before, it stays at the initial actor. `grad_norm` clips
    the gradient of the actor, and that of both critics together (0: no clipping).
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        actor_hidden_dim: int = 256,
        discount: float = 0.99,
        tau: float = 0.005,
        eta: float = 1.0,
        lr: float = 3e-4,
        grad_norm: float = 5.0,
        n_timesteps: int = 5,
        beta_schedule: str = "vp",
        ema_decay: float = 0.995,
        ema_every: int = 5,
        ema_start: int = 1000,
        lr_decay: bool = False,
        num_epochs: int = 2000,
        max_q_backup: bool = False,
        num_candidates: int = 50,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ):
        self.action_dim = action_dim
        self.discount = discount
        self.tau = tau
        self.eta = eta
        self.lr = lr
        self.max_norm = grad_norm if grad_norm > 0 else math.inf
        self.ema_decay = ema_decay
        self.ema_every = ema_every
        self.ema_start = ema_start
        self.lr_decay = lr_decay
        self.num_epochs = num_epochs
        self.backup_samples = BACKUP_SAMPLES if max_q_backup else 1
        self.num_candidates = num_candidates
        self.device = torch.device(device)
        actor = DiffusionActor(observation_dim, action_dim, actor_hidden_dim, n_timesteps, beta_schedule, generator)
        self.actor = actor.to(self.device)
        self.critics = EnsembleMLP(2, observation_dim + action_dim, hidden_dims, 1, generator=generator).to(self.device)
        self.ema_actor = make_target(self.actor)
        self.target_critics = make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), lr)
        self.critic_optimizer = Adam(self.critics.parameters(), lr)
        self.rhythm = 1  # updates so long that calls do not matter
        self.step = 0
        self.epoch = 0

    def draw_action_noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `sample_action` needs: initial noise `[B, A]` and step noise `[T, B, A]`."""
        shape = (1 + self.actor.n_timesteps, batch_size, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(self.device)
        return noise[0], noise[1:]

    @torch.no_grad()
    def sample_action(self, observation: Tensor, initial_noise: Tensor, step_noise: Tensor) -> Tensor:
        """The action `[B, A]` that the given noise leads to."""
        return self.actor.sample(observation, initial_noise, step_noise)

    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sampled action `[B, A]` per state; DydiffError without a generator."""
        return self.sample_action(observation, *self.draw_action_noise(len(observation), _required(generator)))

    @torch.no_grad()
    def act_for_evaluation(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One of `num_candidates` sampled actions, drawn with the softmax of min(Q1, Q2) of the target critics.

        Raises DydiffError without a generator.
        """
        generator = _required(generator)
        repeated = observation.repeat_interleave(self.num_candidates, dim=0)  # [B * C, O]
        action = self.act(repeated, generator)
        value = self._target_value(repeated, action).amin(dim=0).view(-1, self.num_candidates)  # [B, C]
        # Gumbel-max draws exactly from the softmax, whatever device the generator lives on.
        uniform = torch.rand(value.shape, generator=generator, device=generator.device).to(self.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        chosen = (value + gumbel).argmax(dim=1)
        candidates = action.view(-1, self.num_candidates, self.action_dim)  # [B, C, A]
        return candidates.take_along_dim(chosen[:, None, None], dim=1).squeeze(1)

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> DiffusionQLNoise:
        """All randomness of one update."""
        next_initial, next_steps = self.draw_action_noise(self.backup_samples * batch_size, generator)
        steps = self.actor.n_timesteps
        step = torch.randint(steps, (batch_size,), generator=generator, device=generator.device)
        action = torch.randn((batch_size, self.action_dim), generator=generator, device=generator.device)
        numerator = torch.randint(2, (1,), generator=generator, device=generator.device)
        return DiffusionQLNoise(next_initial, next_steps, step.to(self.device), action.to(self.device), numerator.to(self.device))

    def _target_value(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.target_critics(torch.cat([observation, action], dim=-1)).squeeze(-1)  # [2, B]

    def critic_loss(self, batch: Transitions, noise: DiffusionQLNoise) -> tuple[Tensor, Tensor]:
        """Loss of each critic `[2]`, mean((Q - y)^2), and the values `[2, B]`."""
        with torch.no_grad():
            next_observation = batch.next_observation.repeat_interleave(self.backup_samples, dim=-2)  # [B * M, O]
            next_action = self.ema_actor.sample(next_observation, noise.next_initial, noise.next_steps)
            next_value = self._target_value(next_observation, next_action)
            best_value = next_value.unflatten(-1, (-1, self.backup_samples)).amax(dim=-1).amin(dim=-2)  # [B]
            target = batch.reward + self.discount * (1 - batch.terminal) * best_value
        value = self.critics(torch.cat([batch.observation, batch.action], dim=-1)).squeeze(-1)
        return (value - target.unsqueeze(-2)).square().mean(dim=-1), value

    def policy_loss(self, batch: Transitions, noise: DiffusionQLNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Noise-prediction loss plus eta times q-loss, then the two alone; the q-loss is -mean Q_i / mean|Q_j|."""
        cloning, action = self.actor.denoising_loss(batch.action, batch.observation, noise.step, noise.action)
        value = self.critics(torch.cat([batch.observation, action], dim=-1)).squeeze(-1)  # [2, B]
        scale = value.detach().abs().mean(dim=-1).gather(-1, 1 - noise.numerator)
        q_loss = (-value.mean(dim=-1).gather(-1, noise.numerator) / scale).squeeze(-1)
        return cloning + self.eta * q_loss, cloning, q_loss

    def variant(self) -> tuple[bool, ...]:
        """What the host's step counter decides for the next update: equal variants run the same device work."""
        return (self.step >= self.ema_start and self.step % self.ema_every == 0,)

    def apply_update(self, batch: Transitions, noise: DiffusionQLNoise, variant: tuple[bool, ...]) -> dict[str, Tensor]:
        """The device work of one update, free of host synchronisation."""
        critic_loss, value = self.critic_loss(batch, noise)
        critic_norm = self.critic_optimizer.descend(critic_loss, self.max_norm)
        policy_loss, cloning, q_loss = self.policy_loss(batch, noise)
        actor_norm = self.actor_optimizer.descend(policy_loss, self.max_norm)
        (moves_ema,) = variant
        if moves_ema:
            move_target(self.ema_actor, self.actor, 1 - self.ema_decay)
        move_target(self.target_critics, self.critics, self.tau)
        return {
            "critic_loss": critic_loss.detach().sum(dim=-1),
            "q_mean": value.detach().mean(dim=(-2, -1)),
            "policy_loss": policy_loss.detach(),
            "cloning_loss": cloning.detach(),
            "q_loss": q_loss.detach(),
            "critic_grad_norm": critic_norm,
            "policy_grad_norm": actor_norm,
        }

    def update(self, batch: Transitions, noise: DiffusionQLNoise) -> dict[str, Tensor]:
        """One gradient step of critics and actor; returns 0-dim device tensors."""
        log = self.apply_update(batch, noise, self.variant())
        self.step += 1
        return log

    def end_epoch(self) -> None:
        """Count the epoch and, with `lr_decay`, follow the cosine; from `num_epochs` on the rate is 0."""
        self.epoch += 1
        if self.lr_decay:
            lr = 0.5 * self.lr * (1 + math.cos(math.pi * min(self.epoch / self.num_epochs, 1.0)))
            self.actor_optimizer.lr.fill_(lr)
            self.critic_optimizer.lr.fill_(lr)

    def state_dict(self) -> dict:
        """Networks, targets, optimizers and counters (references, not copies)."""
        return store_parts(self) | {"step": self.step, "epoch": self.epoch}

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken."""
        restore_parts(self, tree)
        self.step = tree["step"]
        self.epoch = tree["epoch"]


def _required(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise DydiffError(
            "Diffusion-QL draws its actions: pass a torch.Generator to act and act_for_evaluation. RolloutEngine.roll_out takes "
            "the agent or the loaded policy itself, without .act, and has it draw from the rollout's generator."
        )
    return generator
