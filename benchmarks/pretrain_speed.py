"""How fast does the diffusion model train? dydiff's precisions against published-style and the strongest stock PyTorch.

    python benchmarks/pretrain_speed.py --quick
    python benchmarks/pretrain_speed.py --json speed.jsonl --plot speed.png
    python benchmarks/pretrain_speed.py --batch 8,64 --variants published,ours

The one case, `pretrain`, is a whole training step of the full-size U-Net (58.75 M parameters) on Hopper's dimensions: draw
windows, loss, gradients, gradient repair, Adam, moving average of the weights. Variants:

    published   eager float32 on [B, C, H] (on a GPU with PyTorch's default TF32 convolutions); windows copied from the dataset
                once and served by a DataLoader; torch.optim.Adam as it comes; loops over the parameters for repair and average
    stock       Conv2d(1, k) channels-last under bfloat16 autocast (on a CPU that does not multiply bfloat16: Conv1d in float32),
                fused Adam, foreach operators, windows gathered on the device; eager or, but for --quick, torch.compile,
                whichever is faster here
    reference   dydiff's trainer with --precision float32
    ours        dydiff's trainer with --precision auto
    bf16, winograd   dydiff's trainer with that precision, where asked for

Before anything is timed, every variant's gradient with respect to all weights, on the same windows, noise levels and noise, is
checked against float32 without TF32 (`error` in the table); one above its limit is left out, and the run ends with status 1.
Variants are then timed in turn. The table shows medians, the range, the number of repetitions n, the speed-up over `published`,
TFLOP/s (multiply-adds of direct convolutions and matrix products, forward and backward) and their share of what large square
matrix products of the same dtype reach here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from baselines import PlainUNet
from command_line import HORIZON, add_network_options, check_network, make_timing_parser, several, some_of
from harness import Case, Patience, Session, Variant, check_output, run_benchmark, time_call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dydiff.data import Dataset, Limits, Windows
from dydiff.device import has_fast_bf16
from dydiff.diffusion.edm import Denoiser, draw_sigma, edm_loss
from dydiff.diffusion.training import DiffusionTrainer
from dydiff.networks.unet import UNet
from dydiff.options import positive

OBSERVATION_DIM, ACTION_DIM = 11, 3  # hopper
DATA_DIM = OBSERVATION_DIM + ACTION_DIM
ROWS, EPISODE = 5000, 1000
LR, RAMP_SAMPLES, HALF_LIFE, SEED = 1e-3, 10e6, 0.5e6, 0
TOLERANCE = 2.0  # times the harness's limits, which are for one pass through the network: a gradient takes two
VARIANTS = ("published", "stock", "reference", "ours")
ON_REQUEST = ("bf16", "winograd")


class Workload:
    """Made-up data and a freshly initialised network of one shape; the same in every process."""

    def __init__(self, batch: int, horizon: int, dim: int, dim_mults: Sequence[int], device: str):
        self.batch, self.horizon, self.dim, self.dim_mults, self.device = batch, horizon, dim, tuple(dim_mults), device
        source = np.random.default_rng(SEED)
        observations = np.cumsum(source.normal(size=(ROWS, OBSERVATION_DIM)), axis=0).astype(np.float32)
        actions = np.tanh(source.normal(size=(ROWS, ACTION_DIM))).astype(np.float32)
        zeros = np.zeros(ROWS, np.float32)
        timeouts = np.arange(ROWS) % EPISODE == EPISODE - 1
        dataset = Dataset("made-up", None, observations, actions, zeros, zeros > 0, timeouts, None, {})
        self.windows = Windows(dataset, horizon, Limits.from_dataset(dataset), True, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.network = UNet(DATA_DIM, horizon, dim, self.dim_mults).to(device)
        generator = torch.Generator(device).manual_seed(SEED)
        self.clean = self.windows.gather(torch.randint(len(self.windows), (batch,), generator=generator, device=device))
        self.sigma = draw_sigma(batch, generator)
        self.noise = torch.randn(self.clean.shape, generator=generator, device=device)

    def loss(self, denoiser: Denoiser) -> Tensor:
        """The loss on the inputs of the check."""
        return edm_loss(denoiser, self.clean, self.sigma, self.noise).sum() / self.batch

    def plain_network(self, flat: bool) -> PlainUNet:
        return PlainUNet(self.network.state_dict(), DATA_DIM, self.dim, self.dim_mults, flat).to(self.device)


class Published:
    """A training step as it is written from the paper: `step` returns the loss, `gradient` is that of the check."""

    detail = ""

    def __init__(self, work: Workload):
        self.work = work
        self.dtype = "tf32" if work.device.startswith("cuda") else "float32"
        self.denoiser = Denoiser(work.plain_network(flat=True), OBSERVATION_DIM)
        self.ema = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=LR)
        copies = work.windows.gather(torch.arange(len(work.windows), device=work.device)).cpu()  # [W, H, D]
        self.loader = torch.utils.data.DataLoader(copies, work.batch, shuffle=True, drop_last=True)
        self.batches = iter(self.loader)
        self.seen = 0

    def gradient(self) -> Tensor:
        self.work.loss(self.denoiser).backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.denoiser.parameters()])

    def step(self) -> Tensor:
        try:
            clean = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            clean = next(self.batches)
        clean = clean.to(self.work.device)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(self.seen / RAMP_SAMPLES, 1)
        self.optimizer.zero_grad(set_to_none=True)
        sigma = (torch.randn(len(clean), device=clean.device) * 1.2 - 1.2).exp()
        loss = edm_loss(self.denoiser, clean, sigma, torch.randn_like(clean)).sum() / len(clean)
        loss.backward()
        for parameter in self.denoiser.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        beta = ema_beta(self.seen, len(clean))
        self.seen += len(clean)
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.denoiser.parameters(), strict=True):
                average.copy_(parameter.lerp(average, beta))
        return loss.detach()


class Stock:
    """The same from PyTorch's fastest parts."""

    def __init__(self, work: Workload, compile: bool):
        self.work = work
        self.kind = torch.device(work.device).type
        in_16_bit = has_fast_bf16(torch.device(work.device))
        self.dtype = "bfloat16" if in_16_bit else "float32"
        network = work.plain_network(flat=not in_16_bit)
        if in_16_bit:
            network = network.to(memory_format=torch.channels_last)
        self.denoiser = Denoiser(network, OBSERVATION_DIM)
        self.parameters = list(network.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)
        self.generator = torch.Generator(work.device).manual_seed(SEED)
        self.seen = 0
        candidates = {"eager": self._loss}
        if compile:
            candidates["compiled"] = torch.compile(self._loss, dynamic=False)
        timed: dict[str, float] = {}
        for name, self.loss in candidates.items():
            with contextlib.suppress(torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError):
                timed[name] = min(time_call(self._descend)[0] for _ in range(3 if compile else 1))
        self.detail = min(timed, key=timed.get)
        self.loss = candidates[self.detail]

    def _loss(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return edm_loss(self.denoiser, clean, sigma, noise).sum() / len(clean)

    def _descend(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.work.clean, self.work.sigma, self.work.noise)
        loss.backward()
        return loss

    def gradient(self) -> Tensor:
        self._descend()
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters])

    def step(self) -> Tensor:
        windows, batch = self.work.windows, self.work.batch
        index = torch.randint(len(windows), (batch,), generator=self.generator, device=windows.device)
        clean, sigma = windows.gather(index), draw_sigma(batch, self.generator)
        noise = torch.randn(clean.shape, generator=self.generator, device=clean.device)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(self.seen / RAMP_SAMPLES, 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(clean, sigma, noise)
        loss.backward()
        for parameter in self.parameters:
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - ema_beta(self.seen, batch))
        self.seen += batch
        return loss.detach()


