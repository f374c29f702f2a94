"""`dydiff report`: rollouts of the trained models against the simulator, and the scores of the policies trained with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dydiff import plots
from dydiff.checkpoint import write_atomically
from dydiff.config import Constants, from_mapping
from dydiff.data import Dataset, Spaces, d4rl, load_dataset
from dydiff.environments import EnvironmentSpec, environment_name, environment_spec, simulator_version
from dydiff.errors import DydiffError
from dydiff.models import POLICY, Policy, load_policy
from dydiff.rollout import RolloutEngine
from dydiff.runs import list_runs, read_log, read_settings
from dydiff.simulate import roll_out_simulator, state_from_observation
from dydiff.stages import UPDATES_PER_EPOCH, Problem, build_rollouts, load_problem

ALGORITHM_NAMES = {"td3_bc": "TD3+BC", "diffusion_ql": "Diffusion-QL", "cql": "CQL"}
NO_MOTION, SINGLE_STEP, DYDIFF = "no motion", "single-step", "DyDiff"


@dataclass
class PolicyRun:
    """One finished policy run and its learning curve."""

    folder: Path
    settings: dict[str, Any]
    constants: Constants
    simulator: str
    updates: list[int]  # gradient updates before each evaluation
    returns: list[float]  # mean return of each evaluation
    episodes: int  # of the last evaluation

    @property
    def uses_dydiff(self) -> bool:
        return self.constants.rl_trainer_params.real_ratio < 1

    @property
    def names(self) -> list[str]:
        """What the run's variant can be called, from short to unmistakable."""
        short = ("DyDiff + " if self.uses_dydiff else "") + ALGORITHM_NAMES[self.settings["stage"]]
        choices = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.settings["variables"].items() if key != "seed"]
        experiment = [self.settings["experiment"], *choices]
        return [short, *(f"{short} ({', '.join(words)})" for words in (choices, experiment, [self.folder.name]))]


@dataclass
class Variant:
    """The runs that differ in nothing but their seeds, by seed."""

    name: str = ""
    runs: dict[int, PolicyRun] = field(default_factory=dict)

    def summary(self, dataset: Dataset) -> dict[str, Any]:
        """Last and best returns over the seeds, and the learning curves, for report.json."""
        runs = self.runs.values()
        record: dict[str, Any] = {
            "variant": self.name,
            "algorithm": next(iter(runs)).settings["stage"],
            "dydiff": next(iter(runs)).uses_dydiff,
            "seeds": list(self.runs),
            "folders": [str(run.folder) for run in runs],
            "episodes": [run.episodes for run in runs],
            "simulator": sorted({run.simulator for run in runs}),
            "updates": [run.updates for run in runs],
            "returns": [run.returns for run in runs],
        }
        for name, pick in (("last", lambda returns: returns[-1]), ("best", max)):
            values = np.array([pick(run.returns) for run in runs])
            record[name] = {"mean": float(values.mean()), "standard_error": _standard_error(values)}
            record[name]["normalized_score"] = d4rl.normalized_score(dataset.name, record[name]["mean"])
        return record


@dataclass
class Comparison:
    """The same policy, closed loop, in the simulator and in each model, from the same B start states."""

    simulated: np.ndarray  # [B, H, O] raw
    alive: np.ndarray  # [B, H] bool: the simulator's episode had not ended before this row
    modelled: dict[str, np.ndarray]  # by model, [B, H, O] raw

    def errors(self, spec: EnvironmentSpec, spaces: Spaces) -> dict[str, Any]:
        """Mean and standard error over the starts, by quantity, model and row.

        `state`: root mean square over the z-scored columns. `position` (mazes, where it has one unit): distance in metres.
        """
        deviation = {name: observation - self.simulated for name, observation in self.modelled.items()}  # [B, H, O]
        std = spaces.z_score.std.cpu().numpy()
        errors = {"state": {name: np.sqrt(np.square(d / std).mean(axis=-1)) for name, d in deviation.items()}}
        if is_maze(spec):
            errors["position"] = {name: np.linalg.norm(d[..., :2], axis=-1) for name, d in deviation.items()}
        return {
            quantity: {name: self._over_starts(values) for name, values in by_model.items()}
            for quantity, by_model in errors.items()
        }

    def _over_starts(self, values: np.ndarray) -> dict[str, list[float | None]]:
        columns = [column[alive] for column, alive in zip(values.T, self.alive.T, strict=True)]
        means = [float(column.mean()) if len(column) else None for column in columns]
        return {"mean": means, "standard_error": [_standard_error(column) for column in columns]}


