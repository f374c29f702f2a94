"""The simulators that D4RL (arXiv 2004.07219) was recorded with: its physics put back into today's MuJoCo, or D4RL itself.

D4RL used MuJoCo 2.1.0 or older. Two changes since then move its tasks' rewards: 2.1.1 made capsules exact (before, a capsule
weighed and turned as the cylinder that is one radius longer than its straight part), and 3.5 adds up the contact margins of
two geoms where it had taken the larger one.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np


def restore_old_physics(model: mujoco.MjModel, data: mujoco.MjData, total_mass: float | None = None) -> None:
    """Change a model of spheres and capsules, in place, so that it moves as it did on MuJoCo 2.1.0.

    `data` belongs to the model and is left at its rest state. `total_mass`: what the masses are scaled to, for a model that
    asks for that (kg). All geoms of the model must have the same contact margin, and those of one body the same density.
    """
    version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
    if version >= (3, 5):
        model.geom_margin[:] *= 0.5
    for body in range(1, model.nbody):
        _weigh_body(model, body)
    mujoco.mj_setConst(model, data)
    if total_mass is not None:
        mujoco.mj_setTotalmass(model, total_mass)
        mujoco.mj_setConst(model, data)
    mujoco.mj_resetData(model, data)


def _weigh_body(model: mujoco.MjModel, body: int) -> None:
    """Set a body's mass, centre and inertia to those of its geoms with the old capsules."""
    geoms = range(model.body_geomadr[body], model.body_geomadr[body] + model.body_geomnum[body])
    volumes = [_geom_volumes(model, geom) for geom in geoms]
    density = model.body_mass[body] / sum(new for _, new in volumes)
    masses = np.array([density * old for old, _ in volumes])  # [geoms]
    inertias = [_geom_inertia(model, geom, mass) for geom, mass in zip(geoms, masses, strict=True)]
    model.body_mass[body] = masses.sum()
    if len(geoms) == 1:  # the body's inertial frame is the geom's own
        model.body_inertia[body] = inertias[0]
        return
    positions = model.geom_pos[list(geoms)]  # [geoms, 3]
    centre = masses @ positions / masses.sum()
    total = np.zeros((3, 3))
    for geom, mass, inertia, offset in zip(geoms, masses, inertias, positions - centre, strict=True):
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
        rotation = rotation.reshape(3, 3)
        total += rotation @ np.diag(inertia) @ rotation.T + mass * (offset @ offset * np.eye(3) - np.outer(offset, offset))
    mujoco.mju_eig3(model.body_inertia[body], np.empty(9), model.body_iquat[body], total.ravel())
    model.body_ipos[body] = centre


def _geom_volumes(model: mujoco.MjModel, geom: int) -> tuple[float, float]:
    """Return a geom's volume (m^3) as MuJoCo 2.1.0 took it, and the exact one."""
    radius, half = model.geom_size[geom, :2]
    sphere = 4 / 3 * np.pi * radius**3
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE:
        return sphere, sphere
    return np.pi * radius**2 * (2 * half + radius), np.pi * radius**2 * 2 * half + sphere


def _geom_inertia(model: mujoco.MjModel, geom: int, mass: float) -> np.ndarray:
    """Return the moments of inertia [3] (kg m^2) of a geom about its own axes, as MuJoCo 2.1.0 took them."""
    radius, half = model.geom_size[geom, :2]
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE:
        return np.full(3, 0.4 * mass * radius**2)
    across = mass * (3 * radius**2 + (2 * half + radius) ** 2) / 12
    return np.array([across, across, mass * radius**2 / 2])


class LegacyEnvironment(gymnasium.Env):
    """An environment of the `d4rl` package (old gym, mujoco-py) behind today's interface.

    Raises ImportError where d4rl or gym is missing; importing them may raise anything else where their MuJoCo is.
    """

    metadata = {"render_modes": []}

    def __init__(self, gym_id: str):
        import d4rl  # noqa: F401 - importing it registers its environments
        import gym

        self._environment = gym.make(gym_id)
        self._inner = self._environment.unwrapped
        self.observation_space = _to_box(self._environment.observation_space)
        self.action_space = _to_box(self._environment.action_space)

    @property
    def data(self) -> Any:
        """The simulator's state, with `qpos` and `qvel`."""
        return self._inner.sim.data

    @property
    def model(self) -> Any:
        """The simulator's model, with `nq` and `nv`."""
        return self._inner.sim.model

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self._environment.seed(seed)
        return self._environment.reset(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, done, info = self._environment.step(action)
        truncated = bool(info.get("TimeLimit.truncated", False))
        return observation, reward, done and not truncated, truncated, info

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put the simulator into a state: `qpos` [nq], `qvel` [nv]."""
        self._inner.set_state(qpos, qvel)

    def close(self) -> None:
        self._environment.close()

    def _get_obs(self) -> np.ndarray:
        return self._inner._get_obs()


def _to_box(space: Any) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(space.low, space.high, dtype=space.low.dtype.type)
