"""Products with a constant bfloat16 matrix on the CPU, laid out once for the processor.

oneDNN multiplies blocks of a matrix that it first copies into the order in which its instructions read them. On two cores of an
EPYC, six products of 208 rows with 1024 x 1024 matrices ran at 795 GFLOP/s with that copy and at 816 without; when other
processes filled caches and memory, at 141 and 388 on one core. PyTorch offers the copy as an operator of its own, which its
compiler uses for frozen weights; where it is missing, these are plain products.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


class ConstantMatrix:
    """Computes rows @ weight + bias: weight [K, N] and bias [N] as they are now, in bfloat16 with float32 sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.shape = tuple(weight.shape)
        self._bias = None if bias is None else bias.bfloat16()
        self._weight = weight.bfloat16().T.contiguous()
        self._ordered = can_order()
        if self._ordered:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] bfloat16 -> [M, N] bfloat16."""
        if self._ordered:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return F.linear(rows, self._weight, self._bias)


@cache
def can_order() -> bool:
    """Whether PyTorch can lay out a matrix for oneDNN here; tried on a small one, since the operators are not public."""
    rows, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    try:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise(rows, ordered, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((product == 3).all())
