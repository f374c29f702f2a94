"""What dydiff's updates, replay and evaluation are measured against: plain PyTorch, as somebody would write it from the papers.

`published` is a module and an optimizer per network, targets moved parameter by parameter, losses read after every update, and
replay in numpy, copied to the device batch by batch. `stock` (`tuned`) is the same with what PyTorch offers: fused Adam, foreach
operators, replay on the device, and no reading. Both can load dydiff's weights and take given noise, for the check.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.agents.diffusion_actor import DiffusionActor
from dydiff.data import Transitions
from dydiff.networks.mlp import MLP

LR = 3e-4


class Replay:
    """Transitions in numpy arrays; rows are appended one by one, and batches are copied to the device."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: str):
        widths = (observation_dim, action_dim, 1, observation_dim, 1)
        self.fields = Transitions(*(np.zeros((capacity, width), np.float32) for width in widths))
        self.capacity, self.size, self.top, self.device = capacity, 0, 0, device

    def extend(self, transitions: Transitions) -> None:
        arrays = [field.cpu().numpy().reshape(len(transitions.reward), -1) for field in transitions]
        for i in range(len(arrays[0])):
            for stored, new in zip(self.fields, arrays, strict=True):
                stored[self.top] = new[i]
            self.top = (self.top + 1) % self.capacity
            self.size = min(self.size + 1, self.capacity)

    def draw(self, count: int) -> list[np.ndarray]:
        index = np.random.randint(0, self.size, count)
        return [field[index] for field in self.fields]


def sample_published(real: Replay, synthetic: Replay, batch: int, num_real: int) -> Transitions:
    parts = zip(real.draw(num_real), synthetic.draw(batch - num_real), strict=True)
    fields = [torch.from_numpy(np.concatenate(pair)).to(real.device) for pair in parts]
    return Transitions(*fields[:2], fields[2].squeeze(1), fields[3], fields[4].squeeze(1))


