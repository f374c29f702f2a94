"""Products with a constant matrix on the CPU, laid out once for the processor.

oneDNN multiplies blocks of a matrix that it first copies into the order in which its instructions read them. On two cores of an
EPYC, six products of 208 rows with 1024 x 1024 matrices ran at 795 GFLOP/s with that copy and at 816 without; when other
processes filled caches and memory, at 141 and 388 on one core. PyTorch offers the copy as an operator of its own, which its
compiler uses for frozen weights; where it is missing, these are plain products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1024 * 1024  # elements, from which on the layout pays in float32


class ConstantMatrix:
    """Computes rows @ weight + bias: weight [K, N] and bias [N] as they are now, in `dtype` with float32 sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self._bias = None if bias is None else bias.to(dtype)
        self._weight = weight.to(dtype).T.contiguous()
        self._ordered = can_order(dtype)
        if self._ordered:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> [M, N], both of the matrix's dtype."""
        if self._ordered:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return F.linear(rows, self._weight, self._bias)


class ConstantMatrices:
    """Computes rows[p] @ weight[p] for each p: weight [P, K, N] as it is now, in `dtype` with float32 sums.

    A call of oneDNN's costs some 40 us beside its work, most of the time of 64 x 64 (one core of a Zen 3 EPYC, float32): a stack of
    small matrices is one call. In bfloat16 PyTorch computes some stacks with loops of its own.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.columns = weight.shape[2]
        self._stack = self._each = None
        if dtype == torch.float32 and weight[0].numel() < LARGE:
            self._stack = weight.to(dtype).contiguous()
        else:
            self._each = [ConstantMatrix(matrix, None, dtype) for matrix in weight]

    def multiply(self, rows: Tensor) -> Sequence[Tensor]:
        """rows [P, M, K] -> P of [M, N], all of the matrices' dtype."""
        if self._stack is not None:
            return torch.bmm(rows, self._stack)
        return [matrix.multiply(each) for matrix, each in zip(self._each, rows, strict=True)]


@cache
def can_order(dtype: torch.dtype) -> bool:
    """Whether PyTorch can lay out a matrix for oneDNN here; tried on a small one, since the operators are not public."""
    rows, weight = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    try:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise(rows, ordered, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((product == 3).all())
