"""When does an episode end? The environments' terminal functions on raw next observations (SPEC section 6).

Column 0 is the torso's height and column 1 its angle (inverted_pendulum: the cart's place, the pole's angle). What is
compared is written as "alive" and then negated: a comparison with NaN is false, so that NaN always ends an episode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dydiff.environments import environment_name

TerminalFunction = Callable[[Tensor], Tensor]  # [..., O] -> [...] bool, true = done


def _hopper(observation: Tensor) -> Tensor:
    finite = torch.isfinite(observation).all(-1)
    bounded = (observation[..., 1:].abs() < 100).all(-1)
    upright = (observation[..., 0] > 0.7) & (observation[..., 1].abs() < 0.2)
    return ~(finite & bounded & upright)


def _walker2d(observation: Tensor) -> Tensor:
    height, angle = observation[..., 0], observation[..., 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


def _ant(observation: Tensor) -> Tensor:
    height = observation[..., 0]
    return ~(torch.isfinite(observation).all(-1) & (height >= 0.2) & (height <= 1.0))


def _humanoid(observation: Tensor) -> Tensor:
    height = observation[..., 0]
    return ~((height >= 1.0) & (height <= 2.0))


def _inverted_pendulum(observation: Tensor) -> Tensor:
    return ~(torch.isfinite(observation).all(-1) & (observation[..., 1].abs() <= 0.2))


def _never(observation: Tensor) -> Tensor:
    return torch.zeros(observation.shape[:-1], dtype=torch.bool, device=observation.device)


_FUNCTIONS: dict[str, TerminalFunction] = {
    "hopper": _hopper,
    "walker2d": _walker2d,
    "halfcheetah": _never,
    "ant": _ant,
    "humanoid": _humanoid,
    "inverted_pendulum": _inverted_pendulum,
}


def terminal_function(environment: str) -> TerminalFunction:
    """Return the function from raw next observations [..., O] to done flags [...] (bool, true = done).

    Any name that `environment_name` accepts will do, and any maze; raises DydiffError for an unknown one.
    """
    if environment.lower().startswith(("maze2d", "antmaze")):
        return _never
    return _FUNCTIONS[environment_name(environment)]
