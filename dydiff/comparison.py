"""Models against the simulator: one policy rolled out in all of them from the same states, and how far they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dydiff.data import Spaces
from dydiff.environments import EnvironmentSpec
from dydiff.models import Policy
from dydiff.problem import Problem
from dydiff.rollout import RolloutEngine
from dydiff.simulate import roll_out_simulator, state_from_observation

NO_MOTION, SINGLE_STEP, DYDIFF = "no motion", "single-step", "DyDiff"


@dataclass
class Comparison:
    """The same policy, closed loop, in the simulator and in each model, from the same B start states."""

    simulated: np.ndarray  # [B, H, O] raw
    alive: np.ndarray  # [B, H] bool: the simulator's episode had not ended before this row
    modelled: dict[str, np.ndarray]  # by model, [B, H, O] raw

    def deviations(self, spec: EnvironmentSpec, spaces: Spaces) -> dict[str, dict[str, np.ndarray]]:
        """Distance from the simulator [B, H], by quantity and model.

        `state`: root mean square over the z-scored columns. `position` (mazes, where it has one unit): distance in metres.
        """
        difference = {name: observation - self.simulated for name, observation in self.modelled.items()}  # [B, H, O]
        scale = spaces.z_score.inverse_std.cpu().numpy()
        deviations = {"state": {name: np.sqrt(np.square(d * scale).mean(axis=-1)) for name, d in difference.items()}}
        if is_maze(spec):
            deviations["position"] = {name: np.linalg.norm(d[..., :2], axis=-1) for name, d in difference.items()}
        return deviations

    def errors(self, spec: EnvironmentSpec, spaces: Spaces) -> dict[str, Any]:
        """Mean and standard error of the `deviations` over the starts, by quantity, model and row."""
        return {
            quantity: {name: self._over_starts(values) for name, values in by_model.items()}
            for quantity, by_model in self.deviations(spec, spaces).items()
        }

    def _over_starts(self, values: np.ndarray) -> dict[str, list[float | None]]:
        columns = [column[alive] for column, alive in zip(values.T, self.alive.T, strict=True)]
        means = [float(column.mean()) if len(column) else None for column in columns]
        return {"mean": means, "standard_error": [standard_error(column) for column in columns]}


def compare_rollouts(engine: RolloutEngine, policy: Policy, problem: Problem, starts: int, seed: int) -> Comparison:
    """Roll the policy out from `starts` random states of the data: in the simulator and in the models."""
    spec, spaces, generator = problem.spec, problem.spaces, torch.Generator(problem.spaces.device).manual_seed(seed)
    observation = problem.transitions.observation
    # Hopper and walker2d cut observed velocities off at exactly 10: such a row does not tell its state.
    known = np.flatnonzero((np.abs(state_from_observation(spec, observation)[1]) != 10).all(axis=1))
    rows = np.random.default_rng(seed).choice(known, min(starts, len(known)), replace=False)
    start = observation[rows]

    def act(raw: np.ndarray) -> np.ndarray:
        action = policy.agent.act(spaces.observation_raw_to_policy(torch.as_tensor(raw).to(spaces.device)), generator)
        return spaces.action_policy_to_raw(action).cpu().numpy()

    truth = roll_out_simulator(spec, *state_from_observation(spec, start), engine.horizon, act)
    ended = truth.terminal.cumsum(axis=1) - truth.terminal  # [B, H]: ends before the row
    modelled = {NO_MOTION: np.repeat(start[:, None], engine.horizon, axis=1)}
    policy_start = spaces.observation_raw_to_policy(torch.as_tensor(start).to(spaces.device))
    for name, iterations in ((SINGLE_STEP, 0), (DYDIFF, engine.iterations)):
        rollout = engine.roll_out(lambda o: policy.agent.act(o, generator), policy_start, generator, iterations=iterations)
        modelled[name] = spaces.observation_policy_to_raw(rollout.observation).cpu().numpy()
    return Comparison(truth.observation, ended == 0, modelled)


def is_maze(spec: EnvironmentSpec) -> bool:
    """Whether observations are a position in a plane and its velocity."""
    return spec.name.startswith("maze2d")


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of values [n], or None where a single one does not tell."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
