"""Agents of several seeds as one: their weights behind a common first dimension, so that one operation updates all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dydiff.agents.updates import Adam

SomeAgent = TypeVar("SomeAgent")


def stack_agents(agents: Sequence[SomeAgent]) -> SomeAgent:
    """An agent whose `apply_update` updates all `agents`, S equal ones at the same step, with one operation each.

    Batches, noise and what it logs have a first dimension S; no sum or mean of an agent's losses runs over it. The agents stay
    what they are, each with its weights as a view of the common ones: they act, are saved and are loaded as before.
    """
    stacked = copy.deepcopy(agents[0])
    for whole, *parts in zip(_trained(stacked), *map(_trained, agents), strict=True):
        whole.data = torch.stack([part.data for part in parts])
        for part, view in zip(parts, whole.data, strict=True):
            part.data = view
    for name, optimizer in vars(stacked).items():
        if isinstance(optimizer, Adam):
            optimizer.stacked = True
            for agent in agents:  # the same for all seeds
                mine = getattr(agent, name)
                mine.lr, mine.step = optimizer.lr, optimizer.step
    return stacked


def _trained(agent: object) -> Iterator[Tensor]:
    """Everything of an agent that updates change and that differs between seeds."""
    for part in vars(agent).values():
        if isinstance(part, nn.Module):
            yield from part.parameters()
        elif isinstance(part, Adam):
            yield from (*part.mean, *part.square)
        elif isinstance(part, Tensor):
            yield part
