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
from dydiff.comparison import NO_MOTION, compare_rollouts, is_maze, standard_error
from dydiff.config import Constants, from_mapping
from dydiff.data import Dataset, d4rl, load_dataset
from dydiff.dynamics import DynamicsEnsemble
from dydiff.environments import environment_name, environment_spec
from dydiff.errors import DydiffError
from dydiff.models import DIFFUSION, DYNAMICS, POLICY, load_diffusion_model, load_policy
from dydiff.policy_stage import UPDATES_PER_EPOCH, build_rollouts, find_models
from dydiff.problem import Problem, load_problem
from dydiff.runs import list_runs, read_log, read_run, read_settings

ALGORITHM_NAMES = {"td3_bc": "TD3+BC", "diffusion_ql": "Diffusion-QL", "cql": "CQL"}


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
            record[name] = {"mean": float(values.mean()), "standard_error": standard_error(values)}
            record[name]["normalized_score"] = d4rl.normalized_score(dataset.name, record[name]["mean"])
        return record


def report(root: Path, dataset_name: str, starts: int, seed: int, device: str) -> None:
    """Print the tables and write report.json and the pictures into `root`/report.

    Raises:
        DydiffError: no finished policy run or no trained models on the dataset under `root`, no simulator of its
            environment, or `root` cannot be written.
    """
    dataset = load_dataset(dataset_name)
    runs = find_policy_runs(root, dataset)
    subject = next((run for run in reversed(runs) if run.uses_dydiff), runs[-1])
    env_name = subject.constants.env_specs.env_name
    environment_spec(environment_name(env_name or dataset.environment or ""))  # says so where there is no simulator
    problem = load_problem(dataset_name, env_name, subject.constants.env_specs.backend)
    models = models_of(subject, problem, root)
    engine = build_rollouts(subject.constants, problem, device, models).engine
    policy = load_policy(subject.folder / "agent.safetensors", device)
    comparison = compare_rollouts(engine, policy, problem, starts, seed)
    errors = comparison.errors(problem.spec, problem.spaces)
    scores = [variant.summary(dataset) for variant in group_runs(runs)]
    scores.sort(key=lambda score: score["dydiff"])  # base algorithms first
    steps = problem.spec.max_episode_steps
    # Where episodes may end early, the mean reward says nothing about returns.
    behaviour = None if dataset.terminals.any() else float(dataset.rewards.mean()) * steps

    folder = root / "report"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DydiffError(f"Cannot write the report to '{folder}': {error.strerror}.") from error
    draw = plots.draw_maze_rollouts if is_maze(problem.spec) else plots.draw_columns
    picture = "maze_rollouts.png" if is_maze(problem.spec) else "rollouts.png"
    files = {name: folder / name for name in ("rollout_error.png", picture, "learning_curve.png", "report.json")}
    plots.draw_errors(errors, files["rollout_error.png"])
    modelled = {name: observation for name, observation in comparison.modelled.items() if name != NO_MOTION}
    draw(problem.spec.name, comparison.simulated, comparison.alive, modelled, files[picture])
    plots.draw_curves(scores, behaviour, files["learning_curve.png"])
    record = {
        "dataset": dataset.name,
        "rows": len(dataset),
        "environment": problem.environment,
        "simulator": problem.simulator,
        "policy": str(subject.folder),
        "starts": len(comparison.simulated),
        "seed": seed,
        "horizon": engine.horizon,
        "iterations": engine.iterations,
        "models": describe_models(models, dataset, engine.dynamics),
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


def models_of(run: PolicyRun, problem: Problem, root: Path) -> dict[str, list[str]]:
    """The models that a run's rollouts used; for a run without rollouts, those that its settings would find now."""
    return (read_run(run.folder) or {}).get("models") or find_models(run.constants, problem, root)


def describe_models(models: dict[str, list[str]], dataset: Dataset, dynamics: DynamicsEnsemble) -> dict[str, Any]:
    """Where the models behind a run's rollouts lie, and how large they are."""
    diffusion = []
    for file in models[DIFFUSION]:
        about = {"path": file, "parameters": _count(load_diffusion_model(file, dataset).denoiser)}
        windows = (read_settings(Path(file).parent) or {}).get("duration")  # None for a file from elsewhere
        diffusion.append({**about, "training_windows": windows})
    ensemble = {"path": models[DYNAMICS][0], "networks": dynamics.num_nets, "parameters": _count(dynamics)}
    return {"diffusion": diffusion, "dynamics": ensemble}


def _rollout_text(record: dict[str, Any]) -> str:
    ensemble, diffusion = record["models"]["dynamics"], record["models"]["diffusion"]
    windows = diffusion[0]["training_windows"]
    shown = [2**power for power in range(20) if 2**power < record["horizon"] - 1] + [record["horizon"] - 1]
    text = [
        f"Rollout error against the simulator ({record['simulator']}): mean ± standard error over {record['starts']} starts",
        f"from {record['dataset']} ({record['rows']:,} rows). The policy acts closed loop in the simulator and in both models;",
        f"it is the last one of {record['policy']}.",
        f"Single-step: {ensemble['networks']} networks, {ensemble['parameters']:,} parameters in all.",
        f"DyDiff: {record['horizon']} rows, {record['iterations']} policy injections, "
        f"{len(diffusion)} diffusion model(s) of {diffusion[0]['parameters']:,} parameters"
        + (f", trained on {windows:,} windows." if windows else "."),
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
        f"Return of an episode in {record['environment']} ({'; '.join(simulators)}): mean ± standard error over seeds.",
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


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
