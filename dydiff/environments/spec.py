"""The environments that dydiff can simulate: names, sizes, limits, and how to make one.

Importing this module loads no simulator: `EnvironmentSpec.make` does.
Scores of different simulators do not compare, so each has a name, which is kept with MuJoCo's version beside every score:
- `gymnasium-v4`: the reward of the gym v2 tasks that D4RL was recorded with, the physics of the installed MuJoCo.
- `d4rl-compat`: the same reward, and the physics of D4RL's MuJoCo (`dydiff.environments.simulators.restore_old_physics`).
- `gymnasium-v5`: another reward (no healthy reward on the last step) and other models (walker2d's feet); Minari's simulator.
- `d4rl`: the legacy package itself, where it imports.
- `dydiff-maze2d`: D4RL's point maze (`dydiff.environments.maze`).
- `gymnasium`: any other environment, as gymnasium makes it by its id (`dydiff.environments.own`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dydiff.errors import DydiffError

if TYPE_CHECKING:
    import gymnasium

MAZE_EPISODE_STEPS = {"umaze": 300, "medium": 600, "large": 800}
# Datasets of these exist and their transitions can be learned from, but no simulator of them ships here.
WITHOUT_SIMULATOR = ("antmaze-umaze", "antmaze-medium", "antmaze-large")

GYMNASIUM_V4, GYMNASIUM_V5, D4RL_COMPAT, D4RL = "gymnasium-v4", "gymnasium-v5", "d4rl-compat", "d4rl"
MAZE2D, GYMNASIUM = "dydiff-maze2d", "gymnasium"
NO_SIMULATOR = "none"  # in the place of an environment's name: data that no simulator belongs to
D4RL_LOCOMOTION = ("hopper", "halfcheetah", "walker2d", "ant")  # of these, D4RL has data
V5_OBSERVATION_DIMS = {"ant": 105, "humanoid": 348}  # where they differ from v4's
TOTAL_MASSES = {"halfcheetah": 14.0}  # kg; models whose masses are scaled to a sum


@dataclass(frozen=True)
class EnvironmentSpec:
    """One environment: its sizes and limits, known without loading a simulator."""

    name: str
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]  # [A]
    action_high: tuple[float, ...]  # [A]
    max_episode_steps: int
    position_dim: int  # size of the simulator's qpos; 0: it cannot be put into a state
    velocity_dim: int  # size of the simulator's qvel
    hidden_dim: int  # first entries of qpos that observations leave out: the root's place on the (endless) ground
    backend: str  # the simulator's name: see the module's docstring
    gym_id: str | None = None  # None: a maze of `dydiff.environments.maze`

    @property
    def is_maze(self) -> bool:
        """Whether observations are a position in a plane and its velocity, and episodes end at their time limit alone."""
        return self.name.startswith("maze2d")

    @property
    def backends(self) -> tuple[str, ...]:
        """The simulators that know this environment; `d4rl` among them whether it is installed or not."""
        if self.is_maze:
            return MAZE2D, D4RL
        if self.backend == GYMNASIUM:
            return (GYMNASIUM,)
        return (GYMNASIUM_V4, GYMNASIUM_V5, *((D4RL_COMPAT, D4RL) if self.name in D4RL_LOCOMOTION else ()))

    @property
    def mujoco_version(self) -> str:
        """The version of the MuJoCo behind this simulator ("not installed" without one)."""
        return _version_of("mujoco-py") if self.backend == D4RL else simulator_version()

    @property
    def simulator(self) -> str:
        """The simulator's name with its version, as it stands beside scores."""
        if self.backend == GYMNASIUM:
            return f"gymnasium {_version_of('gymnasium')}, MuJoCo {self.mujoco_version}"
        return f"{self.backend}, {'mujoco-py' if self.backend == D4RL else 'MuJoCo'} {self.mujoco_version}"

    def with_backend(self, backend: str) -> EnvironmentSpec:
        """Return the spec of the same environment on another simulator.

        Raises DydiffError, which names those that there are, for a backend that does not know this environment.
        """
        if backend not in self.backends:
            raise DydiffError(
                f"No simulator {backend!r} of {self.name} exists: env_specs.backend can be {', '.join(self.backends)}."
            )
        if backend == GYMNASIUM:
            return self
        spec = ENVIRONMENTS[self.name]
        if backend == D4RL:
            name = f"{self.name}-v1" if self.is_maze else f"{self.name}-medium-v2"
            return dataclasses.replace(spec, backend=backend, gym_id=name)  # only the data depend on the word "medium"
        if backend == GYMNASIUM_V5:
            width = V5_OBSERVATION_DIMS.get(self.name, spec.observation_dim)
            return dataclasses.replace(
                spec, backend=backend, gym_id=spec.gym_id.replace("-v4", "-v5"), observation_dim=width
            )
        return dataclasses.replace(spec, backend=backend)

    @property
    def has_states(self) -> bool:
        """Whether the simulator can be put into a state of one's choice."""
        return self.position_dim > 0

    def require_states(self) -> None:
        """Raise DydiffError where the simulator cannot be put into a state of one's choice."""
        if not self.has_states:
            raise DydiffError(
                f"{self.name} cannot be put into recorded states: nothing is compared with it step by step, only the returns of "
                "whole episodes. Its class can have a method set_observation(observation), which takes the state that one shows."
            )

    def make(self) -> gymnasium.Env:
        """Make the environment with its time limit; raises DydiffError where the simulator is not installed."""
        if self.backend == D4RL:
            return self._make_legacy()
        if self.backend == GYMNASIUM:
            from dydiff.environments.own import make_own

            return make_own(self.gym_id)
        try:
            return self._make_maze() if self.backend == MAZE2D else self._make_gym()
        except ImportError as error:
            raise DydiffError(
                f"The environment {self.name} needs MuJoCo and gymnasium, and importing them failed ({error}): "
                'install both with `pip install "gymnasium[mujoco]"`.'
            ) from error

    def _make_maze(self) -> gymnasium.Env:
        from gymnasium.wrappers import TimeLimit

        from dydiff.environments.maze import MazeEnvironment

        _, layout, *variant = self.name.split("-")
        return TimeLimit(MazeEnvironment(layout, dense="dense" in variant), self.max_episode_steps)

    def _make_legacy(self) -> gymnasium.Env:
        try:
            from dydiff.environments.simulators import LegacyEnvironment

            return LegacyEnvironment(self.gym_id)
        except Exception as error:  # mujoco-py raises bare exceptions where its MuJoCo or a compiler is missing
            raise DydiffError(
                f"The simulator d4rl of {self.name} cannot be used here: {type(error).__name__}: {error}. It needs the "
                "legacy packages d4rl, gym and mujoco-py with MuJoCo 2.1. Install them, or set env_specs.backend to another "
                f"one of {', '.join(self.backends)}."
            ) from error

    def _make_gym(self) -> gymnasium.Env:
        import gymnasium

        with warnings.catch_warnings(), _quiet_model_warnings():
            # gymnasium recommends v5 at every v4 task made; v4 is chosen for its reward (see above)
            warnings.simplefilter("ignore", DeprecationWarning)
            environment = gymnasium.make(self.gym_id, disable_env_checker=True)
            if self.backend == D4RL_COMPAT:
                from dydiff.environments.simulators import restore_old_physics

                inner = environment.unwrapped
                restore_old_physics(inner.model, inner.data, TOTAL_MASSES.get(self.name))
        if self.name != "ant" or self.backend == GYMNASIUM_V5:
            return environment
        space = gymnasium.spaces.Box(-np.inf, np.inf, (self.observation_dim,), np.float64)
        return gymnasium.wrappers.TransformObservation(environment, self.pad_observation, space)

    def pad_observation(self, observation: np.ndarray) -> np.ndarray:
        """Append zeros up to `observation_dim`.

        Only ant needs it: D4RL's 111 columns end in 84 contact forces, which MuJoCo 2.0 left at zero in every file.
        gymnasium's v5 fills 78 of them, so it keeps its own 105 columns.
        """
        return np.pad(observation, (0, self.observation_dim - len(observation)))


