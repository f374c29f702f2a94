"""The U-Net's blocks on NVIDIA cards with cuDNN's convolutions, and one Triton kernel for all that follows each of them.

    finish_kernel   y [B, L, C] = mish(group_norm(y + bias)) + time [C] + residual [B, L, C]

A program of it holds one GroupNorm group of one sample, whole channels over all positions: mean first, then the squared
deviations, in float32. It reads and writes in place, 4 bytes an element and 2 for the residual, where PyTorch's own operators
(bias, GroupNorm, Mish, additions) read and write five times. A concatenation is copied, once a block.

This is the plainest of the backends in 16 bit, for convolutions of any length: what PyTorch's strongest arrangement computes, with
the passes between its convolutions fused. Groups of more than 16384 channels times positions (a power of two each) do not fit the
registers: right, but slow. Unmeasured on a card so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels.channels_last import ChannelsLastBlocks, Packed
from dydiff.kernels.launch import Launch
from dydiff.kernels.matmul import mish
from dydiff.kernels.matrix_gpu import GpuMatrix
from dydiff.kernels.unet_reference import GROUPS


@triton.jit(do_not_specialize=["length"])
def finish_kernel(
    out,
    bias,
    scale,
    shift,
    time,
    residual,
    length,
    N: tl.constexpr,  # channels
    GROUP: tl.constexpr,  # of them, in a group
    ROWS: tl.constexpr,  # a power of two >= length
    COLUMNS: tl.constexpr,  # a power of two >= GROUP
):
    groups: tl.constexpr = N // GROUP
    sample = tl.program_id(0) // groups
    row, member = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column, inside = tl.program_id(0) % groups * GROUP + member, member < GROUP
    place = sample.to(tl.int64) * length * N + (row * N)[:, None] + column[None, :]
    mask = (row < length)[:, None] & inside[None, :]

    y = tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    count = (length * GROUP).to(tl.float32)
    mean = tl.sum(tl.where(mask, y, 0.0)) / count
    y = tl.where(mask, y - mean, 0.0)
    variance = tl.sum(y * y) / count
    factor = tl.load(scale + column, mask=inside, other=0.0) / tl.sqrt(variance + 1e-5)
    y = mish(y * factor[None, :] + tl.load(shift + column, mask=inside, other=0.0)[None, :])
    if time is not None:
        y += tl.load(time + column, mask=inside, other=0.0)[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


def finish(y: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, time: Tensor | None, residual: Tensor | None) -> Launch:
    """The launch that finishes a convolution block in place: y [B, L, C] contiguous; time [C] and residual as y may be absent."""
    batch, length, channels = y.shape
    group = channels // GROUPS
    rows, columns = triton.next_power_of_2(length), triton.next_power_of_2(group)
    arguments = {
        "out": y,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "time": time,
        "residual": residual,
        "length": length,
        "N": channels,
        "GROUP": group,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    return Launch(finish_kernel, (batch * GROUPS,), arguments, warps=min(max(rows * columns // 512, 1), 16))


class CudnnBlocks(ChannelsLastBlocks):
    """Blocks backend with cuDNN's convolutions in float16 or bfloat16; execute: what happens to a launch."""

    channel_multiple = 8  # of 16 bit each: what cuDNN's kernels for channels-last tensors load at once

    def __init__(self, dtype: torch.dtype = torch.float16, execute: Callable[[Launch], None] = Launch.run):
        self.dtype = dtype
        self.execute = execute

    def make_matrix(self, weight: Tensor, bias: Tensor | None) -> GpuMatrix:
        return GpuMatrix(weight, bias, self.dtype)

    def make_filters(self, weight: Tensor) -> Tensor:
        return weight[:, :, None].to(self.dtype, memory_format=torch.channels_last)

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: Packed, time_bias: Tensor) -> Tensor:
        return super().residual_block(x if skip is None else torch.cat([x, skip], dim=2), None, packed, time_bias)

    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # [C_out, C_in, 1, K]
        image = x.transpose(1, 2)[:, :, None]  # [B, C_in, 1, L], channels last
        with _repeatable():
            y = F.conv2d(image, filters, padding=(0, filters.shape[3] // 2))
        y = y[:, :, 0].transpose(1, 2).contiguous()  # contiguous already, as cuDNN leaves it
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        self.execute(finish(y, *norm, time_bias, residual))
        return y


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN choose among algorithms that repeat themselves to the last bit, and by rule: a race may end otherwise next time."""
    settings = torch.backends.cudnn
    before = settings.deterministic, settings.benchmark
    settings.deterministic, settings.benchmark = True, False
    try:
        yield
    finally:
        settings.deterministic, settings.benchmark = before
