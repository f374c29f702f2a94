"""What follows a block's convolution on NVIDIA cards, as one Triton kernel and its gradient.

    y [B, L, C] = mish(group_norm(x + bias)) + time [C] or [B, C] + residual [B, L, C]

A program holds one GroupNorm group of one sample, whole channels over all positions: mean first, then the squared deviations, in
float32. Bytes an element in 16 bit: 4 and 2 for the residual, where PyTorch's own operators (bias, GroupNorm, Mish, additions)
read and write five times and want another layout. The gradient reads x and dy and writes dx, 6 bytes; the normalised value and
Mish's slope are computed anew. For each sample and channel it leaves four sums over the positions, from which the gradients of
bias, scale, shift and time follow.

Groups of more than 16384 channels times positions (a power of two each; the gradient's: 8192) do not fit the registers: right, but
slow. Unmeasured on a card so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels import unet_reference
from dydiff.kernels.launch import Launch
from dydiff.kernels.matmul import mish
from dydiff.kernels.unet_reference import GROUPS

OF_BIAS, OF_SCALE, OF_SHIFT, OF_TIME = range(4)  # the sums that the gradient leaves


@triton.jit(do_not_specialize=["length", "time_pitch"])
def finish_kernel(
    x,
    bias,
    scale,
    shift,
    time,
    residual,
    out,  # may be x itself
    statistics,  # [B, GROUPS, 2] mean and 1 / deviation, for the gradient
    length,
    time_pitch,  # from one sample's time to the next one's; 0: all have one
    N: tl.constexpr,  # channels
    GROUP: tl.constexpr,  # of them, in a group
    ROWS: tl.constexpr,  # a power of two >= length
    COLUMNS: tl.constexpr,  # a power of two >= GROUP
):
    groups: tl.constexpr = N // GROUP
    sample = tl.program_id(0) // groups
    row, member = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column, inside = tl.program_id(0) % groups * GROUP + member, member < GROUP
    place, start = (row * N)[:, None] + column[None, :], sample.to(tl.int64) * length * N
    mask = (row < length)[:, None] & inside[None, :]

    y = tl.load(x + start + place, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    count = (length * GROUP).to(tl.float32)
    mean = tl.sum(tl.where(mask, y, 0.0)) / count
    y = tl.where(mask, y - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(y * y) / count + 1e-5)
    factor = tl.load(scale + column, mask=inside, other=0.0) * inverse
    y = mish(y * factor[None, :] + tl.load(shift + column, mask=inside, other=0.0)[None, :])
    if time is not None:
        y += tl.load(time + sample * time_pitch + column, mask=inside, other=0.0)[None, :]
    if residual is not None:
        y += tl.load(residual + start + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + place, y.to(out.dtype.element_ty), mask=mask)
    if statistics is not None:
        tl.store(statistics + 2 * tl.program_id(0), mean)
        tl.store(statistics + 2 * tl.program_id(0) + 1, inverse)


@triton.jit(do_not_specialize=["length"])
def finish_backward_kernel(
    x,
    bias,
    scale,
    shift,
    statistics,
    dy,
    out,  # dx
    sums,  # [B, 4, C] float32
    length,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    groups: tl.constexpr = N // GROUP
    sample = tl.program_id(0) // groups
    row, member = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column, inside = tl.program_id(0) % groups * GROUP + member, member < GROUP
    place, start = (row * N)[:, None] + column[None, :], sample.to(tl.int64) * length * N
    mask = (row < length)[:, None] & inside[None, :]

    mean = tl.load(statistics + 2 * tl.program_id(0))
    inverse = tl.load(statistics + 2 * tl.program_id(0) + 1)
    n = tl.load(x + start + place, mask=mask, other=0.0).to(tl.float32)
    n = tl.where(mask, (n + (tl.load(bias + column, mask=inside, other=0.0) - mean)[None, :]) * inverse, 0.0)
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    z = n * factor + tl.load(shift + column, mask=inside, other=0.0)[None, :]
    # mish(z) = z u with u = (e^2 + 2 e) / (e^2 + 2 e + 2), e = exp(z), and so mish'(z) = u + 4 z e (e + 1) / (e^2 + 2 e + 2)^2
    e = tl.exp2(tl.minimum(z * 1.4426950408889634, 28.0))
    numerator = e * (e + 2.0)
    root = tl.rsqrt(numerator + 2.0)
    part = root * root
    slope = part * (numerator + 4.0 * z * (e * (e + 1.0) * part))

    above = tl.load(dy + start + place, mask=mask, other=0.0).to(tl.float32)
    dz = above * slope
    dn = dz * factor
    count = (length * GROUP).to(tl.float32)
    dx = tl.where(mask, (dn - tl.sum(dn) / count - n * (tl.sum(dn * n) / count)) * inverse, 0.0)
    tl.store(out + start + place, dx.to(out.dtype.element_ty), mask=mask)
    sums += sample * (4 * N) + column
    tl.store(sums, tl.sum(dx, axis=0), mask=inside)
    tl.store(sums + N, tl.sum(dz * n, axis=0), mask=inside)
    tl.store(sums + 2 * N, tl.sum(dz, axis=0), mask=inside)
    tl.store(sums + 3 * N, tl.sum(above, axis=0), mask=inside)


def _launch(kernel: triton.JITFunction, x: Tensor, arguments: dict[str, Tensor | int | None]) -> Launch:
    batch, length, channels = x.shape
    group = channels // GROUPS
    rows, columns = triton.next_power_of_2(length), triton.next_power_of_2(group)
    sizes = {"length": length, "N": channels, "GROUP": group, "ROWS": rows, "COLUMNS": columns}
    return Launch(kernel, (batch * GROUPS,), arguments | sizes, warps=min(max(rows * columns // 512, 1), 8))


def finish(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    time: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    statistics: Tensor | None = None,
) -> Launch:
    """The launch that finishes a convolution block: x, residual and out [B, L, C] contiguous, out may be x; time [C] or [B, C]."""
    arguments = {"x": x, "bias": bias, "scale": scale, "shift": shift, "time": time, "residual": residual, "out": out}
    time_pitch = x.shape[2] if time is not None and time.ndim == 2 and len(time) > 1 else 0
    return _launch(finish_kernel, x, arguments | {"statistics": statistics, "time_pitch": time_pitch})


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, scale, shift, time, residual) -> Tensor:
        y, statistics = torch.empty_like(x), bias.new_empty(len(x), GROUPS, 2)
        finish(x, bias, scale, shift, time, residual, y, statistics).run()
        ctx.save_for_backward(x, bias, scale, shift, statistics)
        ctx.times, ctx.with_residual = 0 if time is None else len(time), residual is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, scale, shift, statistics = ctx.saved_tensors
        dx, sums = torch.empty_like(x), bias.new_empty(len(x), 4, len(bias))
        dy = dy.contiguous()
        arguments = {"x": x, "bias": bias, "scale": scale, "shift": shift, "statistics": statistics, "dy": dy, "out": dx}
        _launch(finish_backward_kernel, x, arguments | {"sums": sums}).run()
        total = sums.sum(0)
        dtime = None
        if ctx.times:
            dtime = total[None, OF_TIME] if ctx.times == 1 else sums[:, OF_TIME]
        return dx, total[OF_BIAS], total[OF_SCALE], total[OF_SHIFT], dtime, dy if ctx.with_residual else None


def finish_block(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, time: Tensor | None, residual: Tensor | None) -> Tensor:
    """The same as `unet_reference.finish_block`, on a card and differentiable in all tensors."""
    return _Finish.apply(x.contiguous(), bias, scale, shift, time, None if residual is None else residual.contiguous())


def is_right(device: torch.device) -> bool:
    """Whether `finish_block` and its gradient are on a device what PyTorch's operators are there."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 3, 5, 2 * GROUPS, generator=generator).to(device)
    bias, scale, shift = torch.randn(3, 2 * GROUPS, generator=generator).to(device)

    def differentiate(function) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, scale, shift)]
        y = function(*leaves, None, None)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    pairs = zip(differentiate(finish_block), differentiate(unet_reference.finish_block), strict=True)
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs)
