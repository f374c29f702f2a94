"""Training convolutions of five taps on the CPU in float32, by Winograd's products (winograd.py, csrc/convolution_cpu.h).

    y[l] = sum_k w_k x[l + k - 2] + bias;  its gradients with respect to x, w and bias

A tile of 13 rows takes 17 products instead of 65, in all three directions, and rounding grows to some 3e-5 of a result. Activations
are [B, L, C], channels last; filters [C_out, C_in, 5] that lie in memory as [C_out, 5, C_in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.winograd import TAPS


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Conv1d with padding 2 of x [B, L, C_in], weight [C_out, C_in, 5], bias [C_out] -> [B, L, C_out]; differentiable in all three.

    Raises:
        DydiffError: the compiled part is missing (names how to build it), or a tensor is not on the CPU in float32 with the shape
            and the layout above.
    """
    if reason := why_unavailable("cpu"):
        raise DydiffError(reason)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise DydiffError(f"convolve needs `{name}` on the CPU in float32, not on {tensor.device} in {tensor.dtype}.")
    shapes = [list(tensor.shape) for tensor in (x, weight, bias)]
    if x.ndim != 3 or shapes[1:] != [[len(bias), x.shape[2], TAPS], [len(bias)]]:
        raise DydiffError(f"convolve needs x [B, L, C_in], weight [C_out, C_in, {TAPS}] and bias [C_out], not {shapes}.")
    if not weight.transpose(1, 2).is_contiguous():
        raise DydiffError(f"convolve needs a weight that lies in memory as [C_out, {TAPS}, C_in], not strides {weight.stride()}.")
    return _Convolution.apply(x.contiguous(), weight, bias.contiguous())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.new_empty(*x.shape[:2], len(weight))
        tensors = x, weight, bias, y
        _native().convolve(*(tensor.data_ptr() for tensor in tensors), *x.shape, len(weight), False, torch.get_num_threads())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy, threads = dy.contiguous(), torch.get_num_threads()
        dx, dweight = None, torch.empty_like(weight)
        addresses = [tensor.data_ptr() for tensor in (x, dy, dweight)]
        _native().filter_gradient(*addresses, *x.shape, len(weight), threads)
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            _native().convolve(dy.data_ptr(), weight.data_ptr(), 0, dx.data_ptr(), *dy.shape, x.shape[2], True, threads)
        return dx, dweight, dy.sum((0, 1))


def _native():
    return native.extension.convolution
