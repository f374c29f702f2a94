"""The true simulator, many at a time: evaluation runs episodes on it, and model rollouts are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dydiff.environments import GYMNASIUM, EnvironmentSpec
from dydiff.errors import DydiffError

CUT_VELOCITY = 10.0  # what hopper's and walker2d's observations cut velocities off at
Act = Callable[[np.ndarray], np.ndarray]  # raw observations [n, O] float32 -> raw actions [n, A]


class SimulatedTrajectories(NamedTuple):
    """B trajectories of H rows in raw space; row h holds an observation, the action there, and what that step gave."""

    observation: np.ndarray  # [B, H, O] float32
    action: np.ndarray  # [B, H, A] float32
    reward: np.ndarray  # [B, H] float32
    terminal: np.ndarray  # [B, H] bool: the step from row h ended the episode; the simulator is stepped on regardless


class SimulatorBatch:
    """`size` environments of one kind in this process, made once and reused.

    On few cores this beats worker processes: the policy is called once for all of them, and nothing crosses a pipe.
    """

    def __init__(self, spec: EnvironmentSpec, size: int):
        self.spec = spec
        self.size = size
        self._environments = [spec.make() for _ in range(size)]
        self._origins = [""] * size

    def reset(self, index: int, seed: int) -> np.ndarray:
        """Start an episode in one environment and return its observation [O]."""
        self._origins[index] = f"seed {seed}"
        try:
            return self._environments[index].reset(seed=seed)[0]
        except Exception as error:
            raise self._failure(index, "resetting", error) from error

    def set_state(self, index: int, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Put one environment into a state (`qpos` [nq], `qvel` [nv]) and return its observation [O]."""
        self.reset(index, seed=0)  # the wrappers want one, and it clears the solver's warm start
        self._origins[index] = f"the start state qpos {np.round(qpos, 4).tolist()}"
        environment = self._environments[index].unwrapped
        try:
            if self.spec.backend == GYMNASIUM:
                environment.set_observation(qpos)
                return qpos
            environment.set_state(qpos, qvel)
            return self.spec.pad_observation(environment._get_obs())
        except Exception as error:
            raise self._failure(index, "setting the state of", error) from error

    def step(self, index: int, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Step one environment with a raw action [A]; returns observation [O], reward, terminated, truncated."""
        try:
            return self._environments[index].step(action)[:4]
        except Exception as error:
            raise self._failure(index, "stepping", error) from error

    def state(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the state that one environment is in, qpos [nq] and qvel [nv]: views, which the next step overwrites."""
        data = self._environments[index].unwrapped.data
        return data.qpos, data.qvel

    def choose(self, act: Act, observation: np.ndarray) -> np.ndarray:
        """Return the policy's actions [n, A] float32 at observations [n, O]; raises DydiffError for unusable ones."""
        action = np.asarray(act(observation), np.float32)
        expected = (len(observation), self.spec.action_dim)
        if action.shape != expected:
            raise DydiffError(
                f"The policy returned actions of shape {action.shape} for {self.spec.name}, not {expected}: it was "
                "made for another environment."
            )
        if not np.isfinite(action).all():
            culprit = int(np.flatnonzero(~np.isfinite(action).all(1))[0])
            raise DydiffError(
                f"The policy returned a non-finite action in {self.spec.name} (episode of {self._origins[culprit]}): "
                "its weights have diverged. Go back to an earlier checkpoint, or lower the learning rate."
            )
        return action

    def close(self) -> None:
        for environment in self._environments:
            environment.close()

    def __enter__(self) -> SimulatorBatch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _failure(self, index: int, doing: str, error: Exception) -> DydiffError:
        return DydiffError(
            f"The simulator failed while {doing} {self.spec.name} ({self.spec.backend}, {self._origins[index]}): "
            f"{type(error).__name__}: {error}"
        )


@lru_cache(maxsize=1)
def shared_simulators(spec: EnvironmentSpec, size: int) -> SimulatorBatch:
    """The batch that this process used last, if it fits: loading the models takes longer than a short episode does."""
    return SimulatorBatch(spec, size)


def state_from_observation(spec: EnvironmentSpec, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the simulator states (qpos [B, nq], qvel [B, nv]) behind raw observations [B, O].

    Exact up to float32 but for velocities beyond 10 in hopper and walker2d, which those observations cut off: where a
    dataset holds `infos/qpos` and `infos/qvel`, take these. The root is put at the origin of the ground, which changes
    no dynamics.
    """
    observation = np.asarray(observation, np.float64)
    visible = spec.position_dim - spec.hidden_dim
    origin = np.zeros((len(observation), spec.hidden_dim))
    qpos = np.concatenate((origin, observation[:, :visible]), axis=1)
    return qpos, observation[:, visible : visible + spec.velocity_dim]


def roll_out_simulator(
    spec: EnvironmentSpec,
    qpos: np.ndarray,
    qvel: np.ndarray,
    horizon: int,
    act: Act | None = None,
    actions: np.ndarray | None = None,
    num_environments: int = 64,
) -> SimulatedTrajectories:
    """Step the true simulator `horizon` times from B given states, with a policy (closed loop) or given actions.

    qpos [B, nq], qvel [B, nv]: start states. act: the policy in raw space, called with `num_environments` rows at most.
    actions [B, horizon, A]: raw actions to replay instead. Exactly one of the two must be given.
    Raises DydiffError for a simulator without states, for shapes that do not fit, for non-finite actions, and for what the
    simulator raises.
    """
    spec.require_states()
    if (act is None) == (actions is None):
        raise DydiffError("roll_out_simulator needs either a policy (act) or actions to replay (actions), not both.")
    qpos, qvel = np.asarray(qpos, np.float64), np.asarray(qvel, np.float64)
    count = len(qpos)
    expected = {"qpos": (count, spec.position_dim), "qvel": (count, spec.velocity_dim)}
    given = {"qpos": qpos.shape, "qvel": qvel.shape}
    if actions is not None:
        actions = np.asarray(actions, np.float32)
        expected["actions"], given["actions"] = (count, horizon, spec.action_dim), actions.shape
    for name, shape in expected.items():
        if given[name] != shape:
            raise DydiffError(f"Rolling out {spec.name} from {count} states needs {name} of shape {shape}, not {given[name]}.")

    result = SimulatedTrajectories(
        observation=np.empty((count, horizon, spec.observation_dim), np.float32),
        action=np.empty((count, horizon, spec.action_dim), np.float32),
        reward=np.empty((count, horizon), np.float32),
        terminal=np.empty((count, horizon), bool),
    )
    simulators = shared_simulators(spec, min(num_environments, count))
    for first in range(0, count, num_environments):
        block = range(count)[first : first + num_environments]
        observation = np.stack([simulators.set_state(i, qpos[row], qvel[row]) for i, row in enumerate(block)])
        for h in range(horizon):
            result.observation[block, h] = observation
            if act is None:
                action = actions[block, h]
            else:
                action = simulators.choose(act, observation.astype(np.float32))
            result.action[block, h] = action
            for i, row in enumerate(block):
                observation[i], result.reward[row, h], result.terminal[row, h], _ = simulators.step(i, action[i])
    return result
