"""What follows a convolution, as one Triton kernel each way: values and gradients against float64, and a U-Net that trains with it.

Where there is no card, `test_finish_in_the_interpreter` runs this file once more with Triton's interpreter, as in
test_unet_kernels.py.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from dydiff.kernels import triton_trial, unet_reference
from dydiff.networks import training_unet
from dydiff.networks.training_unet import CudnnTrainingUNet, make_training_unet
from dydiff.networks.unet import UNet

pytest.importorskip("triton")
import interpreter  # noqa: E402
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, interpret_again, on_kernels  # noqa: E402

from dydiff.kernels import adam, finish, unet_triton  # noqa: E402


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    if INTERPRETED:
        interpreter.prepare(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@in_the_interpreter
def test_finish_in_the_interpreter(tmp_path):
    interpret_again(__file__, tmp_path)


def differentiate(function, dtype: torch.dtype, tensors: list, dy: torch.Tensor, parameters: torch.dtype) -> list[torch.Tensor]:
    """Value and gradients as float64; x and residual in `dtype`, all else in `parameters`; None stays."""
    kinds = dtype, parameters, parameters, parameters, parameters, dtype
    leaves = [None if t is None else t.to(kind).requires_grad_() for t, kind in zip(tensors, kinds, strict=True)]
    y = function(*leaves)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(dtype))
    return [t.double() for t in (y.detach(), *gradients)]


# B, L, C, samples of time (0: none), residual?
SHAPES = [(3, 25, 64, 3, True), (2, 13, 24, 1, False), (1, 1, 16, 1, True), (2, 6, 8, 0, True), (4, 50, 16, 0, False)]


@on_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(shape, dtype):
    batch, length, channels, times, with_residual = shape
    torch.manual_seed(0)
    x, residual, dy = ((scale * torch.randn(batch, length, channels) + mean).to(dtype) for scale, mean in ((2, 5), (1, 0), (1, 0)))
    bias, scale, shift = torch.randn(channels), torch.randn(channels) + 1, 3 * torch.randn(channels)
    time = torch.randn(times, channels) if times else None
    tensors = [x, bias, scale, shift, time, residual if with_residual else None]
    tensors, dy = [t if t is None else t.to(DEVICE) for t in tensors], dy.to(DEVICE)
    exact = differentiate(unet_reference.finish_block, torch.float64, tensors, dy, torch.float64)
    rounded = differentiate(unet_reference.finish_block, dtype, tensors, dy, torch.float32)
    ours = differentiate(finish.finish_block, dtype, tensors, dy, torch.float32)
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        # With one value a group the gradient is 0, and theirs may be so exactly.
        floor = torch.finfo(dtype).eps / 2 * truth.abs().max() + 1e-5
        assert mine.shape == truth.shape
        assert (mine - truth).abs().max() <= max(2 * (theirs - truth).abs().max(), floor)


@on_kernels
def test_mish_is_right_at_its_ends():
    """A group of equal values is normalised to 0, so that Mish sees the shift alone."""
    shift = torch.tensor([-200.0, -100.0, -20.0, -1.0, 0.0, 1.0, 19.5, 200.0], device=DEVICE).repeat_interleave(2)
    x, zeros, ones = torch.ones(1, 3, 16, device=DEVICE), torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    leaf, exact = shift.clone().requires_grad_(), shift.double().requires_grad_()
    y = finish.finish_block(x, zeros, ones, leaf, None, None)
    y.sum().backward()
    torch.nn.functional.mish(exact).sum().backward()
    torch.testing.assert_close(y[0, 0].double(), torch.nn.functional.mish(exact), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), 3 * exact.grad, rtol=1e-5, atol=1e-6)


def gradients(network, unet: UNet, x: torch.Tensor, label: torch.Tensor, copies: dict) -> torch.Tensor:
    """The output and every weight's gradient, one behind the other, as float64."""
    y = network(x, label)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum().backward()
    parts = [copies.get(weight, weight).grad for weight in unet.parameters()]
    return torch.cat([part.double().flatten() for part in (y.detach(), *parts)])


@pytest.mark.parametrize("finish_block", ["kernels", "plain"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_network_and_its_gradients(precision, finish_block):
    """On any device: convolutions by PyTorch, and what follows them either way."""
    if finish_block == "kernels" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("the kernels need a card; test_finish_in_the_interpreter runs this case without one")
    device = DEVICE if finish_block == "kernels" or torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    unet = UNet(3, 8, 16, (1, 4)).to(device)
    x, label = torch.randn(2, 8, 3, device=device), torch.randn(2, device=device)
    double = copy.deepcopy(unet).double()
    exact = gradients(double, double, x.double(), label.double(), {})
    functions = {"kernels": finish.finish_block, "plain": unet_reference.finish_block}
    network = CudnnTrainingUNet(unet, precision, functions[finish_block])
    assert bool(network.copies) == (precision == "bf16")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which cuDNN takes for some layouts and not for others
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            plain = copy.deepcopy(unet)
            rounded = gradients(plain, plain, x, label, {})
        ours = gradients(network, unet, x, label, network.copies)
    assert (ours - exact).norm() <= max(2 * (rounded - exact).norm(), 1e-6 * exact.norm())


@pytest.mark.parametrize("obstacle", ["", "no compiler"])
def test_a_card_without_working_kernels_trains_all_the_same(obstacle, monkeypatch):
    """And says so; the network itself is on the CPU here, and only said to be on a card."""
    monkeypatch.setattr(training_unet, "why_triton_fails", lambda device: obstacle)
    monkeypatch.setattr(training_unet, "is_on_gpu", lambda unet: True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        network = make_training_unet(UNet(3, 8, 16, (1, 2)), "float32")
    assert isinstance(network, CudnnTrainingUNet)
    assert network.finish_block is (unet_reference.finish_block if obstacle else finish.finish_block)
    assert [obstacle in str(one.message) for one in told] == ([True] if obstacle else [])


def test_kernels_that_do_not_run_are_an_obstacle(monkeypatch):
    """Here the card is missing behind the check that would say so."""
    monkeypatch.setattr(unet_triton, "why_unavailable", lambda device: "")
    ask = triton_trial.why_triton_fails.__wrapped__
    if not (INTERPRETED or torch.cuda.is_available()):
        assert "Error" in ask(torch.device("cpu"))
        return
    assert ask(torch.device(DEVICE)) == ""
    right = finish.finish_block, adam.adam_average
    monkeypatch.setattr(finish, "finish_block", lambda *arguments: 2 * unet_reference.finish_block(*arguments))
    assert ask(torch.device(DEVICE)) == "the results of dydiff.kernels.finish are wrong here"
    monkeypatch.setattr(finish, "finish_block", right[0])
    monkeypatch.setattr(adam, "adam_average", lambda *rows: right[1](*rows[:4], -rows[4], *rows[5:]))
    assert ask(torch.device(DEVICE)) == "the results of dydiff.kernels.adam are wrong here"
