"""The environments that dydiff can simulate: names, sizes, limits, and how to make one.

Importing this module loads no simulator: `EnvironmentSpec.make` does.
Rewards follow the gym v2 tasks that D4RL was recorded with; gymnasium's v4 tasks compute the same reward, its v5 tasks
do not (no healthy reward on the last step, other foot friction in walker2d). The physics are those of the installed
MuJoCo, which are not D4RL's: keep `EnvironmentSpec.backend` and `simulator_version()` beside every score.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class EnvironmentSpec:
    """One environment: its sizes and limits, known without loading a simulator."""

    name: str
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]  # [A]
    action_high: tuple[float, ...]  # [A]
    max_episode_steps: int
    position_dim: int  # size of the simulator's qpos
    velocity_dim: int  # size of the simulator's qvel
    hidden_dim: int  # first entries of qpos that observations leave out: the root's place on the (endless) ground
    backend: str  # which simulator computes the rewards: "gymnasium-v4" or "dydiff-maze2d"
    gym_id: str | None = None

    def make(self) -> gymnasium.Env:
        """Make the environment with its time limit; raises DydiffError where the simulator is not installed."""
        try:
            if self.gym_id is None:
                return self._make_maze()
            return self._make_gym()
        except ImportError as error:
            raise DydiffError(
                f"The environment {self.name} needs MuJoCo and gymnasium, and importing them failed ({error}): "
                'install both with `pip install "gymnasium[mujoco]"`.'
            ) from error

    def _make_maze(self) -> gymnasium.Env:
        from gymnasium.wrappers import TimeLimit

        from dydiff.maze import MazeEnvironment

        _, layout, *variant = self.name.split("-")
        return TimeLimit(MazeEnvironment(layout, dense="dense" in variant), self.max_episode_steps)

    def _make_gym(self) -> gymnasium.Env:
        import gymnasium

        with warnings.catch_warnings(), _quiet_model_warnings():
            # gymnasium recommends v5 at every v4 task made; v4 is chosen for its reward (see above)
            warnings.simplefilter("ignore", DeprecationWarning)
            environment = gymnasium.make(self.gym_id, disable_env_checker=True)
        if self.name != "ant":
            return environment
        space = gymnasium.spaces.Box(-np.inf, np.inf, (self.observation_dim,), np.float64)
        return gymnasium.wrappers.TransformObservation(environment, self.pad_observation, space)

    def pad_observation(self, observation: np.ndarray) -> np.ndarray:
        """Append zeros up to `observation_dim`.

        Only ant needs it: D4RL's 111 columns end in 84 contact forces, which MuJoCo 2.0 left at zero in every file.
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
        name, observation_dim, len(action_limit), low, action_limit, 1000, *state_dims, "gymnasium-v4", gym_id
    )


def _maze_spec(layout: str, suffix: str) -> EnvironmentSpec:
    limit = MAZE_EPISODE_STEPS[layout]
    return EnvironmentSpec(f"maze2d-{layout}{suffix}", 4, 2, (-1.0, -1.0), (1.0, 1.0), limit, 2, 2, 0, "dydiff-maze2d")


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


def environment_spec(name: str) -> EnvironmentSpec:
    """Return the spec of an environment by any name that `environment_name` accepts; raises DydiffError otherwise."""
    plain = environment_name(name)
    if plain in WITHOUT_SIMULATOR:
        raise DydiffError(
            f"No simulator of {plain} ships with dydiff: models and policies can be trained on its datasets, but "
            f"episodes cannot be run. Environments with a simulator are {', '.join(ENVIRONMENTS)}."
        )
    return ENVIRONMENTS[plain]


def simulator_version() -> str:
    """Return the version of the installed MuJoCo ("not installed" without one), to be stored beside every score."""
    try:
        return importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