class TanhGaussian(nn.Module):
    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.network = MLP(observation_dim, (256, 256), 2 * action_dim)

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A sampled action and its log-density, with the distributions of PyTorch."""
        mean, log_std = self.network(observation).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        before = normal.rsample() if noise is None else mean + normal.stddev * noise
        log_prob = normal.log_prob(before) - 2 * (math.log(2) - before - F.softplus(-2 * before))
        return torch.tanh(before), log_prob.sum(-1)


class Agent:
    """What the three share: optimizers, targets, and reading of losses."""

    def __init__(self, tuned: bool, device: str):
        self.tuned, self.device, self.steps = tuned, device, 0

    def make_critics(self, observation_dim: int, action_dim: int) -> None:
        self.critics = [MLP(observation_dim + action_dim, (256, 256), 1).to(self.device) for _ in range(2)]
        self.target_critics = copy.deepcopy(self.critics)
        self.critic_optimizers = [self.make_optimizer(critic) for critic in self.critics]

    def make_optimizer(self, network: nn.Module, lr: float = LR) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=lr, fused=True if self.tuned else None)

    def step(self, loss: Tensor, *networks: nn.Module, optimizers: list[torch.optim.Adam], max_norm: float | None = None) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for network, optimizer in zip(networks, optimizers, strict=True):
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
            optimizer.step()

    @torch.no_grad()
    def move(self, target: nn.Module, source: nn.Module, rate: float) -> None:
        if self.tuned:
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
            return
        for old, new in zip(target.parameters(), source.parameters(), strict=True):
            old.data.copy_(old.data * (1 - rate) + new.data * rate)

    def read(self, **losses: Tensor) -> dict[str, Tensor | float]:
        return losses if self.tuned else {name: loss.item() for name, loss in losses.items()}

    def values(self, critics: list[nn.Module], observation: Tensor, action: Tensor) -> list[Tensor]:
        return [critic(torch.cat([observation, action], dim=-1)).squeeze(-1) for critic in critics]

    def load_critics(self, ours) -> None:
        for mine, theirs in ((self.critics, ours.critics), (self.target_critics, ours.target_critics)):
            for i, critic in enumerate(mine):
                critic.load_state_dict(theirs.member_state_dict(i))


class TD3BC(Agent):
    def __init__(self, observation_dim: int, action_dim: int, tuned: bool, device: str):
        super().__init__(tuned, device)
        self.make_critics(observation_dim, action_dim)
        self.policy = TanhGaussian(observation_dim, action_dim).to(device)
        self.target_policy = copy.deepcopy(self.policy)
        self.policy_optimizer = self.make_optimizer(self.policy)

    def load(self, ours) -> None:
        self.load_critics(ours)
        self.policy.network.load_state_dict(ours.policy.network.state_dict())
        self.target_policy.network.load_state_dict(ours.target_policy.network.state_dict())

    def mean_action(self, observation: Tensor) -> Tensor:
        mean, _ = self.policy.network(observation).chunk(2, dim=-1)
        return mean.tanh()

    def update(self, batch: Transitions, noise=None) -> dict[str, Tensor | float]:
        with torch.no_grad():
            action, _ = self.target_policy(batch.next_observation, noise and noise.next_action)
            value = torch.min(*self.values(self.target_critics, batch.next_observation, action))
            target = batch.reward + 0.99 * (1 - batch.terminal) * value
        losses = [0.5 * F.mse_loss(value, target) for value in self.values(self.critics, batch.observation, batch.action)]
        for loss, critic, optimizer in zip(losses, self.critics, self.critic_optimizers, strict=True):
            self.step(loss, critic, optimizers=[optimizer])
        log = self.read(first=losses[0], second=losses[1])
        self.steps += 1
        if self.steps % 2 == 0:
            action, _ = self.policy(batch.observation, noise and noise.policy_action)
            value = self.values(self.critics[:1], batch.observation, action)[0]
            loss = 0.5 * F.mse_loss(action, batch.action) - 2.5 / value.abs().mean().detach() * value.mean()
            self.step(loss, self.policy, optimizers=[self.policy_optimizer])
            self.move(self.target_policy, self.policy, 0.005)
            for old, new in zip(self.target_critics, self.critics, strict=True):
                self.move(old, new, 0.005)
            log |= self.read(policy=loss)
        return log


class DiffusionQL(Agent):
    def __init__(self, observation_dim: int, action_dim: int, tuned: bool, device: str):
        super().__init__(tuned, device)
        self.make_critics(observation_dim, action_dim)
        self.actor = DiffusionActor(observation_dim, action_dim).to(device)
        for network in (self.actor.network, self.actor.step_embedding):
            network.activation = F.mish
        self.ema_actor = copy.deepcopy(self.actor)
        self.actor_optimizer = self.make_optimizer(self.actor)

    def load(self, ours) -> None:
        self.load_critics(ours)
        self.actor.load_state_dict(ours.actor.state_dict())
        self.ema_actor.load_state_dict(ours.ema_actor.state_dict())

    def sample(self, observation: Tensor, noise) -> Tensor:
        """Denoising as it is usually written: every coefficient is looked up for every row."""
        actor, shape = self.ema_actor, (len(observation), self.actor.network.layers[-1].out_features)
        action = torch.randn(shape, device=self.device) if noise is None else noise.next_initial
        for i, t in enumerate(reversed(range(actor.n_timesteps))):
            step = torch.full((len(observation),), t, device=self.device, dtype=torch.long)
            start = actor.predict_start(action, step, actor(action, step, observation))
            mean = actor.posterior_from_start[step, None] * start + actor.posterior_from_noisy[step, None] * action
            fresh = torch.randn_like(action) if noise is None else noise.next_steps[i]
            action = mean + actor.posterior_std[step, None] * fresh
        return action.clamp(-1, 1)

    def update(self, batch: Transitions, noise=None) -> dict[str, Tensor | float]:
        with torch.no_grad():
            action = self.sample(batch.next_observation, noise)
            value = torch.min(*self.values(self.target_critics, batch.next_observation, action))
            target = batch.reward + 0.99 * (1 - batch.terminal) * value
        values = self.values(self.critics, batch.observation, batch.action)
        critic_loss = F.mse_loss(values[0], target) + F.mse_loss(values[1], target)
        both = nn.ModuleList(self.critics)
        for optimizer in self.critic_optimizers:
            optimizer.zero_grad()
        critic_loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 5.0)
        for optimizer in self.critic_optimizers:
            optimizer.step()
        if noise is None:
            step = torch.randint(0, self.actor.n_timesteps, (len(batch.reward),), device=self.device)
            fresh, numerator = torch.randn_like(batch.action), int(np.random.uniform() > 0.5)
        else:
            step, fresh, numerator = noise.step, noise.action, int(noise.numerator)
        cloning, action = self.actor.denoising_loss(batch.action, batch.observation, step, fresh)
        values = self.values(self.critics, batch.observation, action)
        q_loss = -values[numerator].mean() / values[1 - numerator].abs().mean().detach()
        loss = cloning + q_loss
        self.step(loss, self.actor, optimizers=[self.actor_optimizer], max_norm=5.0)
        if self.steps >= 1000 and self.steps % 5 == 0:
            self.move(self.ema_actor, self.actor, 0.005)
        for old, new in zip(self.target_critics, self.critics, strict=True):
            self.move(old, new, 0.005)
        self.steps += 1
        return self.read(critic=critic_loss, actor=loss, cloning=cloning, q=q_loss)


class CQL(Agent):
    def __init__(self, observation_dim: int, action_dim: int, tuned: bool, device: str, num_random: int = 10):
        super().__init__(tuned, device)
        self.make_critics(observation_dim, action_dim)
        self.policy = TanhGaussian(observation_dim, action_dim).to(device)
        self.policy_optimizer = self.make_optimizer(self.policy, 1e-4)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=1e-4)
        self.num_random, self.action_dim = num_random, action_dim

    def load(self, ours) -> None:
        self.load_critics(ours)
        self.policy.network.load_state_dict(ours.policy.network.state_dict())

    def conservative(self, critic: nn.Module, batch: Transitions, noise) -> Tensor:
        count = self.num_random
        here, following = (o.repeat_interleave(count, dim=0) for o in (batch.observation, batch.next_observation))
        if noise is None:
            uniform = torch.rand(len(here), self.action_dim, device=self.device) * 2 - 1
        else:
            uniform = noise.random_actions.flatten(0, 1)
        with torch.no_grad():
            now, now_log_prob = self.policy(here, noise and noise.current_actions.flatten(0, 1))
            then, then_log_prob = self.policy(following, noise and noise.next_actions.flatten(0, 1))
        densities = (-self.action_dim * math.log(2), now_log_prob, then_log_prob)
        values = [
            (self.values([critic], here, action)[0] - density).view(-1, count)
            for action, density in zip((uniform, now, then), densities, strict=True)
        ]
        return (torch.logsumexp(torch.cat(values, dim=1), dim=1) - math.log(3 * count)).mean()

    def update(self, batch: Transitions, noise=None) -> dict[str, Tensor | float]:
        with torch.no_grad():
            action, _ = self.policy(batch.next_observation, noise and noise.next_action)
            value = torch.min(*self.values(self.target_critics, batch.next_observation, action))
            target = batch.reward + 0.99 * (1 - batch.terminal) * value
        losses = []
        for critic in self.critics:
            value = self.values([critic], batch.observation, batch.action)[0]
            losses.append(F.mse_loss(value, target) + 5 * (self.conservative(critic, batch, noise) - value.mean()))
        for loss, critic, optimizer in zip(losses, self.critics, self.critic_optimizers, strict=True):
            self.step(loss, critic, optimizers=[optimizer])
        action, log_prob = self.policy(batch.observation, noise and noise.policy_action)
        value = torch.min(*self.values(self.critics, batch.observation, action))
        loss = (self.log_alpha.detach().exp() * log_prob - value).mean()
        self.step(loss, self.policy, optimizers=[self.policy_optimizer])
        alpha_loss = -(self.log_alpha * (log_prob.detach().mean() - self.action_dim))
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        for old, new in zip(self.target_critics, self.critics, strict=True):
            self.move(old, new, 0.005)
        return self.read(first=losses[0], second=losses[1], policy=loss, alpha=self.log_alpha.exp())


BASELINES = {"td3_bc": TD3BC, "diffusion_ql": DiffusionQL, "cql": CQL}
