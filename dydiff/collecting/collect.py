"""Datasets made on this machine in D4RL's format: maze2d by D4RL's published recipe, locomotion with the shipped policies.

They are recorded with the installed MuJoCo, and their names end in "-local" so that nobody mistakes them for D4RL's.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dydiff.collecting.behaviour import TanhGaussian, UniformPolicy, shipped_policies
from dydiff.collecting.episodes import Part, Rows, record_parts
from dydiff.data import COLLECTOR, check_writable, dataset_path, write_dataset
from dydiff.data.d4rl import LOCAL_DATASETS, LOCAL_LOCOMOTION, LOCAL_SUFFIX
from dydiff.data.files import METADATA, Scalar, read_file
from dydiff.data.writer import check_suffix
from dydiff.environments import EnvironmentSpec, environment_spec, simulator_version
from dydiff.errors import DydiffError

# The shipped policies that make a dataset, in the order of its rows.
POLICIES = {
    "random": (),
    "medium": ("medium",),
    "medium-replay": ("replay-*", "medium"),  # what was seen on the way to medium
    "medium-expert": ("medium", "expert"),
    "expert": ("expert",),
}
ACTION_NOISE = 0.5
ROWS_PER_PROCESS = 20_000  # fewer are recorded before a process has started
MAZE_RECIPE = (
    "one continuous trajectory of D4RL's waypoint controller (Q-iteration, PD law) towards random "
    f"cells, actions plus N(0, {ACTION_NOISE}^2); timeouts mark reached or abandoned targets; the sparse reward of a "
    "row belongs to its observation and to the layout's fixed goal"
)


def collect(
    name: str,
    steps: int,
    seed: int,
    path: str | Path | None = None,
    progress: bool = True,
    processes: int | None = 1,
    force: bool = False,
) -> Path:
    """Record `steps` rows of a local dataset and write them as a D4RL file.

    name: one of `d4rl.LOCAL_DATASETS`. path: where to write; by default where `load_dataset(name)` looks. processes: that record
    locomotion; None: as many as there are cores. More than one must be asked for under `if __name__ == "__main__":`, as
    always with multiprocessing. On one machine the arrays depend on `name`, `steps` and `seed` alone. force: replace a file that
    is there; without it, one that says that it is this very collection stays and is enough. Returns the path.
    Raises DydiffError for an unknown name, for `steps` < 2, a negative seed, where MuJoCo is missing, and, before anything is
    recorded, where another file is there or none can be written.
    Source: for maze2d, D4RL (arXiv 2004.07219) and its published generation scripts.
    """
    spec = _spec_of(name)
    _check_size(name, steps, seed)
    path = check_suffix(dataset_path(name) if path is None else path)
    policies = _policies_of(name)
    metadata = _describe(spec, policies, steps, seed)
    if path.is_file() and not force:
        _check_same(path, metadata)
        print(f"Already there, with {steps:,} steps and seed {seed}: nothing is collected.")
        return path
    check_writable(path)
    arrays = collect_arrays(name, steps, seed, progress, processes)
    if len(policies) == 1:  # D4RL has a place for one
        arrays |= {f"{METADATA}policy/{key}": values for key, values in policies[0].weights.items()}
    return write_dataset(path, arrays, metadata)


def _describe(spec: EnvironmentSpec, policies: list[TanhGaussian], steps: int, seed: int) -> dict[str, Scalar]:
    """A collection's metadata: all that its arrays depend on."""
    metadata: dict[str, Scalar] = {
        "source": COLLECTOR,
        "environment": spec.name,
        "backend": spec.backend,
        "mujoco_version": simulator_version(),
        "seed": seed,
        "steps": steps,
        "recipe": _describe_recipe(spec, len(policies)),
    }
    if policies:
        rows = _share(steps, len(policies))
        facts = [{"rows": count, **policy.facts} for count, policy in zip(rows, policies, strict=True)]
        metadata["policies"] = json.dumps(facts)
    if len(policies) == 1:  # by D4RL's names
        metadata |= {"policy/nonlinearity": "tanh", "policy/output_distribution": "tanh_gaussian"}
    return metadata


