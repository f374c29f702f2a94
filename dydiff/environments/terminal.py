"""When does an episode end? The environments' terminal functions on raw next observations (SPEC section 6).

Column 0 is the torso's height and column 1 its angle (inverted_pendulum: the cart's place, the pole's angle). What is
compared is written as "alive" and then negated: a comparison with NaN is false, so that NaN always ends an episode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dydiff.environments import NO_SIMULATOR, choose_environment
from dydiff.errors import DydiffError
from dydiff.references import import_reference

MAZES = "maze2d", "antmaze"
NEVER = "never"
SETTING = "env_specs.terminal_function"
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


def is_known(environment: str) -> bool:
    """Whether `terminal_function` has one for an environment, by its own name."""
    return environment.startswith(MAZES) or environment in _FUNCTIONS


def terminal_function(environment: str, chosen: str | None = None) -> TerminalFunction:
    """Return the function from raw next observations [..., O] to done flags [...] (bool, true = done).

    `chosen` is "never", or names a function as "module:function"; None: the one of the environment, by any name that
    `choose_environment` accepts. Raises DydiffError for an unknown name, for an environment whose function is not known, and
    where the chosen one does not import.
    """
    if chosen is not None:
        return _never if chosen == NEVER else import_reference(chosen, SETTING)
    if environment.lower().startswith(MAZES):
        return _never
    name = choose_environment(environment)
    if name not in _FUNCTIONS:
        whose = "data without a simulator" if name == NO_SIMULATOR else name
        raise DydiffError(
            f"When episodes of {whose} end is not known. Set {SETTING} to module:function, which is given raw next observations "
            f"[..., O] and returns bool [...], true where the episode ends; or to {NEVER}."
        )
    return _FUNCTIONS[name]


def apply_to_recorded(function: TerminalFunction, next_observation: Tensor) -> Tensor:
    """What somebody's function says [N] of recorded next observations [N, O] on the CPU.

    Raises DydiffError where it fails, or returns anything but bool of the shape without the last dimension.
    """
    rows = next_observation.clone()[None]
    try:
        done = function(rows)
    except Exception as error:
        raise DydiffError(f"The function of {SETTING} failed on the dataset: {type(error).__name__}: {error}") from error
    if not isinstance(done, Tensor) or done.dtype != torch.bool or done.shape != rows.shape[:-1]:
        given = f"{done.dtype} {list(done.shape)}" if isinstance(done, Tensor) else type(done).__name__
        raise DydiffError(
            f"The function of {SETTING} must return torch.bool {list(rows.shape[:-1])} for observations {list(rows.shape)}, not "
            f"{given}. Columns are to be taken from the last dimension: observation[..., 0]."
        )
    return done[0]
