"""The U-Net's blocks on NVIDIA cards as Winograd convolutions (winograd.py): cuBLAS multiplies, Triton does what is around it.

    input_kernel    x [B, L, C] -> v [10, B T, C]: nine rows of a tile -> its ten points, T = ceil(L / 5) tiles a sample
    output_kernel   m [10, B T, C] -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time [C] + residual [B, L, C]

A program of `output_kernel` holds one GroupNorm group of one sample, whole channels over all positions, so it needs nothing of
others, and the convolution's result never leaves its registers: mean first, then the squared deviations, in float32.

Work: the products are 2.5 times less than a direct convolution's, and at 512 and 1024 channels, where nearly all of them are,
reading v and writing m hides behind them. What is left is traffic: x (1), v (2), m (2), y (1) and the residual (1), in units of an
activation. At 2048 x 25 positions and 1024 channels these are 0.21 TFLOP where there were 0.54, and 0.7 GB. Groups of more than
4096 channels times tiles (a power of two each) do not fit the registers: right, but slow.

Error: where rows are independent, 2.04 times the rounding of a direct convolution in the same 16 bit. Points and products are some
ten times larger than activations, which leaves float16 (up to 65504) less room. Unmeasured on a card so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels.channels_last import ChannelsLastBlocks, Packed
from dydiff.kernels.launch import Launch
from dydiff.kernels.matmul import mish
from dydiff.kernels.matrix_gpu import GpuMatrix
from dydiff.kernels.unet_reference import GROUPS
from dydiff.kernels.winograd import F5

A, B, C = (tl.constexpr(point) for point in F5.real_points)


@triton.jit
def cubic(r0, r1, r2, r3, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr):
    """The polynomial with these roots and the leading coefficient 1, of coefficients r for powers of its argument."""
    return r0 * (-a * b * c) + r1 * (a * b + a * c + b * c) - r2 * (a + b + c) + r3


@triton.jit
def load_row(x, position, valid, length, inside, CHANNELS: tl.constexpr):
    """A row of each tile [TILES, COLUMNS] in float32; zeros outside of the sample."""
    mask = (valid & (position >= 0) & (position < length))[:, None] & inside[None, :]
    return tl.load(x + (position * CHANNELS)[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["samples", "length", "tiles"])
def input_kernel(
    x,
    out,
    samples,
    length,
    tiles,  # of a sample
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,  # of out's rows
    OFFSET: tl.constexpr,  # where x's channels begin in them
    TILES: tl.constexpr,  # of a program
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    sample = tile // tiles
    valid = sample < samples
    top = tile % tiles * 5 - 2
    x += (sample.to(tl.int64) * length * CHANNELS)[:, None] + column[None, :]
    r0 = load_row(x, top, valid, length, inside, CHANNELS)
    r1 = load_row(x, top + 1, valid, length, inside, CHANNELS)
    r2 = load_row(x, top + 2, valid, length, inside, CHANNELS)
    r3 = load_row(x, top + 3, valid, length, inside, CHANNELS)
    r4 = load_row(x, top + 4, valid, length, inside, CHANNELS)
    r5 = load_row(x, top + 5, valid, length, inside, CHANNELS)
    r6 = load_row(x, top + 6, valid, length, inside, CHANNELS)
    r7 = load_row(x, top + 7, valid, length, inside, CHANNELS)
    r8 = load_row(x, top + 8, valid, length, inside, CHANNELS)

    out += tile.to(tl.int64)[:, None] * WIDTH + OFFSET + column[None, :]
    plane = samples.to(tl.int64) * tiles * WIDTH
    mask = valid[:, None] & inside[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    # A point and its negative share the even and the odd part of their polynomials.
    even, odd = cubic(r0, r2, r4, r6, B * B, C * C, -1), cubic(r1, r3, r5, r7, B * B, C * C, -1)
    tl.store(out + 0 * plane, (odd + even * A).to(dtype), mask=mask)
    tl.store(out + 1 * plane, (odd - even * A).to(dtype), mask=mask)
    even, odd = cubic(r0, r2, r4, r6, A * A, C * C, -1), cubic(r1, r3, r5, r7, A * A, C * C, -1)
    tl.store(out + 2 * plane, (odd + even * B).to(dtype), mask=mask)
    tl.store(out + 3 * plane, (odd - even * B).to(dtype), mask=mask)
    even, odd = cubic(r0, r2, r4, r6, A * A, B * B, -1), cubic(r1, r3, r5, r7, A * A, B * B, -1)
    tl.store(out + 4 * plane, (odd + even * C).to(dtype), mask=mask)
    tl.store(out + 5 * plane, (odd - even * C).to(dtype), mask=mask)
    even, odd = cubic(r0, r2, r4, r6, A * A, B * B, C * C), cubic(r1, r3, r5, r7, A * A, B * B, C * C)
    tl.store(out + 6 * plane, (even - odd).to(dtype), mask=mask)
    tl.store(out + 7 * plane, (even + odd).to(dtype), mask=mask)
    tl.store(out + 8 * plane, odd.to(dtype), mask=mask)
    tl.store(out + 9 * plane, (even + cubic(r2, r4, r6, r8, A * A, B * B, C * C)).to(dtype), mask=mask)


@triton.jit
def finish_row(out, residual, deviation, factor, shift, time, position, mask, N: tl.constexpr):
    """Norm, Mish, time bias and residual of one row of each tile."""
    y = mish(deviation * factor[None, :] + shift[None, :]) + time[None, :]
    if residual is not None:
        y += tl.load(residual + (position * N)[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (position * N)[:, None], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "length", "tiles"])
def output_kernel(
    m,
    bias,
    scale,
    shift,
    time,
    residual,
    out,
    samples,
    length,
    tiles,  # of a sample
    N: tl.constexpr,  # channels
    GROUP: tl.constexpr,  # of them, in a group
    TILES: tl.constexpr,  # a power of two >= tiles
    COLUMNS: tl.constexpr,  # a power of two >= GROUP
):
    groups: tl.constexpr = N // GROUP
    sample = tl.program_id(0) // groups
    tile, member = tl.arange(0, TILES), tl.arange(0, COLUMNS)
    column, inside = tl.program_id(0) % groups * GROUP + member, member < GROUP

    m += ((sample.to(tl.int64) * tiles + tile) * N)[:, None] + column[None, :]
    plane = samples.to(tl.int64) * tiles * N
    mask = (tile < tiles)[:, None] & inside[None, :]
    m0 = tl.load(m, mask=mask, other=0.0).to(tl.float32)
    m1 = tl.load(m + plane, mask=mask, other=0.0).to(tl.float32)
    m2 = tl.load(m + 2 * plane, mask=mask, other=0.0).to(tl.float32)
    m3 = tl.load(m + 3 * plane, mask=mask, other=0.0).to(tl.float32)
    m4 = tl.load(m + 4 * plane, mask=mask, other=0.0).to(tl.float32)
    m5 = tl.load(m + 5 * plane, mask=mask, other=0.0).to(tl.float32)
    m6 = tl.load(m + 6 * plane, mask=mask, other=0.0).to(tl.float32)
    m7 = tl.load(m + 7 * plane, mask=mask, other=0.0).to(tl.float32)
    m8 = tl.load(m + 8 * plane, mask=mask, other=0.0).to(tl.float32)
    m9 = tl.load(m + 9 * plane, mask=mask, other=0.0).to(tl.float32)
    even_a, even_b, even_c, even_i = m0 + m1, m2 + m3, m4 + m5, m6 + m8
    odd_a, odd_b, odd_c, odd_i = m0 - m1, m2 - m3, m4 - m5, m7 + m8
    offset = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    y0 = even_a + even_b + even_c + even_i + offset
    y1 = odd_a * A + odd_b * B + odd_c * C + odd_i + offset
    y2 = even_a * (A * A) + even_b * (B * B) + even_c * (C * C) - even_i + offset
    y3 = odd_a * (A * A * A) + odd_b * (B * B * B) + odd_c * (C * C * C) - odd_i + offset
    y4 = even_a * (A * A * A * A) + even_b * (B * B * B * B) + even_c * (C * C * C * C) + even_i + m9 + offset

    first = tile * 5
    mask0, mask1 = mask & (first < length)[:, None], mask & (first + 1 < length)[:, None]
    mask2, mask3 = mask & (first + 2 < length)[:, None], mask & (first + 3 < length)[:, None]
    mask4 = mask & (first + 4 < length)[:, None]
    count = (length * GROUP).to(tl.float32)
    total = tl.where(mask0, y0, 0.0) + tl.where(mask1, y1, 0.0) + tl.where(mask2, y2, 0.0)
    mean = tl.sum(total + tl.where(mask3, y3, 0.0) + tl.where(mask4, y4, 0.0)) / count
    y0, y1 = tl.where(mask0, y0 - mean, 0.0), tl.where(mask1, y1 - mean, 0.0)
    y2, y3 = tl.where(mask2, y2 - mean, 0.0), tl.where(mask3, y3 - mean, 0.0)
    y4 = tl.where(mask4, y4 - mean, 0.0)
    variance = tl.sum(y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + y4 * y4) / count
    factor = tl.load(scale + column, mask=inside, other=0.0) / tl.sqrt(variance + 1e-5)
    shifts = tl.load(shift + column, mask=inside, other=0.0)
    if time is not None:
        times = tl.load(time + column, mask=inside, other=0.0)
    else:
        times = tl.zeros_like(shifts)

    start = (sample.to(tl.int64) * length * N) + column[None, :]
    out += start
    if residual is not None:
        residual += start
    finish_row(out, residual, y0, factor, shifts, times, first, mask0, N)
    finish_row(out, residual, y1, factor, shifts, times, first + 1, mask1, N)
    finish_row(out, residual, y2, factor, shifts, times, first + 2, mask2, N)
    finish_row(out, residual, y3, factor, shifts, times, first + 3, mask3, N)
    finish_row(out, residual, y4, factor, shifts, times, first + 4, mask4, N)


def transform_input(x: Tensor, v: Tensor, offset: int) -> Launch:
    """The launch that fills the columns of v [10, B T, ..] from `offset` on with B^T x, x [B, L, C]."""
    batch, length, channels = x.shape
    columns = min(triton.next_power_of_2(channels), 64)
    tiles_each = 1024 // columns
    arguments = {
        "x": x,
        "out": v,
        "samples": batch,
        "length": length,
        "tiles": triton.cdiv(length, F5.tile),
        "CHANNELS": channels,
        "WIDTH": v.shape[2],
        "OFFSET": offset,
        "TILES": tiles_each,
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(v.shape[1], tiles_each), triton.cdiv(channels, columns))
    return Launch(input_kernel, grid, arguments, warps=4)


def transform_output(
    m: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, out: Tensor, time: Tensor | None, residual: Tensor | None
) -> Launch:
    """The launch that finishes a block: m [10, B T, C] -> out [B, L, C]; time [C] and residual [B, L, C] may be absent."""
    batch, length, channels = out.shape
    tiles, group = triton.cdiv(length, F5.tile), channels // GROUPS
    held = triton.next_power_of_2(tiles) * triton.next_power_of_2(group)
    arguments = {
        "m": m,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "time": time,
        "residual": residual,
        "out": out,
        "samples": batch,
        "length": length,
        "tiles": tiles,
        "N": channels,
        "GROUP": group,
        "TILES": triton.next_power_of_2(tiles),
        "COLUMNS": triton.next_power_of_2(group),
    }
    return Launch(output_kernel, (batch * GROUPS,), arguments, warps=min(max(held // 256, 1), 16))


class TritonWinogradBlocks(ChannelsLastBlocks):
    """Blocks backend of Winograd convolutions for one float16 or bfloat16; execute: what happens to a launch.

    Raises:
        DydiffError: from `pack`, a kernel size other than 5.
    """

    channel_multiple = 8  # of 16 bit each, so that rows are aligned for cuBLAS

    def __init__(self, dtype: torch.dtype = torch.float16, execute: Callable[[Launch], None] = Launch.run):
        self.dtype = dtype
        self.execute = execute

    def make_matrix(self, weight: Tensor, bias: Tensor | None) -> GpuMatrix:
        return GpuMatrix(weight, bias, self.dtype)

    def make_filters(self, weight: Tensor) -> Tensor:
        return F5.filters(weight).to(self.dtype).contiguous()

    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # [points, C_in, C_out]
        batch, length, channels = x.shape
        v = x.new_empty(F5.points, batch * triton.cdiv(length, F5.tile), filters.shape[1])
        self.execute(transform_input(x, v, 0))
        if skip is not None:
            self.execute(transform_input(skip, v, channels))
        y = x.new_empty(batch, length, filters.shape[2])
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        self.execute(transform_output(torch.bmm(v, filters), *norm, y, time_bias, residual))
        return y
