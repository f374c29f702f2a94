"""The second pass of a convolution block: GroupNorm, Mish and what is added after them, in one reading.

    out[b, l, c] = mish((raw[b, l, c] - mean[b, g]) rstd[b, g] scale[c] + shift[c]) + time[c] + residual[b, l, c]

raw [B L, C] in 16 bit is what convolution.py wrote, with its statistics; time [C] float32 and residual [.., C] may be absent;
out is a gapped activation whose gaps are zeroed here. Bytes an element: raw and residual are read once, out is written once,
6 in all, where PyTorch's GroupNorm (which reads twice), Mish and an addition move 16. The pieces of a group are merged with the
rule for the mean and the squared deviations of a union (Chan, Golub and LeVeque 1983): no difference of large numbers, and
always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels.convolution import Statistics
from dydiff.kernels.launch import Launch
from dydiff.kernels.layout import Activation
from dydiff.kernels.matmul import mish
from dydiff.kernels.unet_reference import GROUPS

SIZES = ["length", "gap", "per_sample", "blocks", "residual_pitch", "residual_shift"]


@triton.jit(do_not_specialize=SIZES)
def normalisation_kernel(
    raw,
    statistics,  # [B, CHUNKS, 2, N / PART]
    scale,
    shift,
    time,
    residual,
    out,
    length,
    gap,
    per_sample,
    blocks,  # of rows in a sample
    residual_pitch,
    residual_shift,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,  # a power of two >= CHUNKS times parts in a group
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    GROUP: tl.constexpr = N // GROUPS
    PARTS: tl.constexpr = GROUP // PART
    sample = tl.program_id(0) // blocks

    # Pieces [PIECES, GROUPS] of this sample, merged
    i, g = tl.arange(0, PIECES), tl.arange(0, GROUPS)
    start = sample * per_sample
    tile = start // TILE_ROWS + i // PARTS
    count = tl.minimum(start + length, tile * TILE_ROWS + TILE_ROWS) - tl.maximum(start, tile * TILE_ROWS)
    count = tl.where(i // PARTS < CHUNKS, tl.maximum(count, 0) * PART, 0).to(tl.float32)[:, None]
    statistics += sample.to(tl.int64) * (CHUNKS * 2 * (N // PART))
    piece = (i // PARTS * 2 * (N // PART) + i % PARTS)[:, None] + g[None, :] * PARTS
    means = tl.load(statistics + piece, mask=count > 0, other=0.0)
    squares = tl.load(statistics + piece + N // PART, mask=count > 0, other=0.0)
    total = (length * GROUP).to(tl.float32)
    mean = tl.sum(means * count, axis=0) / total
    distance = means - mean[None, :]
    variance = tl.sum(squares + count * distance * distance, axis=0) / total
    factor = 1.0 / tl.sqrt(variance + 1e-5)

    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    member = (n // GROUP)[:, None] == g[None, :]
    mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)
    factor = tl.sum(tl.where(member, factor[None, :], 0.0), axis=1) * tl.load(scale + n, mask=n < N, other=0.0)

    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # from the gap before the sample to the one after it
    position = r - gap
    inside = ((position >= 0) & (position < length))[:, None] & (n < N)[None, :]
    raw_rows = (sample * length + position).to(tl.int64)
    y = tl.load(raw + raw_rows[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    y = mish((y - mean[None, :]) * factor[None, :] + tl.load(shift + n, mask=n < N, other=0.0)[None, :])
    if time is not None:
        y += tl.load(time + n, mask=n < N, other=0.0)[None, :]
    if residual is not None:
        residual_rows = (sample * residual_pitch + residual_shift + position).to(tl.int64)
        y += tl.load(residual + residual_rows[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    out_rows = (sample * (length + gap) + r).to(tl.int64)
    stored = (r < length + 2 * gap)[:, None] & (n < N)[None, :]
    tl.store(out + out_rows[:, None] * N + n[None, :], tl.where(inside, y, 0.0).to(out.dtype.element_ty), mask=stored)


def normalise(
    raw: Tensor,
    statistics: Statistics,
    scale: Tensor,
    shift: Tensor,
    out: Activation,
    time: Tensor | None = None,
    residual: Tensor | Activation | None = None,
) -> Launch:
    """The launch that fills `out` (gaps included) from raw [B L, C]; residual is an activation or again [B L, C]."""
    columns = raw.shape[1]
    block_columns = min(triton.next_power_of_2(columns), 256)
    block_rows = min(triton.next_power_of_2(out.length + 2 * out.gap), max(4096 // block_columns, 16), 128)
    blocks = triton.cdiv(out.length + 2 * out.gap, block_rows)
    parts_in_group = columns // GROUPS // statistics.part
    gapped = isinstance(residual, Activation)
    arguments = {
        "raw": raw,
        "statistics": statistics.values,
        "scale": scale,
        "shift": shift,
        "time": time,
        "residual": residual.rows if gapped else residual,
        "out": out.rows,
        "length": out.length,
        "gap": out.gap,
        "per_sample": statistics.per_sample,
        "blocks": blocks,
        "residual_pitch": residual.pitch if gapped else out.length,
        "residual_shift": residual.gap if gapped else 0,
        "N": columns,
        "GROUPS": GROUPS,
        "PART": statistics.part,
        "CHUNKS": statistics.values.shape[1],
        "PIECES": triton.next_power_of_2(statistics.values.shape[1] * parts_in_group),
        "TILE_ROWS": statistics.tile_rows,
        "ROWS": block_rows,
        "COLUMNS": block_columns,
    }
    grid = (out.batch * blocks, triton.cdiv(columns, block_columns))
    return Launch(normalisation_kernel, grid, arguments, warps=4)
