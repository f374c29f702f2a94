"""Builds each stage (diffusion, dynamics, reward, policy) from its settings and runs it inside a run folder.

This is the one module that sees both the settings and the parts; everything below it takes plain arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydiff.agents import AGENTS
from dydiff.config import Constants
from dydiff.data import Dataset, Limits, Spaces, Transitions, Windows, load_dataset, make_transitions
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.diffusion.training import DiffusionTrainer, choose_precision
from dydiff.dynamics import DynamicsEnsemble
from dydiff.environments import (
    WITHOUT_SIMULATOR,
    EnvironmentSpec,
    environment_name,
    environment_spec,
)
from dydiff.errors import DydiffError
from dydiff.evaluate import Evaluator
from dydiff.experiment import ALGORITHMS, Variant
from dydiff.fit import Fit
from dydiff.importing import Importer, is_published
from dydiff.models import (
    DIFFUSION,
    DYNAMICS,
    POLICY,
    REWARD,
    build_denoiser,
    load_diffusion_model,
    load_dynamics,
    load_reward,
)
from dydiff.progress import Progress
from dydiff.replay import ReplayBuffer
from dydiff.reward import RewardModel
from dydiff.rollout import RolloutEngine
from dydiff.runs import Run, drive, find_model, read_run
from dydiff.terminal import terminal_function
from dydiff.trainer import Evaluation, PolicyTrainer, Rollouts, Saving

UPDATES_PER_EPOCH = {"td3_bc": 500, "cql": 500, "diffusion_ql": 250}
KINDS = {"dynamics": DYNAMICS, "reward": REWARD}


@dataclass
class Problem:
    """A dataset with its environment: what every stage but the diffusion model starts from."""

    dataset: Dataset
    environment: str
    spec: EnvironmentSpec | None  # None where no simulator ships
    transitions: Transitions  # raw, numpy
    spaces: Spaces

    @property
    def simulator(self) -> str:
        """The name and version of the simulator, which stand beside every score: scores of two simulators do not compare."""
        return self.spec.simulator if self.spec else "none"

    def policy_transitions(self, device: str) -> Transitions:
        """The transitions in policy space on `device`."""
        return self.spaces.transitions_to_policy(self.transitions, device)


def load_problem(dataset_name: str, env_name: str | None = None, backend: str | None = None) -> Problem:
    """Load a dataset and tie it to its environment, on the simulator `backend` (None: `Dataset.backend`, where it is known).

    Raises:
        DydiffError: no such dataset, environment or simulator of it, or they do not fit (dimensions, actions outside the box).
    """
    dataset = load_dataset(dataset_name)
    if env_name is None and dataset.environment is None:
        raise DydiffError(
            f"Dataset '{dataset.name}' does not say which environment it is from. Set env_specs.env_name (for example hopper)."
        )
    environment = environment_name(env_name or dataset.environment)
    known = backend or (dataset.backend if environment == dataset.environment else None)
    spec = None if environment in WITHOUT_SIMULATOR else environment_spec(environment, known)
    if spec is not None:
        ours, theirs = (dataset.observation_dim, dataset.action_dim), (spec.observation_dim, spec.action_dim)
        if ours != theirs:
            raise DydiffError(
                f"Dataset '{dataset.name}' has {ours[0]} observation and {ours[1]} action columns, but {environment} has "
                f"{theirs[0]} and {theirs[1]} ({spec.backend}). Correct env_specs.env_name, env_specs.backend or the dataset."
            )
    low = np.array(spec.action_low if spec else [-1.0] * dataset.action_dim, np.float32)
    high = np.array(spec.action_high if spec else [1.0] * dataset.action_dim, np.float32)
    outside = (dataset.actions < low - 1e-3) | (dataset.actions > high + 1e-3)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DydiffError(
            f"Dataset '{dataset.name}' holds {int(outside.any(axis=1).sum()):,} actions outside the range of {environment}, "
            f"first in row {row}, column {column}: {dataset.actions[row, column]:g} is not in "
            f"[{low[column]:g}, {high[column]:g}]. Rescale or clip the actions in the file."
        )
    transitions = make_transitions(dataset)
    return Problem(dataset, environment, spec, transitions, Spaces.from_dataset(dataset, transitions, low, high))


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
    return OneStepStage(fit, KINDS[variant.stage], {"model": describe})


def build_policy(
    variant: Variant, problem: Problem, device: str, models: dict[str, list[str]], progress: Progress
) -> PolicyTrainer:
    """The policy training of an experiment: agent, buffers, models behind the rollouts, evaluation."""
    constants, dataset = variant.constants, problem.dataset
    params = constants.rl_trainer_params
    describe = _agent_arguments(variant, problem)
    agent = AGENTS[variant.stage](**describe, device=device, generator=torch.Generator().manual_seed(constants.seed))
    spaces = problem.spaces.to(device)
    updates = params.num_train_steps_per_train_call or UPDATES_PER_EPOCH[variant.stage]
    evaluation = None
    if problem.spec is not None:
        evaluator = Evaluator(problem.spec, params.num_steps_per_eval, params.max_path_length, constants.env_specs.env_num)
        seed = constants.env_specs.eval_env_seed
        evaluation = Evaluation(evaluator, dataset.name, constants.seed if seed is None else seed, params.eval_freq)
    else:
        progress.say(f"No simulator of {problem.environment} ships with dydiff: this run trains without evaluation.")
    return PolicyTrainer(
        agent,
        spaces,
        real=ReplayBuffer.from_transitions(problem.policy_transitions(device), params.replay_buffer_size),
        synthetic=ReplayBuffer(params.model_replay_buffer_size, dataset.observation_dim, dataset.action_dim, agent.device),
        rollouts=build_rollouts(constants, problem, device, models) if models else None,
        evaluation=evaluation,
        saving=Saving(
            params.freq_saving,
            params.save_best,
            params.save_replay_buffer,
            params.save_model_replay_buffer,
            {
                "algorithm": variant.stage,
                "model": describe,
                "environment": problem.environment,
                "simulator": problem.simulator,
            },
        ),
        num_epochs=params.num_epochs,
        updates_per_epoch=updates,
        batch_size=params.batch_size,
        real_ratio=params.real_ratio,
        seed=constants.seed,
        on_update=progress.advance,
        update_mode=params.update_mode,
    )


def _agent_arguments(variant: Variant, problem: Problem) -> dict[str, Any]:
    constants = variant.constants
    (section,) = (section for section, name in ALGORITHMS.items() if name == variant.stage)
    arguments = {
        "observation_dim": problem.dataset.observation_dim,
        "action_dim": problem.dataset.action_dim,
        **dataclasses.asdict(getattr(constants, section)),
    }
    if variant.stage == "diffusion_ql":
        arguments["num_epochs"] = constants.rl_trainer_params.num_epochs  # the span of its learning-rate decay
    return arguments


def find_models(constants: Constants, problem: Problem, root: Path) -> dict[str, list[str]]:
    """The checkpoints that a run's settings name, by kind; `auto` and published files are looked up and converted under `root`.

    Raises:
        DydiffError: a model is missing.
    """
    paths = constants.diff_model_params.model_paths
    wanted = {
        DIFFUSION: [paths] if isinstance(paths, str) else paths,
        DYNAMICS: [constants.dyn_model_params.load_path],
        REWARD: [constants.model_params.load_path],
    }
    if not wanted[DIFFUSION]:
        raise DydiffError("diff_model_params.model_paths is empty; name a diffusion model, or use 'auto'.")
    return {kind: [str(_find(problem, root, kind, path).resolve()) for path in named] for kind, named in wanted.items()}


def build_rollouts(constants: Constants, problem: Problem, device: str, files: dict[str, list[str]]) -> Rollouts:
    """The models of a DyDiff run (`files` as `find_models` gives them) and the settings of its rollouts.

    Raises:
        DydiffError: a model is missing, was trained on other data, or does not fit the others or the settings.
    """
    params, dataset = constants.rl_trainer_params, problem.dataset
    models = [load_diffusion_model(file, dataset, device) for file in files[DIFFUSION]]
    for model in models:
        if not model.manifest["include_action"]:
            raise DydiffError(
                "The diffusion model was trained with --include_action=False; rollouts inject actions. Train another."
            )
        if model.horizon != models[0].horizon:
            raise DydiffError(f"The diffusion models differ in their horizon: {[each.horizon for each in models]}.")
    dynamics, reward = load_dynamics(*files[DYNAMICS], dataset, device), load_reward(*files[REWARD], dataset, device)
    horizon = models[0].horizon
    length = horizon if params.rollout_length == -1 else params.rollout_length
    if not 2 <= length <= horizon:
        raise DydiffError(
            f"rl_trainer_params.rollout_length must be -1 or between 2 and the diffusion model's horizon {horizon}, "
            f"not {length}."
        )
    sampler = constants.sampler_kwargs
    fast = FastMode(sampler.fast_first_evaluations, sampler.fast_warm_sigma, sampler.fast_warm_evaluations)
    engine = RolloutEngine(
        [model.denoiser for model in models],
        dynamics,
        problem.spaces.to(device),
        horizon,
        sampler.iterative_times,
        params.each_rollout_size,
        {
            "num_steps": sampler.num_steps,
            "s_churn": sampler.S_churn,
            "s_min": sampler.S_min,
            "s_max": sampler.S_max,
            "s_noise": sampler.S_noise,
        },
        sampler.backend,
        fast if sampler.fast else None,
    )
    keep = params.keep_condition
    return Rollouts(
        engine,
        reward,
        terminal_function(problem.environment),
        params.rollout_batch_size,
        length,
        params.rollout_freq,
        keep.filter_type,
        keep.threshold,
        keep.softmax_temp,
    )


def make_importer(problem: Problem, horizon: int | None = None) -> Importer:
    """What ties published checkpoints to the problem's dataset; `horizon` is for diffusion models that do not say theirs."""
    return Importer(problem.dataset, problem.spaces, problem.transitions, problem.environment, horizon)


