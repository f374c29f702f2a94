"""The computations that are timed: random models of full size and their inputs, and every variant's way through the cases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from baselines import PlainUNet, PublishedDenoiser, roll_out, sample_published, start_published
from stock import Captured, StockDenoiser, StockStart
from torch import Tensor

from dydiff.backends import BACKENDS, IN_16_BIT
from dydiff.capture import capture_if_gpu
from dydiff.data import Limits, Spaces, ZScore
from dydiff.device import has_fast_bf16
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.diffusion.sampler import Draw, sample_edm
from dydiff.dynamics import DynamicsEnsemble
from dydiff.kernels import edm
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.networks.unet import UNet
from dydiff.rollout import RolloutEngine

OBSERVATION_DIM, ACTION_DIM = 11, 3  # hopper
OURS = tuple(name for name in BACKENDS if name != "auto")
ITERATIONS, NUM_STEPS = 2, 34
SEED = 0


@dataclass(frozen=True)
class Shape:
    """One row of a sweep."""

    batch: int
    horizon: int
    dim: int
    dim_mults: tuple[int, ...]


class Workload:
    """Random models and inputs of one shape; the same on every machine and in every process.

    `num_steps` are the sampler's in a rollout, `sampler_steps` in a pass of its own.
    """

    def __init__(self, shape: Shape, device: str, num_steps: int = NUM_STEPS, sampler_steps: int = NUM_STEPS):
        self.shape = shape
        self.device = device
        self.num_steps = num_steps
        self.sampler_steps = sampler_steps
        generator = torch.Generator().manual_seed(SEED)
        width = OBSERVATION_DIM + ACTION_DIM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.network = UNet(width, shape.horizon, shape.dim, shape.dim_mults).to(device).eval().requires_grad_(False)
        self.denoiser = Denoiser(self.network, OBSERVATION_DIM)
        self.dynamics = DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM, generator=generator).to(device).requires_grad_(False)
        policy = TanhGaussianPolicy(OBSERVATION_DIM, ACTION_DIM, generator=generator).to(device).requires_grad_(False)
        self.policy = policy.mean_action
        limits = Limits(torch.full((width,), -3.0), torch.full((width,), 3.0))
        z_score = ZScore(torch.zeros(OBSERVATION_DIM), torch.ones(OBSERVATION_DIM))
        self.spaces = Spaces(limits, z_score, -torch.ones(ACTION_DIM), torch.ones(ACTION_DIM)).to(device)
        self.start = torch.randn(shape.batch, OBSERVATION_DIM, generator=generator).to(device)  # policy space
        self.first = self.spaces.observation_policy_to_model(self.start)
        self.model_input = torch.randn(shape.batch, shape.horizon, width, generator=generator).to(device)
        self.actions = torch.rand(shape.batch, shape.horizon, ACTION_DIM, generator=generator).to(device) * 2 - 1
        self.sample_shape = (shape.batch, shape.horizon, width)
        self._noise: list[list[Tensor]] = []  # by pass

    def generator(self) -> torch.Generator:
        """The randomness of one call of a `RolloutEngine`."""
        return torch.Generator(self.device).manual_seed(SEED)

    def begin(self) -> tuple[torch.Generator, Tensor]:
        """The same behind the first number that an engine with noise of its own draws from it: the seed of that noise."""
        generator = self.generator()
        return generator, torch.randint(2**62, (), generator=generator, device=self.device)

    def engine_noise(self) -> edm.PhiloxNoise:
        """The noise that such an engine makes in its sampler step, about to begin its first pass."""
        return edm.PhiloxNoise(self.begin()[1])

    def recorded_noise(self, num_steps: int) -> Draw:
        """The same ready-made, for passes of `num_steps`: so all variants compute the same, and here noise costs nothing."""
        if not self._noise:
            noise, longest = self.engine_noise(), max(self.num_steps, self.sampler_steps)
            for _ in range(ITERATIONS):
                noise.advance()
                draws = [noise(self.sample_shape) for _ in range(longest + 1)]  # the latents, and once a step
                self._noise.append([edm.philox_normal(draw.state, draw.index, self.sample_shape) for draw in draws])
        recorded = iter([draw for draws in self._noise for draw in draws[: num_steps + 1]])
        return lambda shape: next(recorded)

    def act(self, observation: Tensor) -> Tensor:
        """The policy in model space."""
        return self.spaces.action_policy_to_model(self.policy(self.spaces.observation_model_to_policy(observation)))

    def to_policy(self, observation: Tensor, action: Tensor) -> Tensor:
        """A trajectory [B, H, D] in policy space, which is how rollouts are handed over."""
        parts = self.spaces.observation_model_to_policy(observation), self.spaces.action_model_to_policy(action)
        return torch.cat(parts, dim=-1)

    def draw_elites(self, generator: torch.Generator) -> Tensor:
        """Ensemble members for every step of the start [H-1, B]."""
        draws = [self.dynamics.draw_elite(self.shape.batch, generator) for _ in range(self.shape.horizon - 1)]
        return torch.stack(draws)

    def plain_network(self, flat: bool) -> PlainUNet:
        weights, shape = self.network.state_dict(), self.shape
        with torch.device("meta"):  # the weights are there already
            network = PlainUNet(weights, OBSERVATION_DIM + ACTION_DIM, shape.dim, shape.dim_mults, flat)
        return network.to(self.device).eval().requires_grad_(False)


class Runner:
    """A variant's way to compute every case of a workload; cases are methods of their names."""

    dtype: str  # of the matrix products, as harness.LIMITS names it
    detail = ""
    fast: FastMode | None = None

    def __init__(self, work: Workload):
        self.work = work

    def evaluations(self, case: str) -> int:
        """Network evaluations of a case."""
        work = self.work
        if self.fast is not None:
            sampler, first, later = self.fast.first_evaluations, self.fast.first_evaluations, self.fast.warm_evaluations
        else:
            sampler, first, later = (2 * steps - 1 for steps in (work.sampler_steps, work.num_steps, work.num_steps))
        return {"evaluation": 1, "start": 0, "sampler": sampler, "rollout": first + (ITERATIONS - 1) * later}[case]


