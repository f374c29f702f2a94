"""A convolution over the gapped layout as one matrix product, with the statistics for GroupNorm as a by-product.

    out[b, P l + p, o] = bias[o] + sum_{k, c} x[b, S l + k - left + p, c] matrix[p][k C + c, o]      S stride, P phases

x (and skip, whose channels follow those of x: never a copy) are gapped activations [gap + B (L + gap), C] in 16 bit, products
are summed in float32. One kernel serves the 5-tap convolutions, the 1x1, the downsampling (S = 2) and the transposed
convolution (P = 2, two taps each). Bytes: x once from memory (its K-fold overlap and the matrix come from L2), out once.

Statistics: GroupNorm's groups are whole channels of one sample over all positions, but a tile holds pieces of several samples
and of several or less than one group. So each tile writes, for each of its samples and each *part* (the largest power of two
that divides a group, at most the tile's columns), the mean and the sum of squared deviations from it, in float32 and of the
values as they are stored: where a group hardly varies, the rounding of its mean must be that of its values. normalisation.py
merges them. Nothing is added atomically: results do not depend on the order of the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dydiff.kernels.launch import Launch, Tile, choose, family
from dydiff.kernels.layout import Activation
from dydiff.kernels.matmul import multiply, sum_over_sample, zero_gaps
from dydiff.kernels.packing import DEPTH, Convolution
from dydiff.kernels.unet_reference import GROUPS

SIZES = ["samples", "length", "per_sample", "x_pitch", "x_shift", "out_pitch", "out_shift", "gap"]


@triton.jit(do_not_specialize=SIZES)
def convolution_kernel(
    x,
    skip,
    weight,
    bias,
    out,
    statistics,  # [B, CHUNKS, 2, N / PART]
    samples,
    length,  # output positions of a sample (in one phase)
    per_sample,  # rows of a sample in the numbering of the tiles: length, or length + gap with descriptors
    x_pitch,
    x_shift,  # row in x of the first tap of the first position
    out_pitch,
    out_shift,
    gap,
    C1: tl.constexpr,
    C2: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PHASES: tl.constexpr,
    MATRIX_ROWS: tl.constexpr,  # of one phase
    SKIP_ROW: tl.constexpr,  # first row of the matrix for skip
    N: tl.constexpr,  # columns of the matrix
    N_OUT: tl.constexpr,  # columns of out
    PART: tl.constexpr,  # 0: no statistics
    CHUNKS: tl.constexpr,
    GAP: tl.constexpr,  # a power of two >= gap; 0: out has no gaps
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    X_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
):
    # Programs that follow one another share the rows of x.
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    m = tl.program_id(0) // column_tiles
    n0 = tl.program_id(0) % column_tiles * COLUMNS
    phase = tl.program_id(1)

    r = m * ROWS + tl.arange(0, ROWS)
    sample, position = r // per_sample, r % per_sample
    valid = (position < length) & (sample < samples)
    rows = tl.where(valid, sample * x_pitch + position * STRIDE + x_shift + phase, 0)
    row = m * ROWS + x_shift
    weight_row = phase * MATRIX_ROWS

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = multiply(acc, x, row, rows, weight, weight_row, n0, C1, TAPS, N, COLUMNS, DEPTH, X_TMA, WEIGHT_TMA)
    if C2 > 0:
        weight_row += SKIP_ROW
        acc = multiply(acc, skip, row, rows, weight, weight_row, n0, C2, TAPS, N, COLUMNS, DEPTH, X_TMA, WEIGHT_TMA)

    n = n0 + tl.arange(0, COLUMNS)
    acc += tl.load(bias + n, mask=n < N_OUT, other=0.0)[None, :]
    out_rows = (sample * out_pitch + position * PHASES + out_shift + phase).to(tl.int64)
    inside = valid[:, None] & (n < N_OUT)[None, :]
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + out_rows[:, None] * N_OUT + n[None, :], acc, mask=inside)

    first = m * ROWS // per_sample
    last = tl.minimum((m * ROWS + ROWS - 1) // per_sample, samples - 1)
    if GAP > 0:
        zero_gaps(out, first, last, out_pitch, gap, n, N_OUT, GAP)
    if PART > 0:
        PARTS: tl.constexpr = COLUMNS // PART
        start = sample * per_sample
        begin = tl.maximum(start, m * ROWS)
        end = tl.minimum(start + length, m * ROWS + ROWS)
        count = (tl.maximum(end - begin, 1) * PART).to(tl.float32)
        sample = tl.where(valid, sample, -1)
        values = tl.reshape(acc.to(tl.float32), [ROWS, PARTS, PART])
        mean = sum_over_sample(tl.sum(values, axis=2), sample, first, last) / count[:, None]
        deviation = values - mean[:, :, None]
        squares = sum_over_sample(tl.sum(deviation * deviation, axis=2), sample, first, last)
        # The first row of each sample in this tile writes for all of them.
        part = n0 // PART + tl.arange(0, PARTS)
        head = (valid & (r == begin))[:, None] & (part < N // PART)[None, :]
        piece = (sample * CHUNKS + m - start // ROWS).to(tl.int64) * (2 * (N // PART))
        tl.store(statistics + piece[:, None] + part[None, :], mean, mask=head)
        tl.store(statistics + piece[:, None] + (N // PART + part)[None, :], squares, mask=head)


@dataclass(frozen=True)
class Statistics:
    """Mean and sum of squared deviations of the pieces of every sample: values [B, chunks, 2, parts] float32."""

    values: Tensor
    part: int  # channels of a piece
    tile_rows: int  # a sample's rows [b per_sample, b per_sample + L) are cut where a multiple of tile_rows lies
    per_sample: int


def largest_part(columns: int) -> int:
    """The largest power of two that divides the channels of a GroupNorm group."""
    group = columns // GROUPS
    return group & -group


@dataclass(frozen=True)
class Form:
    """How a convolution reads and writes."""

    stride: int = 1
    gapped: bool = False  # the output is an activation, otherwise a tensor [B L_out, columns]
    dtype: torch.dtype | None = None  # of such a tensor, that of the sources by default
    statistics: bool = False


def convolve(
    sources: tuple[Activation, ...], convolution: Convolution, capability: int, form: Form, tile: Tile | None = None
) -> tuple[Launch, Tensor | Activation, Statistics | None]:
    """The launch of a convolution, its output (not yet computed) and, if the form asks for them, the statistics.

    sources: one or two activations of one length, concatenated along channels. tile: one to use instead of the table's.
    """
    x, skip = sources[0], sources[1] if len(sources) > 1 else None
    widths = tuple(source.channels for source in sources)
    matrix = convolution.matrix(widths)
    phases, taps, columns, stride = len(convolution.phases), convolution.taps, len(convolution.bias), form.stride
    length = -(-x.length // stride)

    tile = tile or choose("conv", capability, x.batch * length, columns, length)
    # A descriptor's box must not be larger than its tensor.
    weight_tma, x_tma = family(capability) == "sm_90" and matrix.shape[1] >= tile.columns, False
    if family(capability) == "sm_90" and stride == phases == 1:
        # Boxes of consecutive rows: not where every second row is read, or a channel block would straddle two taps.
        x_tma = all(width % tile.depth == 0 for width in widths) and len(x.rows) >= tile.rows
    per_sample = x.pitch if x_tma else length

    if form.gapped:
        out = x.empty(length * phases, columns)
        out_rows, out_pitch, out_shift = out.rows, out.pitch, out.gap
    else:
        out = out_rows = x.rows.new_empty(x.batch * length * phases, columns, dtype=form.dtype)
        out_pitch, out_shift = length * phases, 0
    statistics = None
    if form.statistics:
        part = min(largest_part(columns), tile.columns)
        chunks = (length - 2) // tile.rows + 2
        values = out_rows.new_empty(x.batch, chunks, 2, columns // part, dtype=torch.float32)
        statistics = Statistics(values, part, tile.rows, per_sample)

    def operand(source: Activation | None) -> Tensor | TensorDescriptor | None:
        if source is None or not x_tma:
            return source and source.rows
        return TensorDescriptor.from_tensor(source.rows, [tile.rows, tile.depth])

    row_tiles = triton.cdiv(x.batch * per_sample, tile.rows)
    arguments = {
        "x": operand(x),
        "skip": operand(skip),
        "weight": TensorDescriptor.from_tensor(matrix, [tile.depth, tile.columns]) if weight_tma else matrix,
        "bias": convolution.bias,
        "out": out_rows,
        "statistics": statistics and statistics.values,
        "samples": x.batch,
        "length": length,
        "per_sample": per_sample,
        "x_pitch": x.pitch,
        "x_shift": x.gap - taps // 2,
        "out_pitch": out_pitch,
        "out_shift": out_shift,
        "gap": x.gap,
        "C1": x.channels,
        "C2": skip.channels if skip else 0,
        "TAPS": taps,
        "STRIDE": stride,
        "PHASES": phases,
        "MATRIX_ROWS": matrix.shape[0] // phases,
        "SKIP_ROW": triton.cdiv(taps * x.channels, DEPTH) * DEPTH,
        "N": matrix.shape[1],
        "N_OUT": columns,
        "PART": statistics.part if statistics else 0,
        "CHUNKS": statistics.values.shape[1] if statistics else 0,
        "GAP": triton.next_power_of_2(x.gap) if form.gapped else 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "X_TMA": x_tma,
        "WEIGHT_TMA": weight_tma,
    }
    grid = (row_tiles * triton.cdiv(matrix.shape[1], tile.columns), phases)
    return Launch(convolution_kernel, grid, arguments, tile.warps, tile.stages), out, statistics
