"""Model-free offline-RL algorithms behind one interface: the rollout sees `act`, the trainer what `Agent` lists."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from dydiff.agents.cql import CQL
from dydiff.agents.diffusion_ql import DiffusionQL
from dydiff.agents.td3_bc import TD3BC
from dydiff.data.transitions import Transitions
from dydiff.errors import DydiffError
from dydiff.references import import_reference


class Agent(Protocol):
    """What an algorithm offers; everything is in policy space, and batches hold float32 tensors on its device.

    `update(batch, noise)` is `apply_update(batch, noise, variant())` followed by `step += 1`. A captured graph of
    `apply_update` may stand in for it, one graph per variant; whoever replays it increments `step`.

    It is made with `observation_dim`, `action_dim`, its own settings, `device`, and the `generator` of its first weights.
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

GIVEN = "observation_dim", "action_dim", "device", "generator"  # to every algorithm's constructor


def find_agent(algorithm: str) -> type[Agent]:
    """The class of an algorithm: one of `AGENTS` by its name, or anybody's as "module:Class", which is imported.

    Raises:
        DydiffError: no such name, it does not import, or it is no class that has what `Agent` lists.
    """
    if algorithm in AGENTS:
        return AGENTS[algorithm]
    setting = "agent_params.agent"
    found = import_reference(algorithm, setting)
    wanted = [name for name, value in vars(Agent).items() if inspect.isfunction(value) and not name.startswith("_")]
    missing = [name for name in wanted if not callable(getattr(found, name, None))]
    if not inspect.isclass(found) or missing:
        lacks = f"lacks {', '.join(missing)}" if inspect.isclass(found) else "is no class"
        raise DydiffError(f"{setting} is {algorithm!r}, which {lacks}: it must be a class with what dydiff.agents.Agent lists.")
    return found


def check_agent_settings(agent: type[Agent], names: Iterable[str], setting: str) -> None:
    """Raise DydiffError where the constructor of an algorithm does not take the settings `names`, or lacks one."""
    parameters = inspect.signature(agent).parameters.values()
    known = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
    if missing := [name for name in GIVEN if name not in known and not takes_all]:
        raise DydiffError(f"The constructor of {agent.__name__} must take {', '.join(GIVEN)}; it has no {', '.join(missing)}.")
    own = sorted(known - {*GIVEN})
    if unknown := [name for name in names if name not in own and not takes_all]:
        nearest = difflib.get_close_matches(unknown[0], own, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(own) or 'none'}."
        raise DydiffError(f"Unknown setting '{setting}.{unknown[0]}' of {agent.__name__}: {hint}")
    required = {each.name for each in parameters if each.default is each.empty}
    if lacking := [name for name in own if name in required and name not in names]:
        raise DydiffError(f"{agent.__name__} needs {' and '.join(f'{setting}.{name}' for name in lacking)}.")