def _find(problem: Problem, root: Path, kind: str, path: str) -> Path:
    """`find_model`, where a published file stands for the checkpoint that it is converted to, under `root`."""
    file = find_model(root, kind, problem.dataset, path)
    if not is_published(file):
        return file
    checkpoint, notes = make_importer(problem).find(file, kind, root / "imported")
    for note in notes:
        print(f"{file.name}: {note}")
    return checkpoint


def run_variant(
    variant: Variant, folder: Path, root: Path, device: str, settings: dict[str, Any], description: str = ""
) -> None:
    """Train one variant of an experiment in `folder`, resuming what is there; models are looked up under `root`.

    `settings` identify the run; `description` is free text that is kept with it.
    """
    seed_everything(variant.constants.seed)
    environment = variant.constants.env_specs
    problem = load_problem(variant.constants.dataset_name, environment.env_name, environment.backend)
    progress = Progress(folder.name)
    about: dict[str, Any] = {"description": description} if description else {}
    if variant.is_policy:
        # A resumed run continues with the models that it began with, whatever has been trained since.
        models = (read_run(folder) or {}).get("models", {})
        if variant.constants.rl_trainer_params.real_ratio < 1 and not models:
            models = find_models(variant.constants, problem, root)
        # Scores of different simulators do not compare, so the name of this one stays beside them.
        about |= {"models": models, "simulator": problem.simulator}
        stage = build_policy(variant, problem, device, models, progress)
        length, unit = stage.num_epochs * stage.updates_per_epoch, "updates"
        kind, save_every = POLICY, variant.constants.rl_trainer_params.freq_saving
    else:
        stage = build_one_step(variant, problem, device)
        length, unit = stage.fit.max_epochs, "epochs"
        kind, save_every = KINDS[variant.stage], 1
    run = Run(folder, kind, problem.dataset, settings, about)
    progress.begin(length, unit)
    with progress:
        drive(stage, run, save_every, progress.watch(stage, one_by_one=not variant.is_policy))


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
    half_life: float,
    precision: str,
    snapshot_ticks: int,
    state_ticks: int,
    seed: int,
    device: str,
    dry_run: bool,
) -> None:
    """Train a diffusion model in `folder`, resuming what is there. `duration`, `tick`, `half_life` count samples.

    `network` holds the arguments of `build_trajectory_network` but for `data_dim`. With `dry_run` everything is loaded, built
    and checked, and nothing is written or trained.
    """
    seed_everything(seed)
    dataset = load_dataset(dataset_name)
    limits = Limits.from_dataset(dataset, include_action)
    windows = Windows(dataset, network["horizon"], limits, include_action, device)
    network = {**network, "data_dim": windows.dim}
    denoiser = build_denoiser(network, dataset.observation_dim).to(device)
    precision = choose_precision(precision, denoiser)
    size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    progress = Progress(folder.name)
    progress.say(
        f"{dataset.name}: {len(dataset):,} rows, {len(windows):,} windows of {windows.horizon} x {windows.dim}; "
        f"{network['kind']} with {size:.2f} M parameters on {device}, products in {precision}."
    )
    if dry_run:
        progress.say("Dry run: everything fits; nothing was written.")
        return
    describe = {
        "network": network,
        "observation_dim": dataset.observation_dim,
        "include_action": include_action,
        "use_cond": use_cond,
        "cond_on_action": cond_on_action,
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
        half_life,
        micro_batch,
        snapshot_ticks,
        use_cond,
        cond_on_action,
        progress.advance,
        precision,
    )
    run = Run(folder, DIFFUSION, dataset, settings)
    progress.begin(duration, "samples")
    with progress:
        drive(stage, run, state_ticks, progress.watch(stage, one_by_one=False))


def seed_everything(seed: int) -> None:
    """Seed torch's global generator: network initialisation and dropout draw from it."""
    torch.manual_seed(seed)