class Baseline(Runner):
    """What the two baselines share: `start_from`, `sample_around` and `denoiser` are theirs."""

    def evaluation(self) -> Tensor:
        return self.denoiser.evaluate(self.work.model_input, 1.0)

    def start(self) -> Tensor:
        elites = self.work.draw_elites(self.work.begin()[0])
        return self.work.to_policy(*self.start_from(self.work.first, elites))

    def sampler(self) -> Tensor:
        work = self.work
        return self.sample_around(work.recorded_noise(work.sampler_steps), work.sampler_steps, work.first, work.actions).float()

    def rollout(self) -> Tensor:
        work = self.work
        first = work.spaces.observation_policy_to_model(work.start)
        elites = work.draw_elites(work.begin()[0])
        sample = partial(self.sample_around, work.recorded_noise(work.num_steps), work.num_steps)
        return work.to_policy(*roll_out(lambda first: self.start_from(first, elites), sample, work.act, first, ITERATIONS))


class Published(Baseline):
    def __init__(self, work: Workload):
        super().__init__(work)
        self.dtype = float32_name(work.device)
        self.denoiser = PublishedDenoiser(work.plain_network(flat=True))

    def start_from(self, first: Tensor, elites: Tensor) -> tuple[Tensor, Tensor]:
        work = self.work
        return start_published(work.dynamics, work.act, work.spaces, first, work.shape.horizon, elites)

    def sample_around(self, draw: Draw, num_steps: int, first: Tensor, actions: Tensor) -> Tensor:
        return sample_published(self.denoiser, self.work.sample_shape, draw, first, actions, num_steps)


class Stock(Baseline):
    def __init__(self, work: Workload, compile: bool = True):
        super().__init__(work)
        on_cpu = "bfloat16" if has_fast_bf16(torch.device(work.device)) else "float32"
        self.dtype = "float16" if work.device.startswith("cuda") else on_cpu
        network = work.plain_network(flat=self.dtype == "float32")  # CPUs convolve float32 faster that way
        self.denoiser = StockDenoiser(network, getattr(torch, self.dtype), work.model_input, compile)
        self.detail = self.denoiser.arrangement
        self.start_from = StockStart(work.dynamics, work.act, work.spaces, work.first, work.shape.horizon)
        self._passes: dict[int, Captured] = {}

    def sample_around(self, draw: Draw, num_steps: int, first: Tensor, actions: Tensor) -> Tensor:
        """A pass of the sampler; on a GPU as one CUDA graph, with the noise among its inputs."""
        shape = self.work.sample_shape
        inputs = first, actions, *(draw(shape) for _ in range(num_steps + 1))
        if not first.is_cuda:
            return self._sample(self.denoiser, *inputs)
        if num_steps not in self._passes:
            self._passes[num_steps] = Captured(partial(self._sample, self.denoiser.for_graph()), *inputs)
        return self._passes[num_steps](*inputs)

    def _sample(self, denoiser: object, first: Tensor, actions: Tensor, *noise: Tensor) -> Tensor:
        draws = iter(noise)
        num_steps = len(noise) - 1
        return sample_edm(denoiser, self.work.sample_shape, lambda _: next(draws), first, actions, num_steps, backend="reference")


