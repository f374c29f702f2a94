"""The method: long rollouts of the learning policy inside the trajectory-diffusion model (SPEC section 5).

An autoregressive start with the single-step dynamics gives a first guess; then, a few times over, the diffusion model samples
trajectories around the policy's actions, the two are averaged, and the policy relabels every action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dydiff.arguments import as_rows, check_count, describe
from dydiff.backends import SamplingDenoiser
from dydiff.backends.choice import prepare_denoiser
from dydiff.capture import POLICY_REMEDY, GraphedFunction, captures, make_pool
from dydiff.data import Spaces, Transitions
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.diffusion.sampler import Draw, sample_edm
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.kernels import edm
from dydiff.memory import compute_in_chunks
from dydiff.ranges import named_range
from dydiff.reward import RewardModel
from dydiff.rollout_checks import TrainedModel, check_finite, check_policys_spaces, check_sampler, fitting_denoiser

KEPT_GRAPHS = 64  # combinations of policy, settings and starts whose CUDA graphs are kept, such as seeds that train together
Policy = Callable[[Tensor], Tensor]  # observation [B, O] -> action [B, A], both in policy space


class Actor(Protocol):
    """A policy that draws its actions from the rollout's generator: an agent, or what `load_policy` gives."""

    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Action [B, A] of observation [B, O], both in policy space."""


class Trajectory(NamedTuple):
    """B rollouts of H rows; row h holds the observation and the action taken in it."""

    observation: Tensor  # [B, H, O]
    action: Tensor  # [B, H, A]


class RolloutEngine:
    """Rolls a policy forward for a whole horizon from given start observations, all of it on the models' device.

    `denoisers` are one or more diffusion models (as loaded, or their denoisers) of these spaces and this horizon; with several, the
    starts are dealt out to them at random and evenly. `sampler` holds `sample_edm`'s settings; `fast`, if given, takes that
    sampler's place. `chunk_size` bounds how many starts are computed at a time, and is halved, for good, where the memory does not
    hold them.

    On a GPU a rollout is a CUDA graph from the first policy call to the last relabelling: with the same policy, generator and
    number of iterations, the second call of a batch size captures it and later ones replay it; a policy is the same if it compares
    equal, as an agent, a loaded policy and a bound method do and a new lambda or partial does not. `capture=False` never captures.

    Raises:
        DydiffError: no diffusion model, one of other spaces or another horizon or that was trained without what rollouts show it,
            or a setting that does not exist or cannot be.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser | TrainedModel],
        dynamics: DynamicsEnsemble,
        spaces: Spaces,
        horizon: int,
        iterations: int = 2,
        chunk_size: int = 2048,
        sampler: dict[str, float] | None = None,
        backend: str = "auto",
        fast: FastMode | None = None,
        capture: bool = True,
    ):
        if not isinstance(denoisers, Sequence):
            raise DydiffError(f"denoisers must be a list of diffusion models, not {describe(denoisers)}: put brackets around one.")
        if not denoisers:
            raise DydiffError("A rollout needs at least one diffusion model.")
        check_count("horizon", horizon, 1)
        check_count("iterations", iterations, 0)
        check_count("chunk_size (in files rl_trainer_params.each_rollout_size)", chunk_size, 1)
        check_sampler(sampler)
        if not isinstance(fast, FastMode | None):
            raise DydiffError(f"fast must be None or a dydiff.FastMode, for its defaults FastMode(), not {describe(fast)}.")
        if not isinstance(spaces, Spaces):
            raise DydiffError(f"spaces must be Spaces, as in load_problem(...).spaces, not {describe(spaces)}.")
        fitting = [fitting_denoiser(model, spaces, horizon) for model in denoisers]
        if not isinstance(getattr(dynamics, "predictor", None), Callable):
            raise DydiffError(f"dynamics must be what load_dynamics gives, or a DynamicsEnsemble, not {describe(dynamics)}.")
        self.denoisers = [prepare_denoiser(denoiser, backend, chunk_size) for denoiser in fitting]
        self.dynamics = dynamics
        self.spaces = spaces
        self.horizon = horizon
        self.iterations = iterations
        self.chunk_size = chunk_size
        self.sampler = dict(sampler or {})
        self.step_backend = "reference" if backend == "reference" else "auto"
        self.fast = fast
        self.capture = capture
        self._fitting_policy: Policy | Actor | None = None  # the last one
        self._captured: dict[tuple[object, ...], GraphedFunction] = {}  # by what the graphs belong to
        self._pool: tuple[int, int] | None = None  # the graphs' memory: one rollout runs at a time, and its result is copied

    @torch.no_grad()
    def roll_out(
        self,
        policy: Policy | Actor,
        start: Tensor,
        generator: torch.Generator,
        draw: Draw | None = None,
        iterations: int | None = None,
    ) -> Trajectory:
        """Roll `policy` forward from `start` [B, O]: H rows per start, all in policy space, float32.

        `policy` is a function of observations [B, O], or has a method `act` of observations and a generator, as agents and loaded
        policies do; its actions are then drawn from `generator`. That also gives the ensemble members, the model assignment and,
        unless `draw` gives it, the sampler's noise. `iterations` overrides the engine's; 0 returns the autoregressive start, which
        is the single-step model's rollout.

        Raises:
            DydiffError: an argument of another kind, shape or device, or a policy whose actions are.
            NotFinite: a NaN or an infinity in `start`, or in the rollout (names the first row and step that have one).
        """
        iterations = self.iterations if iterations is None else iterations
        check_count("iterations", iterations, 0)
        if not callable(getattr(policy, "act", policy)):
            raise DydiffError(f"policy must be a function of observations, an agent or a loaded policy, not {describe(policy)}.")
        remedy = "It holds observations in policy space: spaces.observation_raw_to_policy makes them of a tensor of raw ones."
        if policy is not self._fitting_policy:  # looking at numbers waits for the device
            check_policys_spaces(policy, self.spaces)
            self._fitting_policy = policy
        start = as_rows("start", start, None, self.spaces.observation_dim, self.spaces.device, remedy)
        if not isinstance(generator, torch.Generator) or generator.device.type != start.device.type:
            given = f"one on {generator.device}" if isinstance(generator, torch.Generator) else describe(generator)
            raise DydiffError(f"generator must be a torch.Generator on {start.device}, not {given}.")
        check_finite("start holds", start, "Take observations that are finite.")

        def roll_out_chunk(part: Tensor) -> tuple[Tensor, ...]:
            return self._chunk_function(policy, generator, draw, iterations, len(part))(part)

        setting = "rl_trainer_params.each_rollout_size"
        try:
            chunks = compute_in_chunks(roll_out_chunk, start, self.chunk_size, generator, self._halve, setting)
        except DydiffError:  # of a capture, perhaps, whose pool takes no other one
            self._drop_graphs()
            raise
        trajectory = Trajectory(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
        for name, values in trajectory._asdict().items():
            remedy = "The start was finite: look at the policy's weights and at the logs of the models that roll it out."
            check_finite(f"A rollout holds in its {name}", values, remedy)
        return trajectory

    def _halve(self, size: int) -> None:
        """Keep to smaller chunks from now on; graphs of the larger ones go, for they hold memory."""
        self.chunk_size = size
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._captured, self._pool = {}, None

    def _chunk_function(
        self, policy: Policy | Actor, generator: torch.Generator, draw: Draw | None, iterations: int, size: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """`_roll_out_chunk` of `size` starts [B, O] alone; on a GPU as the CUDA graph that belongs to these arguments."""
        act = partial(policy.act, generator=generator) if hasattr(policy, "act") else partial(_call_on_copy, policy)
        function = partial(self._roll_out_chunk, act, generator, draw, iterations)
        if not self.capture or draw is not None or not captures(generator.device):
            return function
        owner = (policy, generator, iterations, size, self.fast, *self.sampler.items())
        if owner not in self._captured:
            if len(self._captured) == KEPT_GRAPHS:  # each holds its outputs and its launches
                self._drop_graphs()  # all of them: into a pool that has lost its last graph PyTorch may capture no other
            self._pool = self._pool or make_pool()
            self._captured[owner] = GraphedFunction(function, generator.device, generator, pool=self._pool, remedy=POLICY_REMEDY)
        return self._captured[owner]

    def _noise(self, generator: torch.Generator, device: torch.device) -> Draw:
        """The sampler's noise: made by its compiled step where there is one, else drawn by PyTorch."""
        if self.fast is None and self.step_backend == "auto" and edm.available_backend(device, torch.float32) == "extension":
            return edm.PhiloxNoise(torch.randint(2**62, (), generator=generator, device=device))
        return lambda shape: torch.randn(shape, generator=generator, device=device)

    def _roll_out_chunk(
        self, policy: Policy, generator: torch.Generator, draw: Draw | None, iterations: int, start: Tensor
    ) -> Trajectory:
        """Everything between the first and the last line is in model space; policy and dynamics are wrapped at its edge.

        Nothing here may wait for the device: on a GPU it is captured.
        """
        draw = draw or self._noise(generator, start.device)
        first = self.spaces.observation_policy_to_model(start)
        with named_range("autoregressive start"):
            observation, action = self._start_autoregressively(policy, first, generator)
        for iteration in range(iterations):
            warm = self.fast is not None and iteration > 0
            guess = torch.cat([observation, action], dim=-1) if warm else None
            with named_range("sampler"):
                sampled = self._sample(first, action, generator, draw, guess)
            observation = (observation + sampled[..., : self.spaces.observation_dim]) / 2
            with named_range("relabel"):
                action = self._act(policy, self.spaces.observation_model_to_policy(observation))
        return Trajectory(self.spaces.observation_model_to_policy(observation), self.spaces.action_model_to_policy(action))

    def _act(self, policy: Policy, observation: Tensor) -> Tensor:
        """The policy's actions, in model space, for observations [..., O] in policy space."""
        rows = observation.flatten(0, -2)
        remedy = "It holds the action, in [-1, 1], of every observation that the policy was given."
        action = as_rows("What the policy returns", policy(rows), len(rows), self.spaces.action_dim, rows.device, remedy)
        return self.spaces.action_policy_to_model(action).unflatten(0, observation.shape[:-1])

    def _start_autoregressively(self, policy: Policy, first: Tensor, generator: torch.Generator) -> Trajectory:
        """The single-step rollout, o[h+1] = f(o[h], policy(o[h])): first [B, O] -> H rows, all in model space."""
        seen = self.spaces.observation_model_to_policy(first)
        observations, actions = [first], [self._act(policy, seen)]
        predict = self.dynamics.predictor()
        for _ in range(self.horizon - 1):
            following = predict(seen, self.spaces.action_model_to_policy(actions[-1]), generator)
            observations.append(self.spaces.observation_policy_to_model(following))
            seen = self.spaces.observation_model_to_policy(observations[-1])
            actions.append(self._act(policy, seen))
        return Trajectory(torch.stack(observations, dim=1), torch.stack(actions, dim=1))

    def _sample(self, first: Tensor, action: Tensor, generator: torch.Generator, draw: Draw, guess: Tensor | None) -> Tensor:
        """Diffusion samples [B, H, D] around the given first observations and actions; fast mode starts from a `guess`."""
        width = first.shape[-1] + action.shape[-1]

        def sample(denoiser: SamplingDenoiser, rows: Tensor | slice) -> Tensor:
            condition = first[rows].contiguous(), action[rows].contiguous()
            shape = (len(condition[0]), self.horizon, width)
            if self.fast is not None:
                return self.fast.sample(denoiser, shape, draw, *condition, None if guess is None else guess[rows])
            if isinstance(draw, edm.PhiloxNoise):
                draw.advance()
            return sample_edm(denoiser, shape, draw, *condition, backend=self.step_backend, **self.sampler)

        if len(self.denoisers) == 1:
            return sample(self.denoisers[0], slice(None))
        # As many places for every model; those behind the last start are filled with copies, so that none is preferred.
        places = -(-len(first) // len(self.denoisers)) * len(self.denoisers)
        order = torch.rand(places, generator=generator, device=first.device).argsort()
        sampled = first.new_empty(places, self.horizon, width)
        for denoiser, own in zip(self.denoisers, order.tensor_split(len(self.denoisers)), strict=True):
            if len(own):
                sampled[own] = sample(denoiser, own % len(first))
        return sampled[: len(first)]


def _call_on_copy(policy: Policy, observation: Tensor) -> Tensor:
    """What anybody's function does to its argument is nothing to the rollout."""
    return policy(observation.clone())


@torch.no_grad()
def score(reward_model: RewardModel, trajectory: Trajectory) -> Tensor:
    """Sum of the modelled reward over all H rows: [B] (SPEC section 6).

    Raises:
        DydiffError: something else in the place of one of them.
    """
    rewards = callable(reward_model) and not isinstance(reward_model, DynamicsEnsemble)
    for name, value, fits, remedy in (
        ("reward_model", reward_model, rewards, "what load_reward gives"),
        ("trajectory", trajectory, isinstance(trajectory, Trajectory), "what RolloutEngine.roll_out gives"),
    ):
        if not fits:
            raise DydiffError(f"{name} must be {remedy}, not {describe(value)}.")
    return reward_model(trajectory.observation, trajectory.action).sum(dim=1)


@torch.no_grad()
def make_synthetic_transitions(
    trajectory: Trajectory, reward_model: RewardModel, is_terminal: Callable[[Tensor], Tensor], spaces: Spaces
) -> tuple[Transitions, Tensor]:
    """Cut kept rollouts into transitions (SPEC section 6).

    Each rollout gives (o[h], a[h], r(o[h], a[h]), o[h+1], done[h]) for h = 0 .. H-2 and stops after its first done; `done` is
    the environment's terminal function on raw next observations. Returns the transitions in policy space, step by step over the
    rollouts, and the mean number of transitions per rollout (0-dim).
    """
    observation, action = trajectory.observation[:, :-1], trajectory.action[:, :-1]  # [K, H-1, ...]
    following = trajectory.observation[:, 1:]
    done = is_terminal(spaces.observation_policy_to_raw(following))  # [K, H-1]
    alive = (done.cumsum(dim=1) - done.int()) == 0  # no done before this step
    every = Transitions(observation, action, reward_model(observation, action), following, done.float())
    by_step = alive.T
    kept = Transitions(*(field.transpose(0, 1)[by_step] for field in every))
    return kept, alive.sum() / len(alive)
