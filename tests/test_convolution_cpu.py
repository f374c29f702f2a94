"""Training convolutions by Winograd's products against float64, in all directions, at odd shapes."""

import pytest
import torch
import torch.nn.functional as F

from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.kernels.convolution_cpu import convolve

pytestmark = pytest.mark.skipif(bool(native.why_unavailable()), reason="the compiled CPU unit is not built here")
WINOGRAD_FACTOR = 600.0  # of plain float32's largest error; 264 of the usual one (kernels/winograd.py), 349 were seen here


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """[C_out, C_in, 5] in memory as [C_out, 5, C_in]."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def plain(x, weight, bias):
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=2).transpose(1, 2)


def differentiate(function, tensors, dy) -> list[torch.Tensor]:
    """The value and the gradients with respect to all tensors, as float64."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [tensor.double() for tensor in (y.detach(), *torch.autograd.grad(y, leaves, dy))]


def draw(batch: int, length: int, inputs: int, outputs: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    weight = laid_out(torch.randn(outputs, inputs, 5) / (5 * inputs) ** 0.5)
    return [torch.randn(batch, length, inputs), weight, torch.randn(outputs)], torch.randn(batch, length, outputs)


@pytest.mark.parametrize(
    "batch, length, inputs, outputs",
    [(1, 1, 1, 1), (1, 2, 3, 8), (2, 13, 14, 32), (3, 14, 33, 7), (16, 13, 16, 48), (2, 27, 65, 25), (5, 100, 24, 56)],
)
def test_value_and_gradients(batch, length, inputs, outputs):
    tensors, dy = draw(batch, length, inputs, outputs)
    exact = differentiate(plain, [tensor.double() for tensor in tensors], dy.double())
    rounded = differentiate(plain, tensors, dy)
    del [torch.full(shape, torch.nan) for shape in ((17, 16, 64), tensors[0].shape, tensors[1].shape, dy.shape) for _ in "1234"][:]
    mine = differentiate(convolve, tensors, dy)
    for one, other, truth in zip(mine, rounded, exact, strict=True):
        floor = torch.finfo(torch.float32).eps / 2 * truth.abs().max()  # theirs may be exact
        assert (one - truth).abs().max() <= WINOGRAD_FACTOR * max((other - truth).abs().max(), floor)


def test_full_size():
    """A thousand channels: sums of many terms lose no more."""
    tensors, dy = draw(8, 25, 1024, 512)
    exact = differentiate(plain, [tensor.double() for tensor in tensors], dy.double())
    for one, truth in zip(differentiate(convolve, tensors, dy), exact, strict=True):
        assert (one - truth).norm() <= 5e-5 * truth.norm()


def test_single_taps_move_rows():
    """A filter with one tap of 1 passes rows on, one by one, and zeros from outside."""
    x = torch.arange(1.0, 31.0).view(1, 30, 1)
    for tap in range(5):
        weight = laid_out(F.one_hot(torch.tensor([[tap]]), 5).float())
        padded = F.pad(x, (0, 0, 2, 2))
        torch.testing.assert_close(convolve(x, weight, torch.ones(1)), padded[:, tap : tap + 30] + 1, rtol=0, atol=2e-3)


def test_threads_change_nothing():
    tensors, dy = draw(3, 40, 70, 90)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(differentiate(convolve, tensors, dy)[:3])  # PyTorch sums the bias's
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(result, results[0], strict=True))


def test_inputs_that_need_no_gradient():
    (x, weight, bias), dy = draw(2, 9, 14, 16)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, weight, bias), weight, dy)
    assert torch.equal(gradient.double(), differentiate(convolve, (x, weight, bias), dy)[2])


def test_refuses_what_does_not_fit(monkeypatch):
    (x, weight, bias), _ = draw(2, 9, 14, 16)
    for arguments, words in [
        ((x.double(), weight, bias), "`x` on the CPU in float32"),
        ((x, weight, bias.bfloat16()), "`bias` on the CPU in float32"),
        ((x, weight[:, :, :3], bias), r"weight \[C_out, C_in, 5\]"),
        ((x[0], weight, bias), r"x \[B, L, C_in\]"),
        ((x, weight.contiguous(), bias), "lies in memory as"),
    ]:
        with pytest.raises(DydiffError, match=words):
            convolve(*arguments)
    monkeypatch.setattr(native, "extension", None)
    with pytest.raises(DydiffError, match="missing"):
        convolve(x, weight, bias)
