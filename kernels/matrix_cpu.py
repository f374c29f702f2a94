"""Products with constant matrices on the CPU, laid out once for the processor.

In float32 they are csrc/matrix_cpu.cpp's. With few rows the time of a product is that of reading the matrix, and there oneDNN comes
to half of what memory gives: 17 products of 8 rows with 1024 x 1024 matrices took 10.1 ms in it and 3.9 here, of 32 rows 14.2 and
7.9, of 256 rows 82 and 71 (two threads of a Zen 3 EPYC).

In bfloat16 they are oneDNN's, which multiplies blocks of a matrix that it first copies into the order in which its instructions
read them. On two cores of an EPYC, six products of 208 rows with 1024 x 1024 matrices ran at 795 GFLOP/s with that copy and at 816
without; when other processes filled caches and memory, at 141 and 388 on one core. PyTorch offers the copy as an operator of its
own, which its compiler uses for frozen weights; where it is missing, these are plain products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native


class ConstantMatrix:
    """Computes rows @ weight + bias: weight [K, N] and bias [N] as they are now, in `dtype` with float32 sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self._panels = _Panels(weight[None], bias) if dtype == torch.float32 else None
        if self._panels is None:
            self._bias = None if bias is None else bias.to(dtype, copy=True)
            self._weight = weight.to(dtype, copy=True).T.contiguous()
            self._ordered = can_order(dtype)
            if self._ordered:
                self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> [M, N], both of the matrix's dtype."""
        if self._panels is not None:
            return self._panels.multiply(rows[None])[0]
        if self._ordered:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return F.linear(rows, self._weight, self._bias)


class ConstantMatrices:
    """Computes rows[p] @ weight[p] for each p: weight [P, K, N] as it is now, in `dtype` with float32 sums."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.columns = weight.shape[2]
        self._panels = _Panels(weight, None) if dtype == torch.float32 else None
        self._each = [] if self._panels is not None else [ConstantMatrix(matrix, None, dtype) for matrix in weight]

    def multiply(self, rows: Tensor) -> Sequence[Tensor]:
        """rows [P, M, K] -> P of [M, N], all of the matrices' dtype."""
        if self._panels is not None:
            return self._panels.multiply(rows)
        return [matrix.multiply(each) for matrix, each in zip(self._each, rows, strict=True)]


class _Panels:
    """Float32 matrices [P, K, N] and their one bias [N] as csrc/matrix_cpu.h has them.

    Raises:
        DydiffError: the compiled part is missing (names how to build it).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        if native.extension is None:
            raise DydiffError(native.why_unavailable())
        lanes = native.extension.matrix.lanes()
        count, depth, self._columns = weight.shape
        self._weight = torch.zeros(count, -(-self._columns // lanes), depth, lanes)
        for panel, columns in zip(self._weight.unbind(1), weight.split(lanes, dim=2), strict=True):
            panel[..., : columns.shape[2]] = columns
        self._bias = None if bias is None else bias.to(torch.float32, copy=True)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [P, M, K] -> [P, M, N]."""
        rows = rows.contiguous()
        count, height, depth = rows.shape
        if rows.dtype != torch.float32 or (count, depth) != (self._weight.shape[0], self._weight.shape[2]):
            raise DydiffError(
                f"{self._weight.shape[0]} matrices of {self._weight.shape[2]} rows in float32 multiply as many columns, not "
                f"{list(rows.shape)} in {rows.dtype}."
            )
        product = rows.new_empty(count, height, self._columns)
        bias = 0 if self._bias is None else self._bias.data_ptr()
        addresses = rows.data_ptr(), self._weight.data_ptr(), bias, product.data_ptr()
        native.extension.matrix.multiply(*addresses, count, height, depth, self._columns, torch.get_num_threads())
        return product


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
