"""Models against the simulator: one policy rolled out in all of them from the same states, and how far they part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dydiff import rollout
from dydiff.backends.choice import prepare_denoiser
from dydiff.data import Spaces
from dydiff.data.windows import find_windows
from dydiff.diffusion.sampler import sample_edm
from dydiff.environments import EnvironmentSpec
from dydiff.environments.simulate import CUT_VELOCITY, SimulatedTrajectories, roll_out_simulator, state_from_observation
from dydiff.errors import DydiffError
from dydiff.models import DiffusionModel, in_raw_space
from dydiff.problem import Problem
from dydiff.reports.deviation import TRUE_STATES, Comparison
from dydiff.reports.policy_runs import Subject
from dydiff.rollout import RolloutEngine, Trajectory
from dydiff.trainer import Rollouts

NO_MOTION, SINGLE_STEP, DYDIFF = "no motion", "single-step", "DyDiff"

Model = Callable[[rollout.Policy, Tensor], Trajectory]  # a policy and starts [B, O], all in policy space


@dataclass
class Cases:
    """Where rollouts start, and what the data's behaviour policy did from there."""

    start: np.ndarray  # [B, O] raw
    action: np.ndarray  # [B, H, A] raw, as recorded; the last one is repeated behind the end of an episode
    known: np.ndarray  # [B, H] bool: the action is recorded, or the episode had ended in a terminal state


class RecordedActions:
    """Plays actions [B, H, A] in policy space whatever is observed: row by row, or all rows of B starts at once."""

    def __init__(self, action: Tensor):
        self.action = action
        self.step = 0

    def __call__(self, observation: Tensor) -> Tensor:
        count, horizon = self.action.shape[:2]
        if len(observation) == count * horizon:
            return self.action.flatten(0, 1)
        if len(observation) != count:
            raise DydiffError(f"Actions are recorded for {count} starts, and cannot be played from {len(observation)}.")
        step, self.step = self.step, (self.step + 1) % horizon
        return self.action[:, step]


def draw_starts(problem: Problem, count: int, seed: int) -> np.ndarray:
    """`count` random rows of the data [B] whose observations tell the simulator's state, as indices into its transitions."""
    known = np.flatnonzero(_tells_state(problem.spec, problem.transitions.observation))
    return np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False)


def draw_cases(problem: Problem, horizon: int, count: int, seed: int) -> Cases:
    """`count` random windows of the data: those with an action for every row if there are enough, else also shorter ones."""
    dataset = problem.dataset
    first, length = find_windows(dataset, horizon)
    usable = _tells_state(problem.spec, dataset.observations[first])
    over = dataset.terminals[first + length - 1]
    whole = usable & ((length == horizon) | over)
    rows = np.flatnonzero(whole if whole.sum() >= count else usable)
    rows = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
    first, length, over = first[rows, None], length[rows, None], over[rows, None]
    step = np.arange(horizon)
    return Cases(
        dataset.observations[first[:, 0]],
        dataset.actions[first + np.minimum(step, length - 1)],
        (step < length) | over,
    )


def engine_model(engine: RolloutEngine, iterations: int, seed: int) -> Model:
    """Rollouts of an engine; with 0 iterations, of its single-step model."""
    engine = copy.copy(engine)
    engine.capture = False  # of a policy that is rolled out once, nothing is replayed

    def model(policy: rollout.Policy, start: Tensor) -> Trajectory:
        if isinstance(policy, RecordedActions):  # they belong to all starts in their order
            engine.chunk_size = len(start)
        generator = torch.Generator(start.device).manual_seed(seed)
        return engine.roll_out(policy, start, generator, iterations=iterations)

    return model


def uninjected_model(diffusion: DiffusionModel, engine: RolloutEngine, seed: int) -> Model:
    """Samples of a diffusion model given the first observation alone: the data's behaviour, whatever the policy is.

    `engine` has the sampler's settings and the spaces.

    Raises:
        DydiffError: the model was trained to be given actions, or does not model them.
    """
    manifest = diffusion.manifest
    if manifest["cond_on_action"] or not manifest["include_action"]:
        raise DydiffError(
            "Sampling without injected actions needs a diffusion model that was trained with --cond_on_action False and "
            "--include_action True; this one was trained otherwise."
        )
    if diffusion.horizon != engine.horizon:
        raise DydiffError(f"The uninjected model has horizon {diffusion.horizon}, the injected one {engine.horizon}.")
    denoiser, spaces = prepare_denoiser(diffusion.denoiser, "auto"), engine.spaces

    def model(policy: rollout.Policy, start: Tensor) -> Trajectory:
        generator = torch.Generator(start.device).manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=start.device)

        first = spaces.observation_policy_to_model(start)
        shape = (len(start), diffusion.horizon, manifest["network"]["data_dim"])
        sampled = sample_edm(denoiser, shape, draw, first, backend=engine.step_backend, **engine.sampler)
        observation, action = sampled.split([spaces.observation_dim, shape[-1] - spaces.observation_dim], dim=-1)
        return Trajectory(spaces.observation_model_to_policy(observation), spaces.action_model_to_policy(action))

    return model


