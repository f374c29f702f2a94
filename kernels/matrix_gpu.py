"""Products with a constant matrix on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class GpuMatrix:
    """A constant matrix [K, N] of 16 bit with a bias [N], multiplied by cuBLAS."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        self.weight = weight.to(dtype).contiguous()
        self.bias = bias.to(dtype)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> [M, N]."""
        return torch.addmm(self.bias, rows, self.weight)