def _check_same(path: Path, metadata: dict[str, Scalar]) -> None:
    """Refuse to replace a file that does not say that it is the collection of this metadata."""
    try:
        found = read_file(path, ())[1]
    except DydiffError:  # damaged, or no dataset at all
        found = {}
    different = [key for key, value in metadata.items() if found.get(key) != value]
    if different:
        told = [f"{key} ({found.get(key)}, not {metadata[key]})" if key in ("steps", "seed") else key for key in different]
        which = "by something else" if "source" in different else f"with another {', '.join(told)}"
        raise DydiffError(f"{str(path)!r} exists, made {which}. Give another --path, or --force to replace it.")


def collect_arrays(name: str, steps: int, seed: int, progress: bool = False, processes: int | None = 1) -> Rows:
    """Record the arrays of a local dataset, by their keys in a D4RL file; see `collect`."""
    spec = _spec_of(name)
    _check_size(name, steps, seed)
    with tqdm(total=steps, desc=name, unit="row", unit_scale=True, disable=not progress) as bar:
        if spec.gym_id is None:
            return _record_maze(spec, steps, seed, bar)
        policies = _policies_of(name) or [UniformPolicy(spec.action_low, spec.action_high)]
        shares = zip(policies, _share(steps, len(policies)), strict=True)
        parts = [Part(policy, rows) for policy, rows in shares if rows]
        if processes is None:
            processes = min(len(os.sched_getaffinity(0)), math.ceil(steps / ROWS_PER_PROCESS))
        return record_parts(spec, parts, seed, processes, bar)


def _check_size(name: str, steps: int, seed: int) -> None:
    if steps < 2:
        raise DydiffError(f"Collecting {name} needs at least 2 steps (one transition); {steps} were asked for.")
    if seed < 0:
        raise DydiffError(f"Collecting {name} needs a seed of at least 0, not {seed}.")


def _policies_of(name: str) -> list[TanhGaussian]:
    """The shipped policies that make a dataset, in the order of its rows; none for random actions and mazes."""
    environment, _, quality = name.removesuffix(LOCAL_SUFFIX).partition("-")
    roles = POLICIES.get(quality, ()) if environment in LOCAL_LOCOMOTION else ()
    return [policy for role in roles for policy in shipped_policies(environment, role)]


def _share(steps: int, count: int) -> list[int]:
    """Divide `steps` rows into `count` nearly equal runs."""
    return [steps * (index + 1) // count - steps * index // count for index in range(count)]


def _describe_recipe(spec: EnvironmentSpec, policies: int) -> str:
    if spec.gym_id is None:
        return MAZE_RECIPE
    actions = {0: "uniform random actions", 1: "the policy that stands under metadata/policy"}
    by = actions.get(policies, f"{policies} policies in turn, which metadata/policies describes")
    return f"whole episodes of {by}, actions drawn; the last row of each policy counts as a timeout"


def _spec_of(name: str) -> EnvironmentSpec:
    if name not in LOCAL_DATASETS:
        nearest = difflib.get_close_matches(name, LOCAL_DATASETS, n=3, cutoff=0.5) or LOCAL_DATASETS
        remedy = f"choose one of those that exist, such as {', '.join(nearest)}; `dydiff data list local` shows all"
        raise DydiffError(f"No recipe makes a dataset named {name!r}: {remedy}.")
    return environment_spec(LOCAL_DATASETS[name])


def _record_maze(spec: EnvironmentSpec, steps: int, seed: int, bar: tqdm) -> dict[str, np.ndarray]:
    environment = spec.make().unwrapped
    from dydiff.environments.maze import WaypointController, free_cells, maze_reward  # needs MuJoCo, which `make` has checked

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
