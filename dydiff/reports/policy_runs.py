"""Finished policy runs: their learning curves, grouped over seeds, and the models behind their rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dydiff.agents import find_agent
from dydiff.config import Constants
from dydiff.data import Dataset, d4rl, load_dataset
from dydiff.data.windows import find_episodes
from dydiff.dynamics import DynamicsEnsemble
from dydiff.environments import environment_spec
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import OWN, flatten
from dydiff.experiments.policy_stage import UPDATES_PER_EPOCH, algorithm_of, build_rollouts, find_models
from dydiff.experiments.settings import from_mapping
from dydiff.models import DIFFUSION, DYNAMICS, POLICY, Policy, load_diffusion_model, load_policy
from dydiff.problem import Problem, load_problem
from dydiff.reports.uncertainty import bootstrap_interval, standard_error
from dydiff.runs import list_runs, read_log, read_settings
from dydiff.runs.model_files import recorded_models
from dydiff.trainer import Rollouts

PARTS = ("rollout", "updates", "evaluation")  # of an epoch, as the log times them
PLACES = ("dataset_name", "seed", "seeds", "load_path", "model_paths")  # settings that say what for and where, not how
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
    hours: float  # of rollouts, updates and evaluation

    @property
    def uses_dydiff(self) -> bool:
        return self.constants.rl_trainer_params.real_ratio < 1

    @property
    def algorithm(self) -> str:
        """Its name in tables: one's own class by its own."""
        known = ALGORITHM_NAMES.get(self.settings["stage"])
        return known or algorithm_of(self.settings["stage"], self.constants).rpartition(":")[2]

    @property
    def short_name(self) -> str:
        """The algorithm, and whether DyDiff, or DyDiff in fast mode, is with it."""
        with_it = "fast DyDiff + " if self.constants.sampler_kwargs.fast else "DyDiff + "
        return (with_it if self.uses_dydiff else "") + self.algorithm

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings that are not at their defaults, by dotted name, less those that say where something lies."""
        defaults = dataclasses.asdict(Constants())
        for name, section in vars(self.constants).items():
            if defaults[name] is None and dataclasses.is_dataclass(section):
                defaults[name] = dataclasses.asdict(type(section)())
        before, after = flatten(defaults), flatten(dataclasses.asdict(self.constants))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        return {name: value for name, value in changed.items() if name.rsplit(".", 1)[-1] not in PLACES}

    def names(self, siblings: Sequence[PolicyRun]) -> list[str]:
        """What the run's variant can be called, from short to unmistakable, where `siblings` are those of the same short name."""
        choices = _words({key: value for key, value in self.settings["variables"].items() if key != "seed"})
        filtered = [self.constants.rl_trainer_params.keep_condition.filter_type] if self.uses_dydiff else []
        theirs = [run.changed_settings for run in siblings]
        keys = dict.fromkeys(key for settings in theirs for key in settings)
        mine = self.changed_settings
        differing = [key for key in keys if any(settings.get(key) != mine.get(key) for settings in theirs)]
        different = _words({key: mine[key] for key in differing if key in mine})
        details = (filtered, choices, different, [self.settings["experiment"], *choices], [self.folder.name])
        return [self.short_name, *(f"{self.short_name} ({', '.join(words)})" if words else self.short_name for words in details)]


@dataclass
class Variant:
    """The runs that differ in nothing but their seeds, by seed."""

    name: str = ""
    runs: dict[int, PolicyRun] = field(default_factory=dict)

    @property
    def first(self) -> PolicyRun:
        """The run of the lowest seed; all have its settings."""
        return self.runs[min(self.runs)]

    def summary(self, dataset: Dataset) -> dict[str, Any]:
        """Last and best returns over the seeds, and the learning curves, for report.json."""
        runs = self.runs.values()
        record: dict[str, Any] = {
            "variant": self.name,
            "algorithm": self.first.settings["stage"],
            "dydiff": self.first.uses_dydiff,
            "seeds": list(self.runs),
            "folders": [str(run.folder) for run in runs],
            "episodes": [run.episodes for run in runs],
            "simulator": sorted({run.simulator for run in runs}),
            "updates": [run.updates for run in runs],
            "returns": [run.returns for run in runs],
            "hours": [run.hours for run in runs],
        }
        for name, pick in (("last", lambda returns: returns[-1]), ("best", max)):
            values = np.array([pick(run.returns) for run in runs])
            interval = bootstrap_interval(values)
            mean = float(values.mean())
            record[name] = {
                "mean": mean,
                "standard_error": standard_error(values),
                "interval": None if interval is None else interval.tolist(),
                "by_seed": values.tolist(),
                "normalized_score": d4rl.normalized_score(dataset.name, mean),
                "scaled_return": d4rl.scaled_return(dataset.environment, mean),
            }
        record["curve"] = self._curve()
        return record

    def _curve(self) -> dict[str, Any]:
        """Mean return over the seeds after every number of updates at which all were evaluated, with 95 % intervals."""
        by_update = [dict(zip(run.updates, run.returns, strict=True)) for run in self.runs.values()]
        common = sorted(set.intersection(*map(set, by_update)))
        returns = np.array([[seed[update] for update in common] for seed in by_update])  # [seeds, evaluations]
        interval = bootstrap_interval(returns)
        return {
            "updates": common,
            "mean": returns.mean(axis=0).tolist(),
            "interval": None if interval is None else interval.tolist(),
        }