def compare_models(
    models: dict[str, Model],
    rollouts: Rollouts,
    problem: Problem,
    start: np.ndarray,
    policy: rollout.Policy | None = None,
    cases: Cases | None = None,
) -> Comparison:
    """Roll out from raw `start` [B, O] in the simulator and in the models: a policy closed loop, or else the cases' actions.

    `rollouts` has the reward model and the terminal function. A model that stays where it starts joins the given ones, and the
    reward model on the simulator's own states.
    """
    spec, spaces, horizon = problem.spec, rollouts.engine.spaces, rollouts.engine.horizon

    def to_policy(raw: np.ndarray) -> Tensor:
        return spaces.observation_raw_to_policy(torch.as_tensor(raw, dtype=torch.float32).to(spaces.device))

    state = state_from_observation(spec, start)
    if policy is not None:
        truth = roll_out_simulator(spec, *state, horizon, in_raw_space(policy, spaces))
    else:
        truth = roll_out_simulator(spec, *state, horizon, actions=cases.action)
        policy = RecordedActions(spaces.action_raw_to_policy(torch.as_tensor(cases.action).to(spaces.device)))
    true_action = spaces.action_raw_to_policy(torch.as_tensor(truth.action).to(spaces.device))

    first = to_policy(start)
    trajectories = {
        NO_MOTION: Trajectory(*(field[:, None].expand(-1, horizon, -1) for field in (first, true_action[:, 0]))),
        **{name: model(policy, first) for name, model in models.items()},
        TRUE_STATES: Trajectory(to_policy(truth.observation), true_action),
    }
    modelled = {name: _to_raw(trajectory, rollouts, spaces) for name, trajectory in trajectories.items()}
    known = np.ones(truth.terminal.shape, bool) if cases is None else cases.known
    return Comparison(truth, modelled, known)


def compare_rollouts(engines: dict[str, RolloutEngine], subject: Subject, starts: int, seed: int) -> Comparison:
    """Roll a run's policy out from `starts` random states of the data: in the simulator, single-step, and by every engine.

    A policy that samples draws the same in all of them.
    """
    problem, rollouts, agent = subject.problem, subject.rollouts, subject.policy.agent

    def policy() -> rollout.Policy:
        return partial(agent.act, generator=torch.Generator(problem.spaces.device).manual_seed(seed))

    models = {SINGLE_STEP: engine_model(rollouts.engine, 0, seed)}
    models |= {name: engine_model(engine, engine.iterations, seed) for name, engine in engines.items()}
    models = {name: lambda _, start, model=model: model(policy(), start) for name, model in models.items()}
    start = problem.transitions.observation[draw_starts(problem, starts, seed)]
    return compare_models(models, rollouts, problem, start, policy())


def _tells_state(spec: EnvironmentSpec, observation: np.ndarray) -> np.ndarray:
    """Hopper and walker2d cut observed velocities off at exactly 10: such a row [n, O] does not tell its state. [n] bool"""
    return (np.abs(state_from_observation(spec, observation)[1]) != CUT_VELOCITY).all(axis=1)


@torch.no_grad()
def _to_raw(trajectory: Trajectory, rollouts: Rollouts, spaces: Spaces) -> SimulatedTrajectories:
    observation = spaces.observation_policy_to_raw(trajectory.observation)
    terminal = torch.zeros(observation.shape[:2], dtype=torch.bool, device=observation.device)
    terminal[:, :-1] = rollouts.is_terminal(observation[:, 1:])
    reward = rollouts.reward_model(trajectory.observation, trajectory.action)
    fields = observation, spaces.action_policy_to_raw(trajectory.action), reward, terminal
    return SimulatedTrajectories(*(field.cpu().numpy() for field in fields))
