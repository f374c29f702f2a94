"""What the convolution kernels have in common, as Triton functions that are inlined into them.

`multiply` is the loop over K: `acc + operand @ matrix`, where row r of the operand is K consecutive rows of the activation x,
contiguous in memory. Two ways to load it:

* with descriptors (TMA, sm_90 on): the rows of a tile follow one another in x, so tap k of the tile is the box at row + k. The
  loads cost no registers and no address arithmetic. The depth of a step must divide the channels.
* with pointers (cp.async): every row of the tile has its own first row in x, so gaps or every second row can be left out.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(
    acc,
    x,
    row,  # first row in x of the tile's first row
    rows,  # [ROWS] first row in x of each row of the tile
    weight,
    weight_row,
    n0,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    N: tl.constexpr,  # columns of the matrix
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    X_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
):
    """acc [ROWS, COLUMNS] + (TAPS rows of x, C channels each) @ (rows of the matrix from weight_row, columns from n0)."""
    k = tl.arange(0, DEPTH)
    n = n0 + tl.arange(0, COLUMNS)
    if not X_TMA:
        x_tile = x + rows.to(tl.int64)[:, None] * C + k[None, :]
    if not WEIGHT_TMA:
        weight_tile = weight + (weight_row + k)[:, None] * N + n[None, :]
    for step in range(tl.cdiv(TAPS * C, DEPTH)):
        k0 = step * DEPTH
        if X_TMA:
            a = x.load([row + k0 // C, k0 % C])
        elif TAPS * C % DEPTH == 0:
            a = tl.load(x_tile + k0)
        else:  # beyond the last tap the matrix is zero, but what lies there in x may not even be a number
            a = tl.load(x_tile + k0, mask=(k0 + k)[None, :] < TAPS * C, other=0.0)
        if WEIGHT_TMA:
            b = weight.load([weight_row + k0, n0])
        elif N % COLUMNS == 0:
            b = tl.load(weight_tile + k0 * N)
        else:
            b = tl.load(weight_tile + k0 * N, mask=n[None, :] < N, other=0.0)
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def sum_over_sample(values, sample, first, last):
    """values [ROWS, PARTS] -> for each row the sum over the tile's rows of its sample; 0 for rows outside first .. last."""
    total = tl.zeros_like(values)
    for s in range(first, last + 1):
        own = (sample == s)[:, None]
        total = tl.where(own, tl.sum(tl.where(own, values, 0.0), axis=0)[None, :], total)
    return total


@triton.jit
def mish(y):
    """y tanh(ln(1 + e^y)) = y (e^2 + 2 e) / (e^2 + 2 e + 2) with e = exp(y), which is y itself from 19 on.

    In ten instructions instead of eighteen: a power of two and a root have no special cases to be kept out, unlike exp and /.
    """
    e = tl.exp2(tl.minimum(y * 1.4426950408889634, 28.0))
    numerator = e * (e + 2.0)
    root = tl.rsqrt(numerator + 2.0)
    return y * (numerator * (root * root))


@triton.jit
def zero_gaps(out, first, last, pitch, gap, n, N: tl.constexpr, GAP: tl.constexpr):
    """Zero the columns n of the gap before each sample first .. last and of the one after the last."""
    g = tl.arange(0, GAP)
    for s in range(first, last + 2):
        rows = (s * pitch + g).to(tl.int64)
        zeros = tl.zeros([GAP, n.shape[0]], out.dtype.element_ty)
        tl.store(out + rows[:, None] * N + n[None, :], zeros, mask=(g < gap)[:, None] & (n < N)[None, :])
