"""`dydiff sampler-quality`: what fewer network evaluations cost, as rollout error against the simulator on trained models."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dydiff import plots
from dydiff.checkpoint import write_atomically
from dydiff.comparison import DYDIFF, SINGLE_STEP, Comparison, compare_rollouts, standard_error
from dydiff.data import load_dataset
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.environments import environment_name, environment_spec
from dydiff.errors import DydiffError
from dydiff.models import load_policy
from dydiff.policy_stage import build_rollouts
from dydiff.problem import Problem, load_problem
from dydiff.report import find_policy_runs, format_table, models_of
from dydiff.rollout import RolloutEngine

REFERENCE = "Heun 34"  # the method's own sampler: what the others are compared with
HEUN_STEPS = (34, 18, 10)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to sample: `num_steps` of stochastic Heun, or fast mode."""

    num_steps: int = 0
    fast: FastMode | None = None

    @property
    def name(self) -> str:
        if self.fast is None:
            return f"Heun {self.num_steps}"
        return f"fast {self.fast.first_evaluations} + {self.fast.warm_evaluations} from {self.fast.warm_sigma:g}"

    def evaluations(self, iterations: int) -> int:
        """Network evaluations of a rollout."""
        if self.fast is None:
            return iterations * (2 * self.num_steps - 1)
        return self.fast.first_evaluations + (iterations - 1) * self.fast.warm_evaluations

    def apply(self, engine: RolloutEngine) -> RolloutEngine:
        """The same engine, sampling this way."""
        engine = copy.copy(engine)
        engine.fast = self.fast
        engine.sampler = engine.sampler if self.fast else {**engine.sampler, "num_steps": self.num_steps}
        return engine


def measure_quality(
    root: Path,
    dataset_name: str,
    first: Sequence[int],
    warm: Sequence[int],
    sigmas: Sequence[float],
    starts: int,
    seed: int,
    device: str,
) -> None:
    """Print the table, and write quality.json and quality.png into `root`/sampler-quality.

    Compared are 34, 18 and 10 steps of Heun's method with fast mode in all combinations of `first` and `warm` evaluations and
    noise levels `sigmas` of the warm start, from the same states with the same policy.

    Raises:
        DydiffError: no finished policy run or no trained models on the dataset under `root`, no simulator of its
            environment, or a run of fewer than two iterations.
    """
    dataset = load_dataset(dataset_name)
    runs = find_policy_runs(root, dataset)
    subject = next((run for run in reversed(runs) if run.uses_dydiff), runs[-1])
    env_name = subject.constants.env_specs.env_name
    environment_spec(environment_name(env_name or dataset.environment or ""))  # says so where there is no simulator
    problem = load_problem(dataset_name, env_name, subject.constants.env_specs.backend)
    engine = build_rollouts(subject.constants, problem, device, models_of(subject, problem, root)).engine
    if engine.iterations < 2:
        raise DydiffError(f"Run '{subject.folder}' has sampler_kwargs.iterative_times {engine.iterations}: none starts warm.")
    policy = load_policy(subject.folder / "agent.safetensors", device)
    settings = [Setting(num_steps=steps) for steps in HEUN_STEPS]
    settings += [Setting(fast=FastMode(start, sigma, later)) for start, later, sigma in product(first, warm, sigmas)]
    lines: list[dict[str, Any]] = []
    reference: dict[str, np.ndarray] = {}
    for setting in settings:
        comparison = compare_rollouts(setting.apply(engine), policy, problem, starts, seed)
        if not lines:
            lines.append(_describe("single-step", 0, _by_start(comparison, problem, SINGLE_STEP), None))
        errors = _by_start(comparison, problem, DYDIFF)
        reference = reference or errors
        line = _describe(setting.name, setting.evaluations(engine.iterations), errors, reference)
        lines.append(line | dataclasses.asdict(setting.fast) if setting.fast else line)

    folder = root / "sampler-quality"
    folder.mkdir(exist_ok=True)
    record = {
        "dataset": dataset.name,
        "environment": problem.environment,
        "simulator": problem.simulator,
        "policy": str(subject.folder),
        "starts": len(comparison.simulated),
        "seed": seed,
        "horizon": engine.horizon,
        "iterations": engine.iterations,
        "settings": lines,
    }
    write_atomically(folder / "quality.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    plots.draw_sampler_quality(lines, folder / "quality.png")
    print(f"{_show(record)}\n\n{folder / 'quality.json'}\n{folder / 'quality.png'}")


def _by_start(comparison: Comparison, problem: Problem, model: str) -> dict[str, np.ndarray]:
    """Each start's error, averaged over the rows after the first in which the simulator's episode goes on: [B] by quantity."""
    alive = comparison.alive[:, 1:]
    deviations = comparison.deviations(problem.spec, problem.spaces)
    return {
        quantity: (by_model[model][:, 1:] * alive).sum(axis=1) / alive.sum(axis=1).clip(min=1)
        for quantity, by_model in deviations.items()
    }


def _describe(
    name: str, evaluations: int, errors: dict[str, np.ndarray], reference: dict[str, np.ndarray] | None
) -> dict[str, Any]:
    line: dict[str, Any] = {"setting": name, "evaluations": evaluations, "error": {}, "excess": {}}
    for quantity, values in errors.items():
        line["error"][quantity] = {"mean": float(values.mean()), "standard_error": standard_error(values)}
        if reference is not None:  # start by start: much of the error is common to all samplers
            excess = values - reference[quantity]
            line["excess"][quantity] = {"mean": float(excess.mean()), "standard_error": standard_error(excess)}
    return line


def _show(record: dict[str, Any]) -> str:
    quantities = list(record["settings"][0]["error"])
    header = ["sampler", "evaluations"]
    for quantity in quantities:
        header += [f"{quantity} error", f"minus {REFERENCE}'s"]
    rows = [header]
    for line in record["settings"]:
        row = [line["setting"], str(line["evaluations"])]
        for quantity in quantities:
            row += [_plus_minus(line["error"][quantity], ""), _plus_minus(line["excess"].get(quantity), "+")]
        rows.append(row)
    text = [
        f"Rollout error against the simulator ({record['simulator']}), averaged over {record['horizon'] - 1} steps:",
        f"mean ± standard error over {record['starts']} start states from {record['dataset']}, differences start by start.",
        f"The policy is the last one of {record['policy']}; {record['iterations']} iterations.",
        "fast F + W from S: F evaluations at first, then W in each iteration from noise of level S on the guess.",
        format_table(rows),
    ]
    return "\n".join(text)


def _plus_minus(value: dict[str, float | None] | None, sign: str) -> str:
    if value is None:
        return ""
    error = value["standard_error"]
    return f"{value['mean']:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
