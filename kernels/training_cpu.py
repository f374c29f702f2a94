"""Diffusion training on the CPU: the passes around a step's matrix products, compiled (csrc/training_cpu.h).

    norm_mish      y = mish(group_norm(x)) and its gradient: two reads and one write of an activation each way, where PyTorch's
                   chain of operators makes three times as many, and its Mish on bfloat16 is slow besides
    adam_average   gradient repair, Adam, moving average and the bfloat16 copy of the weights in one pass: 36 bytes a weight,
                   where PyTorch's operators move 60

Activations are [B, L, C] bfloat16 or float32, channels last; weights, moments and averages float32. Both have a plain path in
PyTorch: `norm_mish` takes it for other tensors, and for the update it is `torch.optim.Adam` (dydiff/diffusion/update.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.unet_reference import GROUPS


def norm_mish(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """mish(group_norm(x)) with 8 groups: x [B, L, C], weight and bias [C] -> [B, L, C]; differentiable in all three."""
    if x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" and not why_unavailable():
        return _NormMish.apply(x.contiguous(), weight, bias)
    normal = F.group_norm(x.transpose(1, 2), GROUPS, weight.to(x.dtype), bias.to(x.dtype))
    return F.mish(normal).transpose(1, 2)


def _native(x: Tensor) -> ModuleType:
    return getattr(native.extension.training, str(x.dtype).removeprefix("torch."))


class _NormMish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, statistics = torch.empty_like(x), weight.new_empty(len(x), GROUPS, 2)
        tensors = x, weight.contiguous(), bias.contiguous(), y, statistics
        _native(x).norm_mish(*(tensor.data_ptr() for tensor in tensors), *x.shape, torch.get_num_threads())
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, statistics = ctx.saved_tensors
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        tensors = x, dy.contiguous(), weight.contiguous(), bias.contiguous(), statistics, dx, dweight, dbias
        _native(x).norm_mish_backward(*(tensor.data_ptr() for tensor in tensors), *x.shape, torch.get_num_threads())
        return dx, dweight, dbias


@dataclass
class AdamCoefficients:
    """What an update of Adam (arXiv 1412.6980) and of the moving average needs to know; `step` counts from 1.

    `rate` is how far the average moves to the new weights; `limit` is what an infinite gradient becomes.
    """

    lr: float
    beta_1: float
    beta_2: float
    epsilon: float
    step: int
    rate: float
    limit: float

    def arguments(self) -> tuple[float, ...]:
        step_size = self.lr / (1 - self.beta_1**self.step)
        root_correction = math.sqrt(1 - self.beta_2**self.step)
        betas = 1 - self.beta_1, self.beta_2, 1 - self.beta_2
        return *betas, self.epsilon, step_size, root_correction, self.rate, self.limit


@torch.no_grad()
def adam_average(
    weight: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    average: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    coefficients: AdamCoefficients,
) -> None:
    """Update weight, moments, average and, if given, the bfloat16 copy of the weight in place; NaN in the gradient counts as 0.

    All have one shape and one memory layout. The gradient is bfloat16 if there is a copy, else float32.

    Raises:
        DydiffError: a tensor differs from the weight in shape, layout or device, or is not of the type above.
    """
    low = torch.float32 if copy is None else torch.bfloat16
    tensors = {"weight": weight, "first_moment": first_moment, "second_moment": second_moment, "average": average}
    tensors |= {"gradient": gradient} if copy is None else {"gradient": gradient, "copy": copy}
    shape, stride = weight.shape, weight.stride()
    for name, tensor in tensors.items():
        same_layout = tensor.shape == shape and (tensor.stride() == stride or _layout(tensor) == _layout(weight))
        if not same_layout or not tensor.is_cpu:
            raise DydiffError(
                f"adam_average needs `{name}` on the CPU with the weight's shape {list(shape)} and strides {stride}, not "
                f"{list(tensor.shape)} and {tensor.stride()} on {tensor.device}."
            )
        dtype = low if name in ("gradient", "copy") else torch.float32
        if tensor.dtype != dtype:
            raise DydiffError(f"adam_average needs `{name}` in {dtype}, not {tensor.dtype}.")
    if not weight.is_contiguous() and not _is_dense(weight):
        raise DydiffError(f"adam_average needs tensors without gaps in memory, not strides {stride}.")
    if native.extension is None:
        raise DydiffError(why_unavailable())
    state = [tensor.data_ptr() for tensor in (weight, first_moment, second_moment, average)]
    gradients = (gradient.data_ptr(), 0, 0) if copy is None else (0, gradient.data_ptr(), copy.data_ptr())
    threads = torch.get_num_threads()
    native.extension.training.adam_average(*state, *gradients, weight.numel(), *coefficients.arguments(), threads)


def _layout(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions with more than one entry."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _is_dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride)
    return tensor.permute(*order[::-1]).is_contiguous()