class Ours:
    """dydiff's trainer in one of its precisions."""

    def __init__(self, work: Workload, precision: str):
        self.work = work
        denoiser = Denoiser(copy.deepcopy(work.network), OBSERVATION_DIM)
        arguments = {"batch_size": work.batch, "duration": 10**9, "tick": work.batch, "seed": SEED, "precision": precision}
        self.trainer = DiffusionTrainer(denoiser, work.windows, {}, **arguments)
        in_float32 = "tf32" if work.device.startswith("cuda") else "float32"
        self.dtype = "bfloat16" if self.trainer.precision == "bf16" else in_float32
        self.detail = self.trainer.precision if precision == "auto" else ""

    def gradient(self) -> Tensor:
        self.work.loss(self.trainer.learner).backward()
        update = self.trainer.update
        gradients = [update.gradient_of(weight).flatten().float() for weight in update.weights]
        update.clear_gradients()
        return torch.cat(gradients)

    def step(self) -> Tensor:
        return self.trainer._step()


Runner = Published | Stock | Ours


def ema_beta(seen: int, batch: int) -> float:
    """How much of the average a batch leaves as it is."""
    return 0.5 ** (batch / max(min(HALF_LIFE, 0.05 * seen), 1e-8))


def build_runner(name: str, work: Workload, quick: bool) -> Runner:
    """A variant by its name."""
    if name == "published":
        return Published(work)
    if name == "stock":
        return Stock(work, compile=not quick)
    return Ours(work, {"reference": "float32", "ours": "auto"}.get(name, name))


def named_gradient(network: nn.Module, work: Workload) -> Tensor:
    """The gradient of the check in float32 without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        gradients = torch.autograd.grad(work.loss(Denoiser(network, OBSERVATION_DIM)), list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def with_gradients(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same where gradients are recorded; the harness turns them off."""
    return torch.enable_grad()(function)


def measure(session: Session) -> None:
    """Check and measure all shapes."""
    for horizon in session.options.horizon:
        for batch in session.options.batch:
            run_shape(batch, horizon, session)


def run_shape(batch: int, horizon: int, session: Session) -> None:
    """Check and measure one shape."""
    torch.compiler.reset()
    options = session.options
    work = Workload(batch, horizon, options.dim, options.dim_mults, options.device)
    with FlopCounterMode(display=False) as counter:
        expected = named_gradient(work.network, work)
    errors, variants = {}, []
    for name in options.variants or VARIANTS:
        with session.failures.attempt(name):
            runner = build_runner(name, work, options.quick)
            step = with_gradients(runner.step)
            variant = Variant(name, runner.dtype, step, step, 1, counter.get_total_flops(), runner.detail)
            errors[name] = check_output(variant, runner.gradient(), expected, TOLERANCE)
            variants.append(variant)
    del expected
    case = Case("pretrain", batch, horizon, variants, tolerance=TOLERANCE)
    measurements = session.race(case, Patience(options.seconds, least=3, warm_up=True))
    for measurement in measurements:
        measurement.error = errors[measurement.variant.name]
    session.record(case, measurements)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_timing_parser(__doc__, quick="few repetitions, nothing is compiled")
    parser.add_argument("--batch", type=several(positive(int)), default=[8], help="windows an update, such as 8,64")
    parser.add_argument("--horizon", type=several(positive(int)), default=[HORIZON], help="rows, such as 32,100")
    names = VARIANTS + ON_REQUEST
    parser.add_argument("--variants", type=some_of(names), help=f"some of {','.join(names)}")
    add_network_options(parser)
    options = parser.parse_args(arguments)
    check_network(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(parse_arguments(arguments), measure)


if __name__ == "__main__":
    sys.exit(main())
