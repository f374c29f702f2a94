"""Diffusion training in all precisions: the compiled passes, the network, the update, the loss curve, resuming."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dydiff.data import Dataset, Limits, Windows
from dydiff.diffusion import training
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.training import DiffusionTrainer, choose_precision
from dydiff.diffusion.update import CompiledUpdate, Update
from dydiff.errors import DydiffError
from dydiff.kernels import training_cpu
from dydiff.kernels.training_cpu import AdamCoefficients, adam_average, norm_mish, why_unavailable
from dydiff.kernels.unet_reference import GROUPS
from dydiff.networks import build_trajectory_network
from dydiff.networks.training_unet import TrainingUNet, _Convolution, _TransposedConvolution
from dydiff.networks.unet import UNet

compiled = pytest.mark.skipif(bool(why_unavailable()), reason="the compiled CPU unit is not built here")
HORIZON, OBSERVATION_DIM, ACTION_DIM = 8, 3, 1
DATA_DIM = OBSERVATION_DIM + ACTION_DIM


# The compiled passes


def differentiate(function, dtype, tensors, dy):
    """The value and the gradients of a function at `tensors`, computed in `dtype`, as float64."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [t.double() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype)))]


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch, length, channels", [(1, 1, 16), (3, 5, 8), (2, 13, 24), (8, 25, 64)])
def test_norm_mish_and_its_gradients(batch, length, channels, dtype):
    torch.manual_seed(0)
    x, dy = (2 * torch.randn(batch, length, channels) + 5).to(dtype), torch.randn(batch, length, channels).to(dtype)
    weight, bias = torch.randn(channels) + 1, torch.randn(channels)

    def plain(x, weight, bias):
        return F.mish(F.group_norm(x.transpose(1, 2), GROUPS, weight, bias)).transpose(1, 2)

    exact = differentiate(plain, torch.float64, (x, weight, bias), dy)
    rounded = differentiate(plain, dtype, (x, weight, bias), dy)
    del [torch.full_like(x, math.nan) for _ in range(4)][:]  # an entry that is left unwritten shows
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = norm_mish(*leaves)
    ours = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert ours[2].dtype == torch.float32
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        # With one value a group the gradient is 0, and theirs may be so exactly.
        floor = torch.finfo(dtype).eps / 2 * truth.abs().max() + 1e-6
        assert (mine - truth).abs().max() <= max(2 * (theirs - truth).abs().max(), floor)


@compiled
def test_mish_is_right_at_its_ends():
    """A group of equal values is normalised to 0, so that Mish sees the bias alone."""
    bias = torch.tensor([-100.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0]).repeat_interleave(2)
    weight, x = torch.ones(16, requires_grad=True), torch.ones(1, 3, 16, dtype=torch.bfloat16)
    leaf = bias.clone().requires_grad_()
    y = norm_mish(x, weight, leaf)
    y.sum().backward()
    exact = bias.double().requires_grad_()
    F.mish(exact).sum().backward()
    torch.testing.assert_close(y[0, 0].float(), F.mish(bias).bfloat16().float(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(leaf.grad, 3 * exact.grad.float(), rtol=1e-5, atol=1e-6)


@compiled
@pytest.mark.parametrize("shape", [(1,), (37,), (8, 5, 3), (300, 1000)])
@pytest.mark.parametrize("low", [False, True])
def test_one_pass_is_adam_and_average(shape, low):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    average, mine = torch.randn(shape), [weight.clone(), torch.zeros(shape), torch.zeros(shape)]
    mine_average, theirs = average.clone(), torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2)
    replica = weight.bfloat16() if low else None
    broken = torch.tensor([math.nan, math.inf, -math.inf])
    for step in range(1, 6):
        gradient = torch.randn(shape) * 10.0 ** (step - 3)
        if step == 3:
            gradient.view(-1)[: min(3, gradient.numel())] = broken[: min(3, gradient.numel())]
        gradient = gradient.bfloat16() if low else gradient
        adam_average(*mine, mine_average, gradient, replica, AdamCoefficients(1e-2, 0.9, 0.999, 1e-8, step, 0.3, 1e5))
        theirs.grad = gradient.float().nan_to_num(nan=0, posinf=1e5, neginf=-1e5)
        adam.step()
        average.lerp_(theirs.detach(), 0.3)
    for one, other in zip((*mine, mine_average), (theirs, *list(adam.state[theirs].values())[1:], average), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=3e-6, atol=1e-6)
    assert replica is None or torch.equal(replica, mine[0].bfloat16())


@compiled
def test_one_pass_refuses_what_does_not_fit():
    good, coefficients = torch.zeros(4, 3), AdamCoefficients(1e-3, 0.9, 0.999, 1e-8, 1, 0.1, 1e5)
    for bad, words in [(torch.zeros(3, 4), "shape"), (torch.zeros(3, 4).T, "strides"), (good.double(), "torch.float32")]:
        with pytest.raises(DydiffError, match=f"`gradient`.*{words}"):
            adam_average(good, good, good, good, bad, None, coefficients)
    gaps = torch.zeros(4, 6)[:, ::2]
    with pytest.raises(DydiffError, match="without gaps"):
        adam_average(gaps, gaps, gaps, gaps, gaps, None, coefficients)


# The network


@pytest.mark.parametrize("taps, stride, padding, length", [(5, 1, 2, 7), (5, 1, 2, 1), (3, 2, 1, 8), (1, 1, 0, 5)])
def test_convolution_and_its_gradients(taps, stride, padding, length):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, length, 6), torch.randn(4, 6, taps), torch.randn(4)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.conv1d(leaves[0].transpose(1, 2), *leaves[1:], stride, padding).transpose(1, 2)
    compare(_Convolution.apply(*leaves, stride, padding), expected, leaves)


