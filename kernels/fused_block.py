"""A whole convolution block in one kernel, for the shapes where a tile holds whole samples and whole groups.

    out = mish(group_norm(conv(x ++ skip))) + time            or            mish(group_norm(conv(x))) + residual

A tile's rows are the positions of as many whole samples as fit (5 x 25 of 128, 5 x 50 of 256), its columns whole GroupNorm
groups, so the normalisation needs nothing from other programs and the convolution's result never leaves the registers: bytes
are x once, out once and the residual once, where the two-pass way writes and reads the result in between. The statistics are
taken from the float32 sums, mean first, then the squared deviations. A 1x1 residual costs no second accumulator: after Mish
the block's value *is* the accumulator, and the product with the 1x1 matrix goes on from it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dydiff.kernels.launch import Launch, Tile, choose, family
from dydiff.kernels.layout import Activation
from dydiff.kernels.matmul import mish, multiply, sum_over_sample, zero_gaps
from dydiff.kernels.packing import DEPTH, ConvBlock, Convolution, Residual
from dydiff.kernels.unet_reference import GROUPS

# With fewer useful rows the two-pass way is taken: a guess at where idle matrix units cost more than a second pass, unmeasured.
LEAST_USED = 0.7

SIZES = ["samples", "length", "gap", "per_tile"]


@triton.jit(do_not_specialize=SIZES)
def block_kernel(
    x,
    skip,
    weight,
    bias,
    scale,
    shift,
    time,
    residual,
    residual_skip,
    residual_weight,
    residual_bias,
    out,
    samples,
    length,
    gap,
    per_tile,  # samples in a tile
    C1: tl.constexpr,
    C2: tl.constexpr,
    TAPS: tl.constexpr,
    SKIP_ROW: tl.constexpr,
    R1: tl.constexpr,  # channels of residual and residual_skip where residual_weight is given
    R2: tl.constexpr,
    RESIDUAL_SKIP_ROW: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    GAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
):
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    PARTS: tl.constexpr = COLUMNS // GROUP
    first = tl.program_id(0) // column_tiles * per_tile
    n0 = tl.program_id(0) % column_tiles * COLUMNS
    pitch = length + gap

    r = tl.arange(0, ROWS)
    sample, position = first + r // length, r % length
    last = tl.minimum(first + per_tile, samples) - 1
    valid = sample <= last
    rows = tl.where(valid, sample * pitch + position + gap, 0)  # of x, of the residual and of out
    taps = tl.where(valid, rows - TAPS // 2, 0)
    n = n0 + tl.arange(0, COLUMNS)

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = multiply(acc, x, 0, taps, weight, 0, n0, C1, TAPS, N, COLUMNS, DEPTH, False, WEIGHT_TMA)
    if C2 > 0:
        acc = multiply(acc, skip, 0, taps, weight, SKIP_ROW, n0, C2, TAPS, N, COLUMNS, DEPTH, False, WEIGHT_TMA)
    acc += tl.load(bias + n, mask=n < N, other=0.0)[None, :]

    sample = tl.where(valid, sample, -1)
    count = (length * GROUP).to(tl.float32)
    values = tl.reshape(acc, [ROWS, PARTS, GROUP])
    mean = sum_over_sample(tl.sum(values, axis=2), sample, first, last) / count
    values -= mean[:, :, None]
    variance = sum_over_sample(tl.sum(values * values, axis=2), sample, first, last) / count
    values *= (1.0 / tl.sqrt(variance + 1e-5))[:, :, None]
    acc = tl.reshape(values, [ROWS, COLUMNS])
    acc = acc * tl.load(scale + n, mask=n < N, other=0.0)[None, :] + tl.load(shift + n, mask=n < N, other=0.0)[None, :]
    acc = mish(acc)

    if time is not None:
        acc += tl.load(time + n, mask=n < N, other=0.0)[None, :]
    addresses = rows.to(tl.int64)[:, None] * N + n[None, :]
    inside = valid[:, None] & (n < N)[None, :]
    if R1 > 0:
        acc += tl.load(residual_bias + n, mask=n < N, other=0.0)[None, :]
        acc = multiply(acc, residual, 0, rows, residual_weight, 0, n0, R1, 1, N, COLUMNS, DEPTH, False, WEIGHT_TMA)
        if R2 > 0:
            row: tl.constexpr = RESIDUAL_SKIP_ROW
            acc = multiply(acc, residual_skip, 0, rows, residual_weight, row, n0, R2, 1, N, COLUMNS, DEPTH, False, WEIGHT_TMA)
    elif residual is not None:
        acc += tl.load(residual + addresses, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + addresses, acc.to(out.dtype.element_ty), mask=inside)
    zero_gaps(out, first, last, pitch, gap, n, N, GAP)


def samples_per_tile(tile: Tile, length: int) -> int:
    """How many whole samples of `length` rows a tile holds."""
    return tile.rows // length


def worth(tile: Tile, length: int, columns: int) -> float:
    """The share of a tile's rows that are used, or 0 where it cannot hold whole samples and groups or too few are used."""
    group = columns // GROUPS
    if group & (group - 1) or group > tile.columns or tile.columns > max(4 * group, 64):
        return 0.0  # more than four groups side by side, 128 columns wide, do not fit the registers on sm_80
    used = samples_per_tile(tile, length) * length / tile.rows
    return used if used >= LEAST_USED else 0.0


