"""Environments by their datasets' names: simulators, how they are stepped, and when an episode ends."""

from dydiff.environments.spec import (
    D4RL,
    D4RL_COMPAT,
    D4RL_LOCOMOTION,
    ENVIRONMENTS,
    GYMNASIUM,
    GYMNASIUM_V4,
    GYMNASIUM_V5,
    MAZE2D,
    MAZE_EPISODE_STEPS,
    NO_SIMULATOR,
    WITHOUT_SIMULATOR,
    EnvironmentSpec,
    choose_environment,
    environment_name,
    environment_spec,
    simulator_version,
)

__all__ = [
    "D4RL",
    "D4RL_COMPAT",
    "D4RL_LOCOMOTION",
    "ENVIRONMENTS",
    "GYMNASIUM",
    "GYMNASIUM_V4",
    "GYMNASIUM_V5",
    "MAZE2D",
    "MAZE_EPISODE_STEPS",
    "NO_SIMULATOR",
    "WITHOUT_SIMULATOR",
    "EnvironmentSpec",
    "choose_environment",
    "environment_name",
    "environment_spec",
    "simulator_version",
]
