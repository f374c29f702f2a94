"""Which simulator made a dataset: its steps are taken again on each, and how far they part is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dydiff.data import RawDataset
from dydiff.environments import D4RL, ENVIRONMENTS, MAZE2D, WITHOUT_SIMULATOR, EnvironmentSpec, choose_environment, environment_spec
from dydiff.environments.simulate import CUT_VELOCITY, state_from_observation
from dydiff.errors import DydiffError

TERMINAL_SHARE = 0.1  # of the rows are steps that ended an episode: rewards of simulators differ there
ENDS = ("terminals", "timeouts")
COLUMNS = {"state: median": 15, "90 %": 10, "max": 10, "reward: mean": 15, "max ": 10}  # of the table, with their widths
REPRODUCED = 1e-3  # state error; float32 files have 1e-6, another MuJoCo 1e-2


@dataclass(frozen=True)
class StepErrors:
    """The errors of one simulator over single steps; absolute, the largest over the columns of a step."""

    simulator: str
    state: np.ndarray  # [n] of qpos and qvel, or of the observation's share of them; steps that ended no episode
    reward: np.ndarray  # [m]
    failure: str = ""  # why there are none


@dataclass(frozen=True)
class Steps:
    """Steps of a dataset that can be taken again."""

    qpos: np.ndarray  # [n, nq]
    qvel: np.ndarray  # [n, nv]
    action: np.ndarray  # [n, A]
    following: np.ndarray  # [n, nq + nv], NaN where the dataset does not tell
    reward: np.ndarray  # [n]
    is_exact: bool  # states are the file's own, not derived from observations


def check_dynamics(raw: RawDataset, environment: str, rows: int, seed: int) -> tuple[Steps, list[StepErrors]]:
    """Take up to `rows` random steps of a dataset again on every simulator of its environment.

    Raises DydiffError where the environment has none of dydiff's simulators, or the arrays do not fit it.
    """
    name = choose_environment(environment)
    if name not in (*ENVIRONMENTS, *WITHOUT_SIMULATOR):  # a file may say so, and would have its module imported
        raise DydiffError(f"{name} has at most one simulator, its own: only those of dydiff's environments are compared here.")
    spec = environment_spec(name)
    steps = choose_steps(raw, spec, rows, np.random.default_rng(seed))
    return steps, [_measure(spec.with_backend(backend), steps) for backend in spec.backends]


def choose_steps(raw: RawDataset, spec: EnvironmentSpec, rows: int, generator: np.random.Generator) -> Steps:
    """Choose random steps, and find the states before and behind them."""
    arrays = raw.arrays
    count = len(arrays["observations"])
    terminals, timeouts = (arrays[key].reshape(count) != 0 if key in arrays else np.zeros(count, bool) for key in ENDS)
    exact = "infos/qpos" in arrays and "infos/qvel" in arrays
    if exact:
        qpos, qvel = (np.asarray(arrays[key], np.float64) for key in ("infos/qpos", "infos/qvel"))
    else:
        qpos, qvel = state_from_observation(spec, arrays["observations"])
    found = (qpos.shape, qvel.shape, arrays["actions"].shape)
    expected = ((count, spec.position_dim), (count, spec.velocity_dim), (count, spec.action_dim))
    if found != expected:
        raise DydiffError(
            f"Dataset {raw.name!r} has positions, velocities and actions of shapes {found}, but {spec.name} needs {expected}."
        )
    candidates = np.flatnonzero(~timeouts[:-1])
    if not exact:  # an observed velocity at the cut does not tell its state
        known = (np.abs(qvel) != CUT_VELOCITY).all(axis=1)
        candidates = candidates[known[candidates] & (known[candidates + 1] | terminals[candidates])]
    ending = candidates[terminals[candidates]]
    ending = generator.permutation(ending)[: int(rows * TERMINAL_SHARE)]
    others = candidates[~terminals[candidates]]
    if len(others) == 0:
        raise DydiffError(f"Dataset {raw.name!r} has no step within an episode that could be taken again.")
    chosen = np.concatenate([generator.permutation(others)[: rows - len(ending)], ending])
    following = np.concatenate([qpos, qvel], axis=1)[chosen + 1]
    following[terminals[chosen]] = np.nan
    # In D4RL's maze files a row's reward belongs to the row's observation: what this step earned is in the next row.
    reward = arrays["rewards"].reshape(count).astype(np.float64)[chosen + (spec.backend == MAZE2D)]
    return Steps(qpos[chosen], qvel[chosen], np.asarray(arrays["actions"], np.float64)[chosen], following, reward, exact)


def _measure(spec: EnvironmentSpec, steps: Steps) -> StepErrors:
    try:
        environment = spec.make()
    except DydiffError as error:
        if spec.backend != D4RL:
            raise
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
        return StepErrors(spec.simulator, np.empty(0), np.empty(0), cause)
    inner = environment.unwrapped
    following, reward = np.empty_like(steps.following), np.empty_like(steps.reward)
    for row in range(len(steps.reward)):
        environment.reset(seed=0)  # the wrappers want one, and it clears the solver's warm start
        inner.set_state(steps.qpos[row], steps.qvel[row])
        reward[row] = environment.step(steps.action[row])[1]
        following[row] = np.concatenate((inner.data.qpos, inner.data.qvel))
    environment.close()
    # Where states come from observations: these do not tell where the root is, and cut velocities off.
    first, limit = (0, np.inf) if steps.is_exact else (spec.hidden_dim, CUT_VELOCITY)
    following[:, spec.position_dim :] = following[:, spec.position_dim :].clip(-limit, limit)
    state = np.abs(following - steps.following)[:, first:].max(axis=1)
    return StepErrors(spec.simulator, state[~np.isnan(state)], np.abs(reward - steps.reward))


def find_closest(errors: list[StepErrors]) -> StepErrors:
    """Return the simulator whose physics are the closest, and among equals (v4, v5) the one whose rewards are."""
    measured = [each for each in errors if len(each.state)]
    best = min(np.quantile(each.state, 0.9) for each in measured)
    return min(measured, key=lambda each: (np.quantile(each.state, 0.9) > 1.5 * best, each.reward.mean()))


def describe(errors: list[StepErrors], steps: Steps) -> str:
    """The errors as a table."""
    source = "the file's infos/qpos and infos/qvel" if steps.is_exact else "its observations (no infos/qpos, infos/qvel)"
    lines = [
        f"{len(steps.reward):,} single steps from {source}: absolute errors",
        f"{'simulator':36}" + "".join(f"{name.strip():>{width}}" for name, width in COLUMNS.items()),
    ]
    for each in errors:
        if each.failure:
            lines.append(f"{each.simulator:36}not available: {each.failure}")
            continue
        state = [np.median(each.state), np.quantile(each.state, 0.9), each.state.max()]
        reward = [each.reward.mean(), each.reward.max()]
        figures = [f"{value:.1e}" for value in (*state, *reward)]
        cells = (f"{text:>{width}}" for text, width in zip(figures, COLUMNS.values(), strict=True))
        lines.append(f"{each.simulator:36}" + "".join(cells))
    closest = find_closest(errors)
    doubt = ", which does not reproduce the data either" if np.quantile(closest.state, 0.9) > REPRODUCED else ""
    lines.append(f"closest: {closest.simulator}{doubt}")
    return "\n".join(lines)