def fuse_block(
    sources: tuple[Activation, ...],
    block: ConvBlock,
    out: Activation,
    capability: int,
    time: Tensor | None = None,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Launch | None:
    """The launch that fills `out` (gaps included) with one convolution block, or None if no tile fits the shape.

    sources: one or two activations, concatenated along channels. tile: one to use instead of the table's.
    """
    x, columns = sources[0], out.channels
    tile = tile or choose(
        "block", capability, x.batch * x.length, columns, x.length, lambda tile: worth(tile, x.length, columns)
    )
    if tile is None:
        return None
    descriptors = family(capability) == "sm_90" and columns >= tile.columns  # a box must not be larger than its tensor

    def matrix(convolution: Convolution | None, inputs: tuple[Activation, ...]) -> Tensor | TensorDescriptor | None:
        if convolution is None:
            return None
        values = convolution.matrix(tuple(source.channels for source in inputs))
        return TensorDescriptor.from_tensor(values, [tile.depth, tile.columns]) if descriptors else values

    def rows_and_widths(inputs: tuple[Activation, ...]) -> tuple[Tensor | None, Tensor | None, int, int]:
        first, second = (*inputs, None, None)[:2]
        return first and first.rows, second and second.rows, first.channels if first else 0, second.channels if second else 0

    added = residual or Residual((), None)
    rows, skip_rows, width, skip_width = rows_and_widths(sources)
    residual_rows, residual_skip_rows, residual_width, residual_skip_width = rows_and_widths(added.sources)
    taps = block.convolution.taps
    arguments = {
        "x": rows,
        "skip": skip_rows,
        "weight": matrix(block.convolution, sources),
        "bias": block.convolution.bias,
        "scale": block.scale,
        "shift": block.shift,
        "time": time,
        "residual": residual_rows,
        "residual_skip": residual_skip_rows,
        "residual_weight": matrix(added.convolution, added.sources),
        "residual_bias": added.convolution and added.convolution.bias,
        "out": out.rows,
        "samples": x.batch,
        "length": x.length,
        "gap": x.gap,
        "per_tile": samples_per_tile(tile, x.length),
        "C1": width,
        "C2": skip_width,
        "TAPS": taps,
        "SKIP_ROW": triton.cdiv(taps * width, DEPTH) * DEPTH,
        "R1": residual_width if added.convolution else 0,
        "R2": residual_skip_width if added.convolution else 0,
        "RESIDUAL_SKIP_ROW": triton.cdiv(residual_width, DEPTH) * DEPTH,
        "N": columns,
        "GROUP": columns // GROUPS,
        "GAP": triton.next_power_of_2(x.gap),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "WEIGHT_TMA": descriptors,
    }
    grid = (triton.cdiv(x.batch, samples_per_tile(tile, x.length)) * triton.cdiv(columns, tile.columns),)
    return Launch(block_kernel, grid, arguments, tile.warps, tile.stages)