@pytest.mark.parametrize("length", [1, 5])
def test_transposed_convolution_and_its_gradients(length):
    torch.manual_seed(0)
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((3, length, 6), (6, 4, 4), (4,))]
    expected = F.conv_transpose1d(leaves[0].transpose(1, 2), *leaves[1:], 2, 1).transpose(1, 2)
    compare(_TransposedConvolution.apply(*leaves, 2, 1), expected, leaves)


def compare(y, expected, leaves):
    torch.testing.assert_close(y, expected)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * weights).sum(), leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "precision, factor, luck",
    [("bf16", 2, 0.02), ("float32", 2, 1e-5), pytest.param("winograd", 400, 1e-4, marks=compiled)],  # kernels/winograd.py: 264
)
def test_network_and_its_gradients(precision, factor, luck):
    """At most `factor` times as far from float64 as PyTorch's own operators are in that dtype, give or take their luck."""
    torch.manual_seed(0)
    unet = UNet(DATA_DIM, 12, dim=32, dim_mults=(1, 2, 4))
    x, label, weights = torch.randn(4, 12, DATA_DIM), torch.randn(4), torch.randn(4, 12, DATA_DIM)
    twin = copy.deepcopy(unet)
    network = TrainingUNet(twin, precision)
    exact, plain = copy.deepcopy(unet).double(), copy.deepcopy(unet)
    y_exact = exact(x.double(), label.double())
    (y_exact * weights).sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y_plain = plain(x, label).float()
    (y_plain * weights).sum().backward()
    y = network(x, label)
    (y * weights).sum().backward()
    assert y.dtype == torch.float32
    assert (y - y_exact).norm() <= factor * (y_plain - y_exact).norm()
    for (name, truth), theirs, mine in zip(exact.named_parameters(), plain.parameters(), twin.parameters(), strict=True):
        gradient = network.copies.get(mine, mine).grad
        floor = luck * truth.grad.norm() + luck / 2000
        assert (gradient - truth.grad).norm() <= max(factor * (theirs.grad - truth.grad).norm(), floor), name


