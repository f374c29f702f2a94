"""Environments that are not dydiff's: whatever gymnasium makes by an id."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dydiff.environments.spec import GYMNASIUM, EnvironmentSpec
from dydiff.errors import DydiffError
from dydiff.references import see_working_folder

if TYPE_CHECKING:
    import gymnasium


def is_gymnasium_id(name: str) -> bool:
    """Whether gymnasium has an environment of that id, or is to import a module that registers it ("module:Name-v0")."""
    if ":" in name:
        return True
    import gymnasium

    return name in gymnasium.registry


def make_own(gym_id: str) -> gymnasium.Env:
    """Make an environment; its module may lie in the working folder. Raises DydiffError where gymnasium cannot."""
    import gymnasium

    see_working_folder()
    try:
        return gymnasium.make(gym_id, disable_env_checker=True)
    except Exception as error:  # gymnasium's own, and whatever somebody's constructor raises
        raise DydiffError(
            f"gymnasium cannot make the environment {gym_id!r} ({type(error).__name__}: {error}). The module before the colon must "
            "import (from the working folder, too) and register the id behind it with gymnasium.register."
        ) from error


@lru_cache
def own_spec(gym_id: str) -> EnvironmentSpec:
    """The spec of an environment of gymnasium's, read off it once; its states are its observations, if it has `set_observation`.

    Raises:
        DydiffError: gymnasium cannot make it, or its spaces are not what the method works on (says which, and the remedy).
    """
    environment = make_own(gym_id)
    try:
        observation, action = environment.observation_space, environment.action_space
        limit = environment.spec.max_episode_steps if environment.spec else None
        tells_state = callable(getattr(environment.unwrapped, "set_observation", None))
    finally:
        environment.close()
    remedy = "Register it with a wrapper of gymnasium's around it, such as FlattenObservation."
    for kind, space in (("observations", observation), ("actions", action)):
        if type(space).__name__ != "Box" or len(space.shape) != 1:
            raise DydiffError(f"The {kind} of {gym_id} must be vectors, a Box of shape [n], and are {space}. {remedy}")
    low, high = (tuple(map(float, bounds)) for bounds in (action.low, action.high))
    if not np.isfinite([low, high]).all() or not np.less(low, high).all():
        raise DydiffError(f"The actions of {gym_id} must lie between finite bounds, and lie in {action}. {remedy}")
    return EnvironmentSpec(
        name=gym_id,
        observation_dim=observation.shape[0],
        action_dim=action.shape[0],
        action_low=low,
        action_high=high,
        max_episode_steps=limit or sys.maxsize,
        position_dim=observation.shape[0] if tells_state else 0,
        velocity_dim=0,
        hidden_dim=0,
        backend=GYMNASIUM,
        gym_id=gym_id,
    )