@dataclass
class Subject:
    """A policy run with everything that its rollouts need."""

    runs: list[PolicyRun]  # all runs on the dataset
    run: PolicyRun
    problem: Problem
    models: dict[str, list[str]]  # files by kind
    rollouts: Rollouts
    policy: Policy

    def describe(self) -> dict[str, Any]:
        """What a report on its rollouts says of them first."""
        engine = self.rollouts.engine
        return {**describe_run(self.run, self.problem), "horizon": engine.horizon, "iterations": engine.iterations}


def describe_run(run: PolicyRun, problem: Problem) -> dict[str, Any]:
    """Which run a report is about, and where it was trained."""
    where = {"dataset": problem.dataset.name, "environment": problem.environment, "simulator": problem.simulator}
    return {**where, "policy": str(run.folder)}


def load_subject(root: Path, dataset_name: str, device: str) -> Subject:
    """The newest finished run on a dataset under `root` that rolled out, else the newest one, with its models.

    Raises:
        DydiffError: no finished policy run or no trained models on the dataset under `root`, or no simulator of its environment
            that can be put into the dataset's states.
    """
    return load_models(root, device, *load_runs(root, dataset_name))


def load_runs(root: Path, dataset_name: str) -> tuple[list[PolicyRun], PolicyRun, Problem]:
    """All runs of a `Subject`, the one it is about, and its problem; raises as `load_subject`, but for the models."""
    dataset = load_dataset(dataset_name)
    runs = find_policy_runs(root, dataset)
    run = next((run for run in reversed(runs) if run.uses_dydiff), runs[-1])
    env_name = run.constants.env_specs.env_name
    problem = load_problem(dataset_name, env_name, run.constants.env_specs.backend)
    environment_spec(problem.environment)  # says so where there is no simulator
    return runs, run, problem


def load_models(root: Path, device: str, runs: list[PolicyRun], run: PolicyRun, problem: Problem) -> Subject:
    """A `Subject` of what `load_runs` gives, with its models.

    Raises:
        DydiffError: no trained models on the dataset under `root`, or a simulator that cannot be put into its states.
    """
    problem.spec.require_states()
    models = models_of(run, problem, root)
    rollouts = build_rollouts(run.constants, problem, device, models)
    own = find_agent(algorithm_of(OWN, run.constants)) if run.settings["stage"] == OWN else None
    return Subject(runs, run, problem, models, rollouts, load_policy(run.folder / "agent.safetensors", device, own))


def find_policy_runs(root: Path, dataset: Dataset) -> list[PolicyRun]:
    """All finished policy runs on the dataset under `root` that were evaluated, oldest first.

    Raises:
        DydiffError: there is none.
    """
    runs = []
    for folder, record in list_runs(root):
        if (record["kind"], record["status"], record["fingerprint"]) != (POLICY, "finished", dataset.fingerprint):
            continue
        settings, log = read_settings(folder), read_log(folder)
        lines = [line for line in log if "evaluation/return" in line]
        if not settings or not lines:
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
                sum(line.get(f"time/{part}", 0.0) for line in log for part in PARTS) / 3600,
            )
        )
    if not runs:
        raise DydiffError(
            f"No finished and evaluated policy run on dataset '{dataset.name}' under '{root}'. Train one there with "
            f"`dydiff run -e EXPERIMENT --outdir {root}`, or name the folder with the runs by --outdir."
        )
    return runs


def group_runs(runs: Sequence[PolicyRun]) -> list[Variant]:
    """Put runs together that differ in their seed alone (of two simulators: not together); a repeated run replaces the older."""
    variants: dict[str, Variant] = {}
    for run in runs:
        constants = {**dataclasses.asdict(run.constants), "seed": None}  # complete, whatever dydiff wrote them
        key = yaml.safe_dump([run.settings["stage"], run.simulator, constants])
        variants.setdefault(key, Variant()).runs[run.constants.seed] = run
    firsts = [variant.first for variant in variants.values()]
    names = zip(*(run.names([each for each in firsts if each.short_name == run.short_name]) for run in firsts), strict=True)
    distinct = next(level for level in names if len(set(level)) == len(level))
    for variant, name in zip(variants.values(), distinct, strict=True):
        variant.name, variant.runs = name, dict(sorted(variant.runs.items()))
    return list(variants.values())


def models_of(run: PolicyRun, problem: Problem, root: Path) -> dict[str, list[str]]:
    """The models that a run's rollouts used; for a run without rollouts, those that its settings would find now."""
    return recorded_models(run.folder, root)[0] or find_models(run.constants, problem, root)


def behaviour_return(dataset: Dataset, steps: int) -> float:
    """What the data's behaviour earns in an episode: the mean of its whole ones if some end early, else `steps` mean rewards."""
    begins, lengths = find_episodes(dataset.terminals if dataset.timeouts is None else dataset.terminals | dataset.timeouts)
    if not dataset.terminals.any():
        return float(dataset.rewards.mean()) * steps  # timeouts may cut it elsewhere than evaluation does: in mazes
    return float(np.add.reduceat(dataset.rewards[: lengths.sum()].astype(np.float64), begins).mean())


def describe_models(models: dict[str, list[str]], dataset: Dataset, dynamics: DynamicsEnsemble) -> dict[str, Any]:
    """Where the models behind a run's rollouts lie, and how large they are."""
    diffusion = []
    for file in models[DIFFUSION]:
        about = {"path": file, "parameters": _count(load_diffusion_model(file, dataset).denoiser)}
        windows = (read_settings(Path(file).parent) or {}).get("duration")  # None for a file from elsewhere
        diffusion.append({**about, "training_windows": windows})
    ensemble = {"path": models[DYNAMICS][0], "networks": dynamics.num_nets, "parameters": _count(dynamics)}
    return {"diffusion": diffusion, "dynamics": ensemble}


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings.items()]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