def report(root: Path, dataset_name: str, starts: int, seed: int, device: str) -> None:
    """Print the tables and write report.json and the pictures into `root`/report.

    Raises:
        DydiffError: no finished policy run or no trained models on the dataset under `root`, or no simulator of it.
    """
    dataset = load_dataset(dataset_name)
    runs = find_policy_runs(root, dataset)
    subject = next((run for run in reversed(runs) if run.uses_dydiff), runs[-1])
    env_name = subject.constants.env_specs.env_name
    environment_spec(environment_name(env_name or dataset.environment or ""))  # says so where there is no simulator
    problem = load_problem(dataset_name, env_name)
    engine = build_rollouts(subject.constants, problem, device, root).engine
    policy = load_policy(subject.folder / "agent.safetensors", device)
    comparison = compare_rollouts(engine, policy, problem, starts, seed)
    errors = comparison.errors(problem.spec, problem.spaces)
    scores = [variant.summary(dataset) for variant in group_runs(runs)]
    steps = problem.spec.max_episode_steps
    # Where episodes may end early, the mean reward says nothing about returns.
    behaviour = None if dataset.terminals.any() else float(dataset.rewards.mean()) * steps

    folder = root / "report"
    folder.mkdir(exist_ok=True)
    draw = plots.draw_maze_rollouts if is_maze(problem.spec) else plots.draw_columns
    picture = "maze_rollouts.png" if is_maze(problem.spec) else "rollouts.png"
    files = {name: folder / name for name in ("rollout_error.png", picture, "learning_curve.png", "report.json")}
    plots.draw_errors(errors, files["rollout_error.png"])
    models = {name: observation for name, observation in comparison.modelled.items() if name != NO_MOTION}
    draw(problem.spec.name, comparison.simulated, comparison.alive, models, files[picture])
    plots.draw_curves(scores, behaviour, files["learning_curve.png"])
    record = {
        "dataset": dataset.name,
        "rows": len(dataset),
        "environment": problem.environment,
        "simulator": f"{problem.spec.backend}, MuJoCo {simulator_version()}",
        "policy": str(subject.folder),
        "starts": len(comparison.simulated),
        "seed": seed,
        "horizon": engine.horizon,
        "iterations": engine.iterations,
        "parameters": {"diffusion": [_count(each) for each in engine.denoisers], "dynamics": _count(engine.dynamics)},
        "rollout_error": errors,
        "alive": comparison.alive.sum(axis=0).tolist(),
        "scores": scores,
        "behaviour_return": behaviour,
    }
    write_atomically(files["report.json"], lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print("\n\n".join([_rollout_text(record), _score_text(record, steps), "\n".join(map(str, files.values()))]))


def find_policy_runs(root: Path, dataset: Dataset) -> list[PolicyRun]:
    """All finished policy runs on the dataset under `root` that were evaluated, oldest first.

    Raises:
        DydiffError: there is none.
    """
    runs = []
    for folder, record in list_runs(root):
        about = (record["kind"], record["status"], record["fingerprint"])
        settings = read_settings(folder)
        lines = [line for line in read_log(folder) if "evaluation/return" in line]
        if about != (POLICY, "finished", dataset.fingerprint) or settings is None or not lines:
            continue
        constants = from_mapping(Constants, settings["constants"], f"{folder / 'settings.yaml'}: constants")
        updates = constants.rl_trainer_params.num_train_steps_per_train_call or UPDATES_PER_EPOCH[settings["stage"]]
        runs.append(
            PolicyRun(
                folder,
                settings,
                constants,
                record["simulator"],
                [line["epoch"] * updates for line in lines],
                [line["evaluation/return"] for line in lines],
                int(lines[-1]["evaluation/episodes"]),
            )
        )
    if not runs:
        raise DydiffError(
            f"No finished and evaluated policy run on dataset '{dataset.name}' under '{root}'. Train one there with "
            f"`dydiff run -e EXPERIMENT --outdir {root}`, or name the folder with the runs by --outdir."
        )
    return runs


def group_runs(runs: Sequence[PolicyRun]) -> list[Variant]:
    """Put runs together that differ in their seed alone; a repeated run stands in for the older one."""
    variants: dict[str, Variant] = {}
    for run in runs:
        constants = {**run.settings["constants"], "seed": None}
        key = yaml.safe_dump([run.settings["stage"], constants])
        variants.setdefault(key, Variant()).runs[run.constants.seed] = run
    names = zip(*(next(iter(variant.runs.values())).names for variant in variants.values()), strict=True)
    distinct = next(level for level in names if len(set(level)) == len(level))
    for variant, name in zip(variants.values(), distinct, strict=True):
        variant.name = name
    return list(variants.values())


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


def _rollout_text(record: dict[str, Any]) -> str:
    sizes = record["parameters"]
    shown = [2**power for power in range(20) if 2**power < record["horizon"] - 1] + [record["horizon"] - 1]
    text = [
        f"Rollout error against the simulator ({record['simulator']}), {record['starts']} start states from {record['dataset']}",
        f"({record['rows']:,} rows), mean ± standard error over the starts. The policy is the last one of",
        f"{record['policy']}, closed loop everywhere.",
        f"Single-step: ensemble of {sizes['dynamics']:,} parameters. DyDiff: {record['horizon']} rows, {record['iterations']} "
        f"iterations, {len(sizes['diffusion'])} diffusion model(s) of {sizes['diffusion'][0]:,} parameters.",
        "No motion: what a model that stays at the start would score.",
    ]
    titles = {"position": "position error (m)", "state": "state error (root mean square of z-scored observations)"}
    for quantity in ("position", "state"):
        if quantity not in record["rollout_error"]:
            continue
        by_model = record["rollout_error"][quantity]
        rows = [["step", "starts", *by_model]]
        for step in shown:
            figures = [_plus_minus(values["mean"][step], values["standard_error"][step], 3) for values in by_model.values()]
            rows.append([str(step), str(record["alive"][step]), *figures])
        text += ["", titles[quantity], format_table(rows)]
    return "\n".join(text)


def _score_text(record: dict[str, Any], steps: int) -> str:
    normalized = any(score["last"]["normalized_score"] is not None for score in record["scores"])
    rows = [["variant", "seeds", "updates", "episodes", "last return", "best return"]]
    rows[0] += ["last score", "best score"] if normalized else []
    for score in record["scores"]:
        row = [score["variant"], str(len(score["seeds"])), f"{score['updates'][0][-1]:,}", str(score["episodes"][0])]
        row += [_plus_minus(score[name]["mean"], score[name]["standard_error"], 1) for name in ("last", "best")]
        row += [f"{score[name]['normalized_score']:.1f}" for name in ("last", "best")] if normalized else []
        rows.append(row)
    simulators = sorted({simulator for score in record["scores"] for simulator in score["simulator"]})
    text = [
        f"Return in {record['environment']} ({'; '.join(simulators)}), mean over seeds, ± standard error over seeds if several.",
        "Last: of the last evaluation. Best: of the best evaluation in hindsight, which flatters noisy curves.",
        format_table(rows),
    ]
    if record["behaviour_return"] is not None:
        text.append(f"The data's mean reward amounts to {record['behaviour_return']:.1f} in an episode of {steps} steps.")
    return "\n".join(text)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def _plus_minus(mean: float | None, error: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
