"""Builds each stage (diffusion, dynamics, reward, policy) from its settings and runs it inside a run folder.

This and policy_stage.py see both the settings and the parts; everything below takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dydiff.data import Limits, Windows, load_dataset
from dydiff.diffusion.training import DiffusionTrainer, choose_precision
from dydiff.dynamics import DynamicsEnsemble
from dydiff.environments import ENVIRONMENTS
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import Variant
from dydiff.experiments.policy_stage import build_policies, find_models
from dydiff.experiments.seeds import SeedRuns, SeedTrainers
from dydiff.fit import Fit
from dydiff.models import (
    DIFFUSION,
    DYNAMICS,
    POLICY,
    REWARD,
    build_denoiser,
    describe_scaling,
)
from dydiff.problem import Problem, fit_environment, load_problem
from dydiff.progress import Progress, say
from dydiff.reward import RewardModel
from dydiff.runs import Run
from dydiff.runs.drive import drive
from dydiff.runs.model_files import check_unchanged, digest_models, recorded_models

KINDS = {"dynamics": DYNAMICS, "reward": REWARD}
WEAK = 0.1  # of the full step size; four million windows, as published, get to 0.4


class OneStepStage:
    """A `Fit` with a product to save: the model with the best weights."""

    def __init__(self, fit: Fit, kind: str, describe: dict[str, Any]):
        self.fit = fit
        self.kind = kind
        self.describe = describe

    @property
    def epoch(self) -> int:
        return self.fit.epoch

    @property
    def finished(self) -> bool:
        return self.fit.finished

    def run_epoch(self) -> dict[str, float]:
        return self.fit.run_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self.fit.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fit.load_state_dict(state)

    def save_products(self, save: Callable[[str, str, Any, dict], None], final: bool) -> None:
        if final:
            save("model.safetensors", self.kind, self.fit.model.state_dict(), self.describe)


def build_one_step(variant: Variant, problem: Problem, device: str) -> OneStepStage:
    """The dynamics ensemble or the reward model of an experiment, ready to be trained."""
    constants = variant.constants
    is_dynamics = variant.stage == "dynamics"
    params = constants.dyn_model_params if is_dynamics else constants.model_params
    describe: dict[str, Any] = {
        "observation_dim": problem.dataset.observation_dim,
        "action_dim": problem.dataset.action_dim,
        "hidden_dims": params.hidden_dims,
    }
    if is_dynamics:
        describe |= {
            "num_nets": params.num_nets,
            "num_elites": params.num_elites,
            "weight_decay": params.weight_decay,
            "learn_log_var_bounds": params.learn_log_var_bounds,
        }
    generator = torch.Generator().manual_seed(constants.seed)
    model = (DynamicsEnsemble if is_dynamics else RewardModel)(**describe, generator=generator).to(device)
    fit = Fit(
        model,
        problem.policy_transitions(device),
        generator,
        bootstrap=is_dynamics,
        lr=params.lr,
        batch_size=params.batch_size,
        patience=params.patience,
        max_epochs=params.max_epochs,
        steps_per_epoch=params.steps_per_epoch,
    )
    return OneStepStage(fit, KINDS[variant.stage], {"model": describe, "scaling": describe_scaling(problem.spaces)})


def run_variants(
    variants: Sequence[Variant],
    folders: Sequence[Path],
    root: Path,
    device: str,
    settings: Sequence[dict[str, Any]],
    description: str = "",
) -> None:
    """Train one variant of an experiment in its folder, or several that differ in their seeds alone together.

    What is in the folders is resumed; models are looked up under `root`. `settings` identify the runs; `description` is free text
    that is kept with them.

    Raises:
        DydiffError: whatever is wrong with data, models or settings; the seeds began with different models.
    """
    variant = variants[0]
    seed_everything(variant.constants.seed)
    environment = variant.constants.env_specs
    problem = load_problem(variant.constants.dataset_name, environment.env_name, environment.backend)
    progress = Progress(folders[0].name if len(folders) == 1 else f"{folders[0].name} and {len(folders) - 1} more")
    about: dict[str, Any] = {"description": description} if description else {}
    if variant.is_policy:
        # A resumed run continues with the models that it began with, whatever has been trained since.
        recorded = [recorded_models(folder, root) for folder in folders]
        began_with = [models for models, _ in recorded if models]
        if any(models != began_with[0] for models in began_with):
            raise DydiffError(
                f"The runs in {', '.join(map(str, folders))} began with different models and cannot train together. Continue them "
                "one by one: --set seed=N --resume."
            )
        models = began_with[0] if began_with else {}
        if variant.constants.rl_trainer_params.real_ratio < 1 and not models:
            models = find_models(variant.constants, problem, root)
        # Scores of different simulators do not compare, so the name of this one stays beside them.
        about |= {"models": models, "model_digests": digest_models(models), "simulator": problem.simulator}
        for _, digests in recorded:
            check_unchanged(digests, about["model_digests"])
        trainers = build_policies(variants, problem, device, models, progress)
        stage = trainers[0] if len(trainers) == 1 else SeedTrainers(trainers)
        pace = trainers[0].updates_per_epoch
        length, unit = trainers[0].num_epochs * pace, "updates"
        kind, save_every = POLICY, variant.constants.rl_trainer_params.freq_saving
    else:
        stage = build_one_step(variant, problem, device)
        length, unit, pace = stage.fit.max_epochs, "epochs", 1
        kind, save_every = KINDS[variant.stage], 1
    runs = [Run(folder, kind, problem.dataset, each, about) for folder, each in zip(folders, settings, strict=True)]
    run = runs[0] if len(runs) == 1 else SeedRuns(runs)
    with progress:
        watch = progress.watch(stage, one_by_one=not variant.is_policy)
        drive(stage, run, save_every, watch, lambda: progress.begin(length, unit, stage.epoch * pace))


def train_diffusion(
    dataset_name: str,
    folder: Path,
    settings: dict[str, Any],
    network: dict[str, Any],
    include_action: bool,
    use_cond: bool,
    cond_on_action: bool,
    batch_size: int,
    micro_batch: int | None,
    duration: int,
    tick: int,
    lr: float,
    lr_ramp: float,
    half_life: float,
    precision: str,
    snapshot_ticks: int,
    state_ticks: int,
    seed: int,
    device: str,
    dry_run: bool,
    foreign_actions: float = 0.0,
) -> None:
    """Train a diffusion model in `folder`, resuming what is there. `duration`, `tick`, `lr_ramp`, `half_life` count samples.

    `network` holds the arguments of `build_trajectory_network` but for `data_dim`. With `dry_run` everything is loaded, built
    and checked, and nothing is written or trained.
    """
    seed_everything(seed)
    dataset = load_dataset(dataset_name)
    if dataset.environment in ENVIRONMENTS:  # the later stages insist on it, and this one takes longest
        fit_environment(dataset, dataset.environment)
    limits = Limits.from_dataset(dataset, include_action)
    windows = Windows(dataset, network["horizon"], limits, include_action, device)
    network = {**network, "data_dim": windows.dim}
    denoiser = build_denoiser(network, dataset.observation_dim).to(device)
    precision = choose_precision(precision, denoiser)
    size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    progress = Progress(folder.name)
    say(
        f"{dataset.name}: {len(dataset):,} rows, {len(windows):,} windows of {windows.horizon} x {windows.dim} "
        f"({windows.padding:.0%} of their rows padding); {network['kind']} with {size:.2f} M parameters on {device}, products in "
        f"{precision}."
    )
    if duration < WEAK * lr_ramp:
        say(
            f"With --duration {duration / 1e6:g} and --ramp {lr_ramp / 1e6:g} (millions of windows) Adam's step size gets to "
            f"{duration / lr_ramp:.2%} of --lr, which learns little. Take a smaller --ramp, such as {duration / 1e7:g}."
        )
    if dry_run:
        say("Dry run: everything fits; nothing was written.")
        return
    describe = {
        "network": network,
        "observation_dim": dataset.observation_dim,
        "include_action": include_action,
        "use_cond": use_cond,
        "cond_on_action": cond_on_action,
        "foreign_actions": foreign_actions,
    }
    stage = DiffusionTrainer(
        denoiser,
        windows,
        describe,
        batch_size,
        duration,
        tick,
        seed,
        lr,
        lr_ramp,
        half_life,
        micro_batch,
        snapshot_ticks,
        use_cond,
        cond_on_action,
        progress.advance,
        precision,
        foreign_actions,
    )
    run = Run(folder, DIFFUSION, dataset, settings)
    with progress:
        watch = progress.watch(stage, one_by_one=False)
        drive(stage, run, state_ticks, watch, lambda: progress.begin(duration, "samples", stage.seen))


def seed_everything(seed: int) -> None:
    """Seed torch's global generator: network initialisation and dropout draw from it."""
    torch.manual_seed(seed)