# Training


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Slow sines with actions that say where they are in their period."""
    time = np.arange(600)[:, None]
    observations = np.sin(time * np.array([0.1, 0.23, 0.05]) + np.arange(3)).astype(np.float32)
    actions = np.cos(time * 0.1).astype(np.float32)
    timeouts = np.arange(600) % 100 == 99
    zeros = np.zeros(600, np.float32)
    dataset = Dataset("sines", None, observations, actions, zeros, zeros > 0, timeouts, None, {})
    return Windows(dataset, HORIZON, Limits.from_dataset(dataset), True, "cpu")


def make_trainer(windows: Windows, precision: str, **settings) -> DiffusionTrainer:
    torch.manual_seed(0)
    network = build_trajectory_network("UNet_RL", DATA_DIM, HORIZON, dim=16, dim_mults=(1, 2))
    arguments = {"batch_size": 16, "duration": 10**6, "tick": 16, "seed": 0, "lr_ramp": 1000, **settings}
    denoiser = Denoiser(network, OBSERVATION_DIM).to(windows.device)
    return DiffusionTrainer(denoiser, windows, {}, **arguments, precision=precision)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_loss_curve_is_that_of_float32(windows):
    """Closer to float32 than another seed is, tick by tick."""
    curves, others = {}, ["bf16"] if why_unavailable() else ["bf16", "winograd"]
    for precision, seed in (("float32", 0), *((other, 0) for other in others), ("float32", 1)):
        trainer = make_trainer(windows, precision, batch_size=8, tick=8 * 40, seed=seed, lr=3e-3, lr_ramp=500)
        curves[precision, seed] = np.array([trainer.run_epoch()["loss"] for _ in range(5)])
    exact = curves["float32", 0]
    assert exact[-1] < 0.8 * exact[0], "nothing was learned"
    noise = np.abs(curves["float32", 1] / exact - 1).max()
    for other in others:
        difference = np.abs(curves[other, 0] / exact - 1).max()
        assert difference < noise and abs(curves[other, 0].mean() / exact.mean() - 1) < 0.02


@pytest.mark.parametrize("precision", ["float32", "bf16", pytest.param("winograd", marks=compiled)])
def test_resume_is_exact(windows, precision):
    whole, begun = make_trainer(windows, precision), make_trainer(windows, precision)
    log = [whole.run_epoch() for _ in range(6)]
    for _ in range(3):
        begun.run_epoch()
    # What comes from a file lies in memory in its own order, not in the trainer's.
    state = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.clone(memory_format=torch.contiguous_format), begun.state_dict()
    )
    resumed = make_trainer(windows, precision, seed=9)
    resumed.load_state_dict(state)
    assert [resumed.run_epoch() for _ in range(3)] == log[3:]
    assert torch.equal(weights(resumed.denoiser), weights(whole.denoiser))
    assert torch.equal(weights(resumed.ema), weights(whole.ema))


@pytest.mark.parametrize("low", [False, True])
def test_gradients_are_repaired_where_they_lie(low):
    """Weights of odd lengths and of another layout, one with a copy in bfloat16, one that has no gradient."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3,), (4, 5, 2), (4,), (7, 1), (2, 2))]
    weights[1].data = weights[1].data.transpose(1, 2).contiguous().transpose(1, 2)
    copies = {weights[1]: weights[1].detach().bfloat16().requires_grad_()} if low else {}
    update = Update(weights, [weight.detach().clone() for weight in weights], copies)
    expected = []
    for weight in weights[:-1]:
        gradient, carrier = 1e6 * torch.randn_like(weight), copies.get(weight, weight)
        gradient[0, ...], gradient[1, ...], gradient[-1, ...] = math.nan, -math.inf, math.inf
        (carrier * gradient.to(carrier.dtype)).sum().backward()
        expected.append(carrier.grad.float().nan_to_num(nan=0, posinf=1e5, neginf=-1e5))
    update.collect_gradients()
    for weight, wanted in zip(weights, expected, strict=False):
        assert torch.equal(weight.grad, wanted) and weight.grad.stride() == weight.stride()
    assert weights[-1].grad is None


@compiled
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bf16", 2e-3)])
def test_one_pass_and_operators_agree(windows, monkeypatch, precision, tolerance):
    one_pass = make_trainer(windows, precision)
    assert type(one_pass.update) is CompiledUpdate
    with monkeypatch.context() as patch:
        patch.setattr(training_cpu, "why_unavailable", lambda: "not built")
        operators = make_trainer(windows, precision)
    assert type(operators.update) is Update
    for _ in range(5):
        torch.testing.assert_close(one_pass._step(), operators._step(), rtol=tolerance, atol=0)
    torch.testing.assert_close(weights(one_pass.ema), weights(operators.ema), rtol=0, atol=tolerance)
    # A state of one continues in the other.
    operators.load_state_dict(copy.deepcopy(one_pass.state_dict()))
    torch.testing.assert_close(one_pass._step(), operators._step(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(one_pass.denoiser), weights(operators.denoiser), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), pytest.param("winograd", 1e-4, marks=compiled)])
