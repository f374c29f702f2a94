"""Policies to try rollouts on beside a trained one: a clone of the data's behaviour, and one pushed away from the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dydiff.data import Transitions
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.rollout import Policy


def clone_behaviour(transitions: Transitions, updates: int, seed: int, batch_size: int = 256) -> tuple[Policy, float]:
    """Regress the data's actions on their observations (policy space); returns the policy and its last mean squared error.

    The clone of a behaviour that observations do not determine is an average: in a maze, whose goals change unseen, it dawdles.
    """
    device = transitions.observation.device
    generator = torch.Generator().manual_seed(seed)
    network = TanhGaussianPolicy(transitions.observation.shape[1], transitions.action.shape[1], generator=generator).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    average = 0.0
    for update in range(updates):
        rows = torch.randint(len(transitions.action), (batch_size,), generator=generator).to(device)
        loss = (network.mean_action(transitions.observation[rows]) - transitions.action[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average += (loss.item() - average) / min(update + 1, 100)
    return network.requires_grad_(False).mean_action, average


def perturb(policy: Policy, observation_dim: int, action_dim: int, size: float, seed: int) -> Policy:
    """The policy plus a fixed smooth function of the observation, cut off at the actions' range.

    That is a = clip(policy(o) + size sqrt(2) sin(W o + b), -1, 1) with W normal of variance 1 / O and b uniform over a period: on
    z-scored observations an argument of variance 1, and a deviation of root mean square `size` before the clip.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(action_dim, observation_dim, generator=generator) / math.sqrt(observation_dim)
    phase = 2 * math.pi * torch.rand(action_dim, generator=generator)

    def act(observation: Tensor) -> Tensor:
        argument = observation @ weight.to(observation).T + phase.to(observation)
        return (policy(observation) + size * math.sqrt(2) * argument.sin()).clamp(-1, 1)

    return act


@torch.no_grad()
def distance_from_data(policy: Policy, transitions: Transitions, count: int, seed: int) -> float:
    """Root mean square difference between the policy's actions and the data's, at `count` of its states (actions in [-1, 1])."""
    rows = torch.randint(len(transitions.action), (count,), generator=torch.Generator().manual_seed(seed))
    rows = rows.to(transitions.action.device)
    return float((policy(transitions.observation[rows]) - transitions.action[rows]).square().mean().sqrt())
