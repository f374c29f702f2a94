"""What is around the products of a Winograd convolution (winograd.py) on NVIDIA cards, in two Triton kernels.

    input_kernel    x [B, L, C] -> v [10, B T, C]: nine rows of a tile -> its ten points, T = ceil(L / 5) tiles a sample
    output_kernel   m [10, B T, C] -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time [C] + residual [B, L, C], and, if a
                    convolution comes next, y's points [10, B T, C]

x, y and the residual are in the gapped layout (layout.py). A program of `output_kernel` holds one GroupNorm group of a few samples,
whole channels over all positions. So it needs nothing of others: neither for the norm, mean first, then the squared deviations, in
float32, nor for the points. A tile reads two rows of each neighbour for them, which another thread of the same program has written.

Bytes, in units of an activation: a product (2) and the residual (1) are read, y (1) and its points (2) are written. Arithmetic
takes about as long: some 50 instructions an element, of which Mish has ten. Groups of more than 4096 channels times tiles (a power
of two each) do not fit the registers: right, but slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels.launch import BUSY, Launch
from dydiff.kernels.layout import Activation
from dydiff.kernels.matmul import mish, sum_over_sample, zero_gaps
from dydiff.kernels.packing import ConvBlock
from dydiff.kernels.unet_reference import GROUPS
from dydiff.kernels.winograd import F5

MOST_HELD = 2048  # elements of a tile, with several samples in it: 8 a thread of 8 warps

A, B, C = (tl.constexpr(point) for point in F5.real_points)


# Sums stand in the order that makes a multiplication and an addition one instruction: these kernels are not far from where
# arithmetic, not memory, takes the time.


@triton.jit
def quadratic(s0, s1, s2, a: tl.constexpr, b: tl.constexpr):
    """The polynomial with these roots and the leading coefficient 1, of coefficients s for powers of its argument."""
    return s2 - s1 * (a + b) + s0 * (a * b)


@triton.jit
def cubic(r0, r1, r2, r3, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr):
    """The same with three roots."""
    return r3 - r2 * (a + b + c) + r1 * (a * b + a * c + b * c) - r0 * (a * b * c)


@triton.jit
def store_points(v, plane, mask, r0, r1, r2, r3, r4, r5, r6, r7, r8):
    """The ten points B^T r of nine rows of each tile, `plane` elements from one point to the next."""
    dtype: tl.constexpr = v.dtype.element_ty
    # A point and its negative share the even and the odd part of their polynomials, all three pairs the factor x^2 + 1.
    e0, e1, e2, o0, o1, o2 = r0 + r2, r2 + r4, r4 + r6, r1 + r3, r3 + r5, r5 + r7
    even, odd = quadratic(e0, e1, e2, B * B, C * C), quadratic(o0, o1, o2, B * B, C * C)
    tl.store(v + 0 * plane, (odd + even * A).to(dtype), mask=mask)
    tl.store(v + 1 * plane, (odd - even * A).to(dtype), mask=mask)
    even, odd = quadratic(e0, e1, e2, A * A, C * C), quadratic(o0, o1, o2, A * A, C * C)
    tl.store(v + 2 * plane, (odd + even * B).to(dtype), mask=mask)
    tl.store(v + 3 * plane, (odd - even * B).to(dtype), mask=mask)
    even, odd = quadratic(e0, e1, e2, A * A, B * B), quadratic(o0, o1, o2, A * A, B * B)
    tl.store(v + 4 * plane, (odd + even * C).to(dtype), mask=mask)
    tl.store(v + 5 * plane, (odd - even * C).to(dtype), mask=mask)
    even, odd = cubic(r0, r2, r4, r6, A * A, B * B, C * C), cubic(r1, r3, r5, r7, A * A, B * B, C * C)
    tl.store(v + 6 * plane, (even - odd).to(dtype), mask=mask)
    tl.store(v + 7 * plane, (even + odd).to(dtype), mask=mask)
    tl.store(v + 8 * plane, odd.to(dtype), mask=mask)
    tl.store(v + 9 * plane, (even + cubic(r2, r4, r6, r8, A * A, B * B, C * C)).to(dtype), mask=mask)


@triton.jit
def load_row(x, position, valid, length, inside, N: tl.constexpr):
    """A row of each tile [TILES, COLUMNS] in float32; zeros outside of the sample."""
    mask = (valid & (position >= 0) & (position < length))[:, None] & inside[None, :]
    return tl.load(x + (position * N)[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["samples", "length", "tiles", "gap"])
def input_kernel(
    x,
    points,
    samples,
    length,
    tiles,  # of a sample
    gap,
    N: tl.constexpr,  # channels
    TILES: tl.constexpr,  # of a program
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    sample = tile // tiles
    valid = sample < samples
    top = tile % tiles * 5 - 2
    x += ((gap + sample.to(tl.int64) * (length + gap)) * N)[:, None] + column[None, :]
    r0 = load_row(x, top, valid, length, inside, N)
    r1 = load_row(x, top + 1, valid, length, inside, N)
    r2 = load_row(x, top + 2, valid, length, inside, N)
    r3 = load_row(x, top + 3, valid, length, inside, N)
    r4 = load_row(x, top + 4, valid, length, inside, N)
    r5 = load_row(x, top + 5, valid, length, inside, N)
    r6 = load_row(x, top + 6, valid, length, inside, N)
    r7 = load_row(x, top + 7, valid, length, inside, N)
    r8 = load_row(x, top + 8, valid, length, inside, N)
    points += tile.to(tl.int64)[:, None] * N + column[None, :]
    plane = samples.to(tl.int64) * tiles * N
    store_points(points, plane, valid[:, None] & inside[None, :], r0, r1, r2, r3, r4, r5, r6, r7, r8)


@triton.jit
def load_product(m, more, plane, place, mask):
    """The point of each tile that lies `plane` elements on, of the sum of the products with one or two sources."""
    product = tl.load(m + plane + place, mask=mask, other=0.0).to(tl.float32)
    if more is not None:
        product += tl.load(more + plane + place, mask=mask, other=0.0).to(tl.float32)
    return product


@triton.jit
def finish_row(out, residual, place, deviation, factor, shift, time, mask):
    """Norm, Mish, time bias and residual of one row of each tile; zeros outside of the sample."""
    y = mish(deviation * factor + shift[None, :]) + time[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
    return tl.where(mask, y, 0.0)


@triton.jit(do_not_specialize=["samples", "length", "tiles", "gap", "per_program"])
def output_kernel(
    m,
    more,  # of a second source
    bias,
    scale,
    shift,
    time,
    residual,
    out,
    points,
    samples,
    length,
    tiles,  # of a sample
    gap,
    per_program,  # samples
    N: tl.constexpr,  # channels
    GROUP: tl.constexpr,  # of them, in a group
    GAP: tl.constexpr,  # a power of two >= gap
    TILES: tl.constexpr,  # a power of two >= per_program * tiles
    COLUMNS: tl.constexpr,  # a power of two >= GROUP
):
    groups: tl.constexpr = N // GROUP
    first_sample = tl.program_id(0) // groups * per_program
    last_sample = tl.minimum(first_sample + per_program, samples) - 1
    tile, member = tl.arange(0, TILES), tl.arange(0, COLUMNS)
    column, inside = tl.program_id(0) % groups * GROUP + member, member < GROUP
    sample, first = first_sample + tile // tiles, tile % tiles * 5  # first of the tile's positions
    valid = sample <= last_sample
    mask = valid[:, None] & inside[None, :]

    place = (tile * N)[:, None] + column[None, :]
    start, plane = first_sample.to(tl.int64) * tiles * N, samples.to(tl.int64) * tiles * N
    m += start
    if more is not None:
        more += start
    if points is not None:
        points += start
    m0 = load_product(m, more, 0, place, mask)
    m1 = load_product(m, more, plane, place, mask)
    m2 = load_product(m, more, 2 * plane, place, mask)
    m3 = load_product(m, more, 3 * plane, place, mask)
    m4 = load_product(m, more, 4 * plane, place, mask)
    m5 = load_product(m, more, 5 * plane, place, mask)
    m6 = load_product(m, more, 6 * plane, place, mask)
    m7 = load_product(m, more, 7 * plane, place, mask)
    m8 = load_product(m, more, 8 * plane, place, mask)
    m9 = load_product(m, more, 9 * plane, place, mask)
    even_a, even_b, even_c, even_i = m0 + m1, m2 + m3, m4 + m5, m6 + m8
    odd_a, odd_b, odd_c, odd_i = m0 - m1, m2 - m3, m4 - m5, m7 + m8
    offset = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    y0 = offset + even_i + even_a + even_b + even_c
    y1 = offset + odd_i + odd_a * A + odd_b * B + odd_c * C
    y2 = offset - even_i + even_a * (A * A) + even_b * (B * B) + even_c * (C * C)
    y3 = offset - odd_i + odd_a * (A * A * A) + odd_b * (B * B * B) + odd_c * (C * C * C)
    y4 = offset + even_i + even_a * (A * A * A * A) + even_b * (B * B * B * B) + even_c * (C * C * C * C) + m9

    mask0, mask1 = mask & (first < length)[:, None], mask & (first + 1 < length)[:, None]
    mask2, mask3 = mask & (first + 2 < length)[:, None], mask & (first + 3 < length)[:, None]
    mask4 = mask & (first + 4 < length)[:, None]
    count = (length * GROUP).to(tl.float32)
    total = tl.where(mask0, y0, 0.0) + tl.where(mask1, y1, 0.0) + tl.where(mask2, y2, 0.0)
    total += tl.where(mask3, y3, 0.0) + tl.where(mask4, y4, 0.0)
    owner = tl.where(valid, sample, -1)
    mean = sum_over_sample(tl.sum(total, axis=1, keep_dims=True), owner, first_sample, last_sample) / count
    y0, y1 = tl.where(mask0, y0 - mean, 0.0), tl.where(mask1, y1 - mean, 0.0)
    y2, y3 = tl.where(mask2, y2 - mean, 0.0), tl.where(mask3, y3 - mean, 0.0)
    y4 = tl.where(mask4, y4 - mean, 0.0)
    total = y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + y4 * y4
    variance = sum_over_sample(tl.sum(total, axis=1, keep_dims=True), owner, first_sample, last_sample) / count
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :] * tl.rsqrt(variance + 1e-5)
    shifts = tl.load(shift + column, mask=inside, other=0.0)
    if time is not None:
        times = tl.load(time + column, mask=inside, other=0.0)
    else:
        times = tl.zeros_like(shifts)

    rows = out + (gap + first_sample.to(tl.int64) * (length + gap)) * N
    if residual is not None:
        residual += (gap + first_sample.to(tl.int64) * (length + gap)) * N
    of_sample = (sample - first_sample) * (length + gap)
    row = ((of_sample + first) * N)[:, None] + column[None, :]
    y0 = finish_row(rows, residual, row, y0, factor, shifts, times, mask0)
    y1 = finish_row(rows, residual, row + N, y1, factor, shifts, times, mask1)
    y2 = finish_row(rows, residual, row + 2 * N, y2, factor, shifts, times, mask2)
    y3 = finish_row(rows, residual, row + 3 * N, y3, factor, shifts, times, mask3)
    y4 = finish_row(rows, residual, row + 4 * N, y4, factor, shifts, times, mask4)
    zero_gaps(out, first_sample, last_sample, length + gap, gap, tl.where(inside, column, N), N, GAP)
    if points is not None:
        # A tile reads two rows of each neighbour, which other threads have just written.
        tl.debug_barrier()
        rows += (of_sample * N)[:, None] + column[None, :]
        r0 = load_row(rows, first - 2, valid, length, inside, N)
        r1 = load_row(rows, first - 1, valid, length, inside, N)
        r7 = load_row(rows, first + 5, valid, length, inside, N)
        r8 = load_row(rows, first + 6, valid, length, inside, N)
        store_points(points + place, plane, mask, r0, r1, y0, y1, y2, y3, y4, r7, r8)


def transform_input(x: Activation) -> tuple[Launch, Tensor]:
    """The launch that computes the points of an activation, and the points [10, B T, C]."""
    columns = min(triton.next_power_of_2(x.channels), 64)
    tiles, tiles_each = triton.cdiv(x.length, F5.tile), 1024 // columns
    points = x.rows.new_empty(F5.points, x.batch * tiles, x.channels)
    arguments = {
        "x": x.rows,
        "points": points,
        "samples": x.batch,
        "length": x.length,
        "tiles": tiles,
        "gap": x.gap,
        "N": x.channels,
        "TILES": tiles_each,
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(points.shape[1], tiles_each), triton.cdiv(x.channels, columns))
    return Launch(input_kernel, grid, arguments, warps=4), points


def share_programs(batch: int, tiles: int, columns: int) -> tuple[int, int, int]:
    """How many samples of so many tiles a program of `output_kernel` takes, the power of two of tiles that holds them, and warps.

    One sample leaves up to half of the power of two empty (5 tiles of 8 at 25 positions), three fit better (15 of 16). Of what fits
    equally well, the least that gives a warp 8 elements a thread. Where that leaves multiprocessors idle, time goes by what one
    program takes: then it has one sample, and twice the warps. A rule of thumb, unmeasured.
    """
    least = triton.next_power_of_2(tiles)
    choices = [least] + [held for held in (2 * least, 4 * least) if held * columns <= MOST_HELD]
    held = max(choices, key=lambda held: (held // tiles * tiles / held, min(held * columns, 256), -held))
    per_program, elements_a_warp = held // tiles, 256
    if triton.cdiv(batch, per_program) * GROUPS < BUSY:
        per_program, held, elements_a_warp = 1, least, 128
    return per_program, held, min(max(held * columns // elements_a_warp, 1), 16)


def transform_output(
    products: list[Tensor],
    block: ConvBlock,
    like: Activation,
    time: Tensor | None,
    residual: Activation | None,
    points: bool,
) -> tuple[Launch, Activation, Tensor | None]:
    """The launch that finishes a block, and what it fills: an activation (gaps included), and its points [10, B T, C] if wanted.

    products: [10, B T, C], of one or two sources whose sum is meant; like: an activation of the samples and length in question;
    time [C] and residual, an activation of C channels, may be absent.
    """
    channels = len(block.scale)
    tiles, group = triton.cdiv(like.length, F5.tile), channels // GROUPS
    columns = triton.next_power_of_2(group)
    per_program, held, warps = share_programs(like.batch, tiles, columns)
    y = like.empty(like.length, channels)
    v = torch.empty_like(products[0]) if points else None
    arguments = {
        "m": products[0],
        "more": products[1] if len(products) > 1 else None,
        "bias": block.convolution.bias,
        "scale": block.scale,
        "shift": block.shift,
        "time": time,
        "residual": residual and residual.rows,
        "out": y.rows,
        "points": v,
        "samples": like.batch,
        "length": like.length,
        "tiles": tiles,
        "gap": like.gap,
        "per_program": per_program,
        "N": channels,
        "GROUP": group,
        "GAP": triton.next_power_of_2(like.gap),
        "TILES": held,
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(like.batch, per_program) * GROUPS,)
    return Launch(output_kernel, grid, arguments, warps), y, v