@contextmanager
def _quiet_model_warnings() -> Iterator[None]:
    """Drop MuJoCo's word on deprecated attributes in gymnasium's models.

    Nobody who reads it could act on it, and MuJoCo would leave a MUJOCO_LOG.TXT in the working folder for each.
    """
    import mujoco

    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else warnings.warn(text, stacklevel=2))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(handler)


def _gym_spec(
    name: str, gym_id: str, observation_dim: int, action_limit: tuple[float, ...], state_dims: tuple[int, int, int]
) -> EnvironmentSpec:
    low = tuple(-limit for limit in action_limit)
    return EnvironmentSpec(
        name, observation_dim, len(action_limit), low, action_limit, 1000, *state_dims, GYMNASIUM_V4, gym_id
    )


def _maze_spec(layout: str, suffix: str) -> EnvironmentSpec:
    limit = MAZE_EPISODE_STEPS[layout]
    return EnvironmentSpec(f"maze2d-{layout}{suffix}", 4, 2, (-1.0, -1.0), (1.0, 1.0), limit, 2, 2, 0, MAZE2D)


ENVIRONMENTS: dict[str, EnvironmentSpec] = {
    spec.name: spec
    for spec in (
        _gym_spec("hopper", "Hopper-v4", 11, (1.0,) * 3, (6, 6, 1)),
        _gym_spec("halfcheetah", "HalfCheetah-v4", 17, (1.0,) * 6, (9, 9, 1)),
        _gym_spec("walker2d", "Walker2d-v4", 17, (1.0,) * 6, (9, 9, 1)),
        _gym_spec("ant", "Ant-v4", 111, (1.0,) * 8, (15, 14, 2)),
        _gym_spec("humanoid", "Humanoid-v4", 376, (0.4,) * 17, (24, 23, 2)),
        _gym_spec("inverted_pendulum", "InvertedPendulum-v4", 4, (3.0,), (2, 2, 0)),
        *(_maze_spec(layout, suffix) for layout in MAZE_EPISODE_STEPS for suffix in ("", "-dense")),
    )
}


