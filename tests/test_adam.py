"""The update of all weights by one Triton kernel: against PyTorch's Adam step by step, and inside a training.

Where there is no card, `test_adam_in_the_interpreter` runs this file once more with Triton's interpreter.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from dydiff.data import Dataset, Limits, Windows
from dydiff.diffusion import training
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.training import DiffusionTrainer
from dydiff.diffusion.update import Update, make_update
from dydiff.networks.unet import UNet

pytest.importorskip("triton")
import interpreter  # noqa: E402
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, interpret_again, on_kernels  # noqa: E402

from dydiff.diffusion.kernel_update import KernelUpdate  # noqa: E402

SHAPES = [(3,), (16, 5, 24), (8,), (7, 1), (40, 60), (5, 3, 1)]  # two programs, odd lengths, one dimension of one entry


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    if INTERPRETED:
        interpreter.prepare(monkeypatch)


@in_the_interpreter
def test_adam_in_the_interpreter(tmp_path):
    interpret_again(__file__, tmp_path)


def make(kind: type[Update] | None, low: bool) -> Update:
    """An update of the same weights every time; every second one has a copy if `low`, and filters lie as training has them."""
    torch.manual_seed(0)
    weights, averages, copies = [], [], {}
    for number, shape in enumerate(SHAPES):
        weight = nn.Parameter(torch.randn(shape, device=DEVICE))
        if len(shape) == 3:
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        weights.append(weight)
        averages.append(torch.randn_like(weight).detach())
        if low and number % 2:
            copies[weight] = weight.detach().bfloat16().requires_grad_()
    return (kind or make_update)(weights, averages, copies)


def advance(update: Update, step: int, rate: float = 0.3) -> None:
    """One step with gradients of all sizes, some of them broken; the same for every update."""
    generator = torch.Generator().manual_seed(step)
    update.clear_gradients()
    for weight in update.weights:
        gradient = 10.0 ** (step - 3) * torch.randn(weight.shape, generator=generator)
        broken = torch.tensor([math.nan, math.inf, -math.inf]) if step == 2 else torch.empty(0)
        gradient.view(-1)[: len(broken)] = broken[: gradient.numel()]
        carrier = update.copies.get(weight, weight)
        (carrier * gradient.to(carrier)).sum().backward()
    update.collect_gradients()
    update.step(1e-2 / (1 + step), rate)


def everything(update: Update) -> list[torch.Tensor]:
    moments = [state[name] for state in update.state_dict()["state"].values() for name in ("step", "exp_avg", "exp_avg_sq")]
    return [tensor.detach().cpu() for tensor in (*update.weights, *update.averages, *moments)]


def assert_equal(ours: Update, theirs: Update) -> None:
    for one, other in zip(everything(ours), everything(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=1e-6)


@on_kernels
@pytest.mark.parametrize("low", [False, True])
def test_it_is_adam_and_average(low):
    theirs, ours = make(Update, low), make(KernelUpdate, low)
    layouts = [weight.stride() for weight in theirs.weights]
    for step in range(1, 6):
        advance(theirs, step)
        advance(ours, step)
        assert_equal(ours, theirs)
    assert [weight.stride() for weight in ours.weights] == layouts
    for weight, replica in ours.copies.items():
        assert torch.equal(replica, weight.bfloat16()) and replica.stride() == weight.stride()
    assert all(not row[rows.used :].any() for rows in ours.rows for row in (rows.weight, rows.second, rows.average))


@on_kernels
def test_a_rate_of_one_makes_the_average_the_weights():
    ours = make(KernelUpdate, low=True)
    advance(ours, 1, rate=1.0)
    assert all(map(torch.equal, ours.averages, ours.weights))


@on_kernels
def test_a_state_of_one_continues_in_another():
    """PyTorch's operators, the kernel, and what the CPU has (or a card); as from a file, where everything is contiguous."""
    kinds = [Update, KernelUpdate, None, KernelUpdate, Update]
    through, whole = make(kinds[0], low=True), make(Update, low=True)
    for step, kind in enumerate(kinds, start=1):
        following = make(kind, low=True)
        for new, old in zip((*following.weights, *following.averages), (*through.weights, *through.averages), strict=True):
            new.data.copy_(old)
        state = copy.deepcopy(through.state_dict())
        following.load_state_dict(torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, state))
        through = following
        advance(through, step)
        advance(whole, step)
        assert_equal(through, whole)


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


@on_kernels
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_training_with_it(precision, monkeypatch):
    """On a CPU everything but the update is the same; on a card the trainer itself must have taken the kernel."""
    trainers = {}
    for kind in (Update, KernelUpdate):
        random = np.random.default_rng(0)
        rows = [random.normal(size=(60, width)).astype(np.float32) for width in (3, 1)]
        ends = np.arange(60) % 20 == 19
        data = Dataset("made-up", None, *rows, np.zeros(60, np.float32), ends & False, ends, None, {})
        windows = Windows(data, 8, Limits.from_dataset(data), True, DEVICE)
        torch.manual_seed(0)
        denoiser = Denoiser(UNet(4, 8, 8, (1, 4)).to(DEVICE), 3)
        first = copy.deepcopy(denoiser)
        with monkeypatch.context() as patch:
            if kind is Update or INTERPRETED:
                patch.setattr(training, "make_update", kind)
            trainer = DiffusionTrainer(denoiser, windows, {}, 6, 10**6, 12, seed=1, lr_ramp=1.0, precision=precision)
        assert type(trainer.update) is kind
        trainers[kind] = trainer, [trainer.run_epoch()["loss"] for _ in range(3)]
    (theirs, their_log), (ours, our_log) = trainers.values()
    tolerance = 1e-3 if precision == "float32" else 2e-2
    assert our_log == pytest.approx(their_log, rel=tolerance)
    # All weights together, of which a few percent go anywhere: a bias before a norm has a gradient of rounding only.
    for one, other in ((ours.denoiser, theirs.denoiser), (ours.ema, theirs.ema)):
        assert (flat(one) - flat(other)).norm() <= (0.05 if precision == "float32" else 0.2) * (flat(other) - flat(first)).norm()
