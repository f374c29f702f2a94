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

from dydiff.checkpoint import make_folder, write_atomically
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.errors import DydiffError
from dydiff.reports import plots
from dydiff.reports.comparison import SINGLE_STEP, compare_rollouts
from dydiff.reports.policy_runs import load_subject
from dydiff.reports.tables import format_table, plus_minus
from dydiff.reports.uncertainty import mean_with_error
from dydiff.rollout import RolloutEngine

REFERENCE = "Heun 34"  # the method's own sampler: what the others are compared with


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to sample: Heun's method with changes to the engine's settings, or fast mode."""

    name: str
    changes: dict[str, float]
    fast: FastMode | None = None

    def evaluations(self, iterations: int) -> int:
        """Network evaluations of a rollout."""
        if self.fast is None:
            return iterations * (2 * self.changes["num_steps"] - 1)
        return self.fast.first_evaluations + (iterations - 1) * self.fast.warm_evaluations

    def apply(self, engine: RolloutEngine) -> RolloutEngine:
        """The same engine, sampling this way."""
        engine = copy.copy(engine)
        engine.fast = self.fast
        engine.sampler = {**engine.sampler, **self.changes}
        return engine


HEUN = (
    Setting(REFERENCE, {"num_steps": 34}),
    Setting("Heun 34, inpaint_churn", {"num_steps": 34, "inpaint_churn": True}),
    Setting("Heun 34, S_churn 0", {"num_steps": 34, "s_churn": 0.0}),
    Setting("Heun 18", {"num_steps": 18}),
    Setting("Heun 10", {"num_steps": 10}),
)


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

    Compared are 34, 18 and 10 steps of Heun's method and two changes to its churn with fast mode in all combinations of `first`
    and `warm` evaluations and noise levels `sigmas` of the warm start, from the same states with the same policy.

    Raises:
        DydiffError: no finished policy run or no trained models on the dataset under `root`, no simulator of its
            environment, or a run of fewer than two iterations.
    """
    subject = load_subject(root, dataset_name, device)
    engine = subject.rollouts.engine
    if engine.iterations < 2:
        raise DydiffError(f"Run '{subject.run.folder}' has sampler_kwargs.iterative_times {engine.iterations}: none starts warm.")
    settings = [*HEUN]
    for start, later, sigma in product(first, warm, sigmas):
        settings.append(Setting(f"fast {start} + {later} from {sigma:g}", {}, FastMode(start, sigma, later)))
    folder = make_folder(root / "sampler-quality")
    comparison = compare_rollouts({setting.name: setting.apply(engine) for setting in settings}, subject, starts, seed)
    deviations = comparison.averages(comparison.deviations(subject.problem.spec, subject.problem.spaces))

    def by_start(model: str) -> dict[str, np.ndarray]:
        """A model's error at each start, averaged over the horizon: [B] by quantity."""
        return {quantity: by_model[model] for quantity, by_model in deviations.items() if quantity in plots.LABELS}

    lines = [_describe(SINGLE_STEP, 0, by_start(SINGLE_STEP), None)]
    for setting in settings:
        line = _describe(setting.name, setting.evaluations(engine.iterations), by_start(setting.name), by_start(REFERENCE))
        lines.append(line | dataclasses.asdict(setting.fast) if setting.fast else line)
    record = {**subject.describe(), "starts": len(comparison.simulated.reward), "seed": seed, "settings": lines}
    write_atomically(folder / "quality.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    plots.draw_sampler_quality(lines, folder / "quality.png")
    print(f"{_show(record)}\n\n{folder / 'quality.json'}\n{folder / 'quality.png'}")


def _describe(
    name: str, evaluations: int, errors: dict[str, np.ndarray], reference: dict[str, np.ndarray] | None
) -> dict[str, Any]:
    line: dict[str, Any] = {"setting": name, "evaluations": evaluations, "error": {}, "excess": {}}
    for quantity, values in errors.items():
        line["error"][quantity] = mean_with_error(values)
        if reference is not None:  # start by start: much of the error is common to all samplers
            line["excess"][quantity] = mean_with_error(values - reference[quantity])
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
            error, excess = line["error"][quantity], line["excess"].get(quantity)
            row += [plus_minus(*error.values(), 4), plus_minus(*excess.values(), 4, "+") if excess else ""]
        rows.append(row)
    text = [
        f"Rollout error against the simulator ({record['simulator']}), averaged over {record['horizon'] - 1} steps:",
        f"mean ± standard error over {record['starts']} start states from {record['dataset']}, differences start by start.",
        f"The policy is the last one of {record['policy']}; {record['iterations']} iterations.",
        "fast F + W from S: F evaluations at first, then W in each iteration from noise of level S on the guess.",
        format_table(rows),
    ]
    return "\n".join(text)