def _words(name: str) -> tuple[str, ...]:
    words = re.split(r"[-_]", name.strip().lower().replace("invertedpendulum", "inverted_pendulum"))
    return tuple(words[:-1] if re.fullmatch(r"v\d+", words[-1]) else words)


def environment_name(name: str) -> str:
    """Return the plain name of an environment that is given plainly, as a gym id or as a dataset's name.

    "Hopper-v2", "hopper-medium-expert-v2" and "hopper" are all "hopper". Raises DydiffError, which names the nearest
    known names, for anything else.
    """
    known = (*ENVIRONMENTS, *WITHOUT_SIMULATOR)
    words = _words(name)
    matches = [candidate for candidate in known if words[: len(_words(candidate))] == _words(candidate)]
    if matches:
        return max(matches, key=len)
    plain = "-".join(words)
    nearest = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    hint = f"the nearest known names are {', '.join(nearest)}" if nearest else f"known are {', '.join(known)}"
    raise DydiffError(f"The environment {name!r} is unknown: {hint}.")


def choose_environment(name: str) -> str:
    """Return `environment_name` of a name, or the name itself where it is an id of gymnasium's, or `NO_SIMULATOR`.

    Raises DydiffError, which names the nearest known names, for anything else.
    """
    try:
        return environment_name(name)
    except DydiffError as error:
        from dydiff.environments.own import is_gymnasium_id

        if name == NO_SIMULATOR or is_gymnasium_id(name):
            return name
        raise DydiffError(
            f"{error} Other environments go by their gymnasium id (module:Name-v0 imports the module first); {NO_SIMULATOR!r} "
            "stands for data without a simulator."
        ) from error


def environment_spec(name: str, backend: str | None = None) -> EnvironmentSpec:
    """Return the spec of an environment by any name that `choose_environment` accepts, on a simulator of one's choice.

    backend: one of the spec's `backends`; None: gymnasium-v4, dydiff-maze2d for a maze, gymnasium for what gymnasium makes.
    Raises DydiffError for an unknown name, for one without a simulator, and for a backend that does not know it.
    """
    plain = choose_environment(name)
    if plain in (*WITHOUT_SIMULATOR, NO_SIMULATOR):
        whose = "" if plain == NO_SIMULATOR else f" of {plain} ships with dydiff"
        raise DydiffError(
            f"No simulator{whose}: models and policies can be trained on such datasets, but "
            f"episodes cannot be run. Environments with a simulator are {', '.join(ENVIRONMENTS)}."
        )
    if plain in ENVIRONMENTS:
        spec = ENVIRONMENTS[plain]
    else:
        from dydiff.environments.own import own_spec

        spec = own_spec(plain)
    return spec if backend is None else spec.with_backend(backend)


def simulator_version() -> str:
    """Return the version of the installed MuJoCo ("not installed" without one), to be stored beside every score."""
    return _version_of("mujoco")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
