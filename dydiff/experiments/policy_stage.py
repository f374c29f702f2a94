"""Builds policy training from an experiment's settings: agent, buffers, the models behind the rollouts, evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dydiff.agents import check_agent_settings, find_agent
from dydiff.config import Constants
from dydiff.data import make_transitions
from dydiff.device import has_idle_core
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.environments import NO_SIMULATOR
from dydiff.environments.terminal import NEVER, SETTING, TerminalFunction, apply_to_recorded, is_known, terminal_function
from dydiff.errors import DydiffError
from dydiff.evaluation_worker import EvaluationWorker, PolicyEvaluator, describe_evaluation
from dydiff.experiments.experiment import ALGORITHMS, OWN, Variant
from dydiff.importing import Importer, is_published
from dydiff.models import DIFFUSION, DYNAMICS, REWARD, load_diffusion_model, load_dynamics, load_reward
from dydiff.problem import Problem
from dydiff.progress import Progress, say
from dydiff.replay import ReplayBuffer
from dydiff.rollout import RolloutEngine
from dydiff.runs.model_files import find_model
from dydiff.trainer import Evaluation, PolicyTrainer, Rollouts, Saving

UPDATES_PER_EPOCH = {"td3_bc": 500, "cql": 500, "diffusion_ql": 250, OWN: 500}


def build_policies(
    variants: Sequence[Variant], problem: Problem, device: str, models: dict[str, list[str]], progress: Progress
) -> list[PolicyTrainer]:
    """The policy training of variants that differ in their seeds alone: agent, buffers, models behind the rollouts, evaluation.

    They share what does not change: real transitions, models, and the process that evaluates.
    """
    variant = variants[0]
    constants, dataset = variant.constants, problem.dataset
    params = constants.rl_trainer_params
    algorithm, describe = algorithm_of(variant.stage, constants), _agent_arguments(variant, problem)
    build_agent = find_agent(algorithm)
    if variant.stage == OWN:
        check_agent_settings(build_agent, constants.agent_params.arguments, "agent_params.arguments")
    spaces = problem.spaces.to(device)
    updates = params.num_train_steps_per_train_call or UPDATES_PER_EPOCH[variant.stage]
    evaluator = None
    if problem.spec is not None:
        description = describe_evaluation(
            algorithm,
            describe,
            spaces,
            problem.spec,
            params.num_steps_per_eval,
            params.max_path_length,
            constants.env_specs.env_num,
            device,
        )
        beside = has_idle_core(device) if params.evaluation_worker is None else params.evaluation_worker
        if beside:
            problem.spec.make().close()  # where that fails, it shall fail now, and not behind the first epoch
        evaluator = (EvaluationWorker if beside else PolicyEvaluator)(description)
    else:
        whose = "" if problem.environment == NO_SIMULATOR else f" of {problem.environment} ships with dydiff"
        say(f"No simulator{whose}: this run trains without evaluation.")
    real = ReplayBuffer.from_transitions(problem.policy_transitions(device), params.replay_buffer_size)
    rollouts = build_rollouts(constants, problem, device, models) if models else None
    saving = Saving(
        params.freq_saving,
        params.save_best,
        params.save_replay_buffer,
        params.save_model_replay_buffer,
        {"algorithm": algorithm, "model": describe, "environment": problem.environment, "simulator": problem.simulator},
    )

    def build(seed: int) -> PolicyTrainer:
        evaluation = None
        if evaluator is not None:
            fixed = constants.env_specs.eval_env_seed
            evaluation = Evaluation(evaluator, dataset.name, seed if fixed is None else fixed, params.eval_freq)
        return PolicyTrainer(
            build_agent(**describe, device=device, generator=torch.Generator().manual_seed(seed)),
            spaces,
            real,
            ReplayBuffer(params.model_replay_buffer_size, dataset.observation_dim, dataset.action_dim, device),
            rollouts,
            evaluation,
            saving,
            num_epochs=params.num_epochs,
            updates_per_epoch=updates,
            batch_size=params.batch_size,
            real_ratio=params.real_ratio,
            seed=seed,
            on_update=progress.advance,
            update_mode=params.update_mode,
            update_precision=params.update_precision,
            on_rollout=progress.tell,
        )

    return [build(each.constants.seed) for each in variants]


def algorithm_of(stage: str, constants: Constants) -> str:
    """The algorithm of a policy's run, as `find_agent` takes it."""
    return constants.agent_params.agent if stage == OWN else stage


def _agent_arguments(variant: Variant, problem: Problem) -> dict[str, Any]:
    constants = variant.constants
    (section,) = (section for section, name in ALGORITHMS.items() if name == variant.stage)
    own = constants.agent_params.arguments if variant.stage == OWN else dataclasses.asdict(getattr(constants, section))
    arguments = {"observation_dim": problem.dataset.observation_dim, "action_dim": problem.dataset.action_dim, **own}
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
    dynamics = load_dynamics(*files[DYNAMICS], dataset, device, problem.spaces)
    reward = load_reward(*files[REWARD], dataset, device, problem.spaces)
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
        models,
        dynamics,
        problem.spaces.to(device),
        horizon,
        sampler.iterative_times,
        min(params.each_rollout_size, params.rollout_batch_size),
        {
            "num_steps": sampler.num_steps,
            "s_churn": sampler.S_churn,
            "s_min": sampler.S_min,
            "s_max": sampler.S_max,
            "s_noise": sampler.S_noise,
            "inpaint_churn": sampler.inpaint_churn,
        },
        sampler.backend,
        fast if sampler.fast else None,
    )
    keep = params.keep_condition
    return Rollouts(
        engine,
        reward,
        _find_terminal_function(problem, constants.env_specs.terminal_function),
        params.rollout_batch_size,
        length,
        params.rollout_freq,
        keep.filter_type,
        keep.threshold,
        keep.softmax_temp,
    )


def _find_terminal_function(problem: Problem, chosen: str | None) -> TerminalFunction:
    """The function that ends rollouts: the chosen one, the environment's, or none where no recorded episode ends by itself."""
    dataset = problem.dataset
    if chosen is None and not is_known(problem.environment) and not dataset.terminals.any():
        return terminal_function(problem.environment, NEVER)
    function = terminal_function(problem.environment, chosen)
    if chosen is not None:
        stored = dataset.next_observations is not None
        recorded = make_transitions(dataset, next_observation="stored") if stored else problem.transitions
        terminal = torch.from_numpy(recorded.terminal != 0)
        done = apply_to_recorded(function, torch.from_numpy(recorded.next_observation))
        missed, invented = int((terminal & ~done).sum()), int((done & ~terminal).sum())
        # Without next_observations the row behind a terminal is another episode's first.
        misses = f", and misses {missed:,} of its {int(terminal.sum()):,} terminals" if stored else ""
        others = int((~terminal).sum())
        say(f"{SETTING}={chosen} ends {invented:,} of the dataset's {others:,} transitions that are no terminals{misses}.")
    return function


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
