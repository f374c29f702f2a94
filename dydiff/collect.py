"""Datasets made on this machine in D4RL's format: maze2d by D4RL's published recipe, locomotion with random actions.

They are recorded with the installed MuJoCo, and their names end in "-local" so that nobody mistakes them for D4RL's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from dydiff.data import COLLECTOR, dataset_path, write_dataset
from dydiff.environments import EnvironmentSpec, environment_spec, simulator_version
from dydiff.errors import DydiffError

LOCAL_DATASETS = {
    **{f"maze2d-{layout}-local": f"maze2d-{layout}" for layout in ("umaze", "medium", "large")},
    **{f"{environment}-random-local": environment for environment in ("hopper", "halfcheetah", "walker2d")},
}
ACTION_NOISE = 0.5
RECIPES = {
    "dydiff-maze2d": "one continuous trajectory of D4RL's waypoint controller (Q-iteration, PD law) towards random "
    f"cells, actions plus N(0, {ACTION_NOISE}^2); timeouts mark reached or abandoned targets; the sparse reward of a "
    "row belongs to its observation and to the layout's fixed goal",
    "gymnasium-v4": "episodes of uniform random actions; the end of the file counts as a timeout",
}


def collect(name: str, steps: int, seed: int, path: str | Path | None = None, progress: bool = True) -> Path:
    """Record `steps` rows of a local dataset and write them as a D4RL file.

    name: one of LOCAL_DATASETS. path: where to write; by default where `load_dataset(name)` looks. The arrays depend on
    `name`, `steps`, `seed` and the simulator's version alone. Returns the path.
    Raises DydiffError for an unknown name, for `steps` < 2 and where MuJoCo is missing.
    Source: for maze2d, D4RL (arXiv 2004.07219) and its published generation scripts.
    """
    spec = _spec_of(name)
    arrays = collect_arrays(name, steps, seed, progress)
    metadata = {
        "source": COLLECTOR,
        "environment": spec.name,
        "backend": spec.backend,
        "mujoco_version": simulator_version(),
        "seed": seed,
        "steps": steps,
        "recipe": RECIPES[spec.backend],
    }
    return write_dataset(dataset_path(name) if path is None else path, arrays, metadata)


def collect_arrays(name: str, steps: int, seed: int, progress: bool = False) -> dict[str, np.ndarray]:
    """Record the arrays of a local dataset, by their keys in a D4RL file; see `collect`."""
    spec = _spec_of(name)
    if steps < 2:
        raise DydiffError(f"Collecting {name} needs at least 2 steps (one transition); {steps} were asked for.")
    record = _record_maze if spec.gym_id is None else _record_random
    with tqdm(total=steps, desc=name, unit="row", unit_scale=True, disable=not progress) as bar:
        return record(spec, steps, seed, bar)


def _spec_of(name: str) -> EnvironmentSpec:
    if name not in LOCAL_DATASETS:
        raise DydiffError(
            f"No recipe makes a dataset named {name!r}: choose one of those that exist, {', '.join(LOCAL_DATASETS)}."
        )
    return environment_spec(LOCAL_DATASETS[name])


def _record_maze(spec: EnvironmentSpec, steps: int, seed: int, bar: tqdm) -> dict[str, np.ndarray]:
    environment = spec.make().unwrapped
    from dydiff.maze import WaypointController, free_cells, maze_reward  # needs MuJoCo, which `make` has checked

    generator = np.random.default_rng(seed)
    controller = WaypointController(environment.layout, generator)
    cells = free_cells(environment.layout)
    observations, qpos_qvel = np.empty((2, steps, 4))
    actions, goals = np.empty((steps, 2), np.float32), np.empty((steps, 2), np.float32)
    timeouts = np.zeros(steps, bool)
    noise = generator.normal(0.0, ACTION_NOISE, (steps, 2))

    def draw_goal() -> np.ndarray:
        cell = cells[generator.integers(len(cells))]
        controller.set_target(observation[:2], cell)
        return cell + generator.uniform(-0.1, 0.1, 2)

    observation, _ = environment.reset(seed=int(generator.integers(2**31)))
    state = observation
    goal = draw_goal()
    age = 0
    for row in range(steps):
        action, done = controller.act(observation)
        actions[row] = np.clip(action + noise[row], -1.0, 1.0)
        timeouts[row] = done = done or age >= spec.max_episode_steps
        observations[row], qpos_qvel[row], goals[row] = observation, state, goal
        state = environment.step(actions[row])[0]
        if done:
            # D4RL's script keeps the old observation here: a segment's first row repeats the last of the one before.
            goal = draw_goal()
            age = 0
        else:
            observation = state
            age += 1
        if row % 1000 == 999:
            bar.update(1000)
    environment.close()
    bar.update(steps - bar.n)
    observations = observations.astype(np.float32)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": maze_reward(*observations[:, :2].T, environment.goal, environment.dense).astype(np.float32),
        "terminals": np.zeros(steps, bool),
        "timeouts": timeouts,
        "infos/goal": goals,
        "infos/qpos": qpos_qvel[:, :2],
        "infos/qvel": qpos_qvel[:, 2:],
    }


def _record_random(spec: EnvironmentSpec, steps: int, seed: int, bar: tqdm) -> dict[str, np.ndarray]:
    environment = spec.make()
    simulation = environment.unwrapped.data
    generator = np.random.default_rng(seed)
    actions = generator.uniform(spec.action_low, spec.action_high, (steps, spec.action_dim)).astype(np.float32)
    observations, next_observations = np.empty((2, steps, spec.observation_dim), np.float32)
    qpos, qvel = np.empty((steps, simulation.qpos.size)), np.empty((steps, simulation.qvel.size))
    rewards = np.empty(steps, np.float32)
    terminals, timeouts = np.zeros((2, steps), bool)
    observation, _ = environment.reset(seed=int(generator.integers(2**31)))
    for row in range(steps):
        observations[row], qpos[row], qvel[row] = observation, simulation.qpos, simulation.qvel
        observation, rewards[row], terminals[row], timeouts[row], _ = environment.step(actions[row])
        next_observations[row] = observation
        if terminals[row] or timeouts[row]:
            observation, _ = environment.reset()
        if row % 1000 == 999:
            bar.update(1000)
    environment.close()
    bar.update(steps - bar.n)
    timeouts[-1] = True
    timeouts &= ~terminals  # D4RL's files mark an episode's end once
    return {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": rewards,
        "terminals": terminals,
        "timeouts": timeouts,
        "infos/qpos": qpos,
        "infos/qvel": qvel,
    }