def test_float32_on_a_cpu_is_the_plain_network(windows, precision, tolerance):
    """Step by step: convolutions as products change rounding only."""
    trainer, plain = make_trainer(windows, precision), make_trainer(windows, "float32")
    assert isinstance(trainer.learner.network, TrainingUNet)
    plain.learner = plain.denoiser
    for _ in range(5):
        torch.testing.assert_close(trainer._step(), plain._step(), rtol=tolerance, atol=0)
    torch.testing.assert_close(weights(trainer.denoiser), weights(plain.denoiser), rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_captured_steps_are_the_same(windows, monkeypatch, precision):
    """The order of warming up, capturing and replaying, with a stand-in that computes what a graph would replay."""

    class Recorded:
        def __init__(self, function, device, generator):
            self.replay = function

    monkeypatch.setattr(training, "CapturedGraph", Recorded)
    monkeypatch.setattr(training, "warm_up", lambda function, device: function())
    plain, captured = make_trainer(windows, precision), make_trainer(windows, precision)
    captured.captures = True
    assert [captured._step() for _ in range(4)] == [plain._step() for _ in range(4)]
    assert captured._graph is not None and torch.equal(weights(captured.ema), weights(plain.ema))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_graphs_on_a_gpu(windows, precision):
    """Replayed steps follow plain ones, and a state taken between replays continues exactly."""
    on_gpu = copy.deepcopy(windows)  # moving its limits would move those of all tests
    for name in ("start", "length", "rows", "_offset", "limits"):
        setattr(on_gpu, name, getattr(windows, name).to("cuda"))
    captured, plain, resumed = (make_trainer(on_gpu, precision) for _ in range(3))
    plain.captures = False
    for _ in range(6):
        torch.testing.assert_close(captured._step(), plain._step(), rtol=1e-2, atol=0)
    resumed.load_state_dict(copy.deepcopy(captured.state_dict()))
    for _ in range(3):
        torch.testing.assert_close(captured._step(), resumed._step(), rtol=1e-3, atol=0)


def test_micro_batches_change_little(windows):
    whole, parts = (make_trainer(windows, "bf16", micro_batch=size) for size in (16, 4))
    torch.testing.assert_close(whole._step(), parts._step(), rtol=1e-3, atol=0)
    for one, other in zip(whole.update.copies.values(), parts.update.copies.values(), strict=True):
        assert (one.grad - other.grad).float().norm() <= 0.02 * one.grad.float().norm()


def test_what_a_precision_stands_for(monkeypatch, command, dataset, tmp_path):
    def make_denoiser(kind: str, **settings) -> Denoiser:
        return Denoiser(build_trajectory_network(kind, DATA_DIM, HORIZON, dim=16, **settings), OBSERVATION_DIM)

    unet, other = make_denoiser("UNet_RL", dim_mults=(1,)), make_denoiser("MLP_RL")
    seven_taps = make_denoiser("UNet_RL", dim_mults=(1,), kernel_size=7)
    in_float32 = "float32" if why_unavailable() else "winograd"
    for fast, expected in ((True, "bf16"), (False, in_float32)):
        monkeypatch.setattr(training, "has_fast_bf16", lambda device, fast=fast: fast)
        assert choose_precision("auto", unet) == expected and choose_precision("auto", other) == "float32"
        assert choose_precision("auto", seven_taps) == ("bf16" if fast else "float32")
        for named in ("bf16", "float32", in_float32):
            assert choose_precision(named, unet) == named
    with pytest.raises(DydiffError, match="'fp8' is unknown"):
        choose_precision("fp8", unet)
    for unfit in (other, seven_taps):
        with pytest.raises(DydiffError, match="winograd cannot be used here: it is for UNet_RL with kernels of 5 taps on a CPU"):
            choose_precision("winograd", unfit)
    monkeypatch.setattr(training, "why_unavailable", lambda device: "it is not built.")
    assert choose_precision("auto", unet) == "float32"
    with pytest.raises(DydiffError, match="not built. Use --precision auto or float32."):
        choose_precision("winograd", unet)
    outcome = command("train", "-m", dataset, "--rl_model_type=MLP_RL", "--precision=bf16", f"--outdir={tmp_path}", "--dry-run")
    assert outcome.status == 1 and "--precision bf16 is for UNet_RL only" in outcome.errors