class Ours(Runner):
    """dydiff with one of its backends, with or without fast mode."""

    def __init__(self, work: Workload, backend: str, fast: FastMode | None = None):
        super().__init__(work)
        self.backend = backend
        self.fast = fast
        self.detail = f"on {backend}" if fast else ""
        self.dtype = float32_name(work.device)
        if backend in IN_16_BIT:
            self.dtype = "bfloat16" if backend == "bf16" else "float16"
        horizon, settings = work.shape.horizon, {"num_steps": work.num_steps}
        self.engine = RolloutEngine(
            [work.denoiser], work.dynamics, work.spaces, horizon, ITERATIONS, work.shape.batch, settings, backend, fast
        )
        self.denoiser = self.engine.denoisers[0]
        self.generator = work.generator()
        # The engine then leaves the noise to the compiled sampler step.
        compiled_step = edm.available_backend(work.device, torch.float32) == "extension"
        self.makes_noise = compiled_step and backend != "reference" and fast is None
        self._evaluate = lambda: (self.denoiser.evaluate(work.model_input, 1.0),)
        self._sample = self._sample_plainly
        if backend != "reference":  # the trusted variant
            # A rollout is a CUDA graph, so its parts are timed as one.
            where = self.generator.device, self.generator
            self._evaluate, self._sample = (capture_if_gpu(each, *where) for each in (self._evaluate, self._sample))

    def evaluation(self) -> Tensor:
        return self._evaluate()[0]

    def start(self) -> Tensor:
        return self._roll_out(iterations=0)

    def sampler(self) -> Tensor:
        self.generator.manual_seed(SEED)
        return self._sample()[0]

    def _sample_plainly(self) -> tuple[Tensor]:
        work = self.work
        condition = work.first, work.actions
        if self.fast is not None:
            return (self.fast.sample(self.denoiser, work.sample_shape, work.recorded_noise(0), *condition, None),)
        draw = work.recorded_noise(work.sampler_steps)
        if self.makes_noise:
            draw = edm.PhiloxNoise(torch.randint(2**62, (), generator=self.generator, device=work.device))
            draw.advance()
        step = "reference" if self.backend == "reference" else "auto"
        return (sample_edm(self.denoiser, work.sample_shape, draw, *condition, work.sampler_steps, backend=step),)

    def rollout(self) -> Tensor:
        return self._roll_out(iterations=ITERATIONS)

    def _roll_out(self, iterations: int) -> Tensor:
        work = self.work
        if self.makes_noise or self.fast is not None:
            # One generator for all calls: a captured rollout belongs to it. Fast mode draws its noise from it in every backend.
            self.generator.manual_seed(SEED)
            trajectory = self.engine.roll_out(work.policy, work.start, self.generator, iterations=iterations)
        else:
            draw = work.recorded_noise(work.num_steps)
            trajectory = self.engine.roll_out(work.policy, work.start, work.begin()[0], draw, iterations)
        return torch.cat(trajectory, dim=-1)


def float32_name(device: str) -> str:
    """The dtype of float32 convolutions as PyTorch does them by default."""
    return "tf32" if device.startswith("cuda") and torch.backends.cudnn.allow_tf32 else "float32"


def build_runner(name: str, work: Workload, fast: FastMode) -> Runner:
    """A variant by its name; `fast:BACKEND` is `fast` on a backend.

    Raises:
        DydiffError: the backend cannot run here.
    """
    if name == "published":
        return Published(work)
    if name == "stock":
        return Stock(work)
    if name.startswith("fast:"):
        return Ours(work, name.removeprefix("fast:"), fast)
    return Ours(work, name)
