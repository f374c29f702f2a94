"""The U-Net's blocks on the CPU in bfloat16: Winograd convolutions (winograd.py) with everything around the products fused.

Every matrix product runs in oneDNN (AVX-512 bf16 or AMX where the processor has them) and against matrices that are laid out once
for it (matrix_cpu.py). The transforms, the normalisation and the activation are csrc/unet_cpu.cpp: one pass before and one after
the products, where PyTorch's chain of operators makes a dozen over tensors of twice the size. Sums and norms are float32.

Error: where rows are independent, 2.04 times the rounding of a direct convolution in bfloat16; the smoother the rows, the less.
Rollouts stay within 2e-2 of float32 (tests/conformance.py --backend bf16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.kernels.matrix_cpu import ConstantMatrix
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.winograd import TILE, Packed, WinogradBlocks


class CpuBlocks(WinogradBlocks):
    """Blocks backend for CPU tensors; see `unet_reference.ReferenceBlocks` for the methods.

    Raises:
        DydiffError: the compiled part is missing (names how to build it); from `pack`, a kernel size other than 5.
    """

    dtype = torch.bfloat16

    def __init__(self) -> None:
        if reason := why_unavailable("cpu"):
            raise DydiffError(reason)
        self._native = native.extension.unet
        # Megabytes that are asked for anew come as untouched pages, and touching them costs more than the transforms do.
        self._scratch: dict[str, Tensor] = {}

    def make_matrix(self, weight: Tensor, bias: Tensor | None) -> ConstantMatrix:
        return ConstantMatrix(weight, bias)

    def make_points(self, filters: Tensor) -> list[ConstantMatrix]:
        return [ConstantMatrix(point) for point in filters]

    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # a [C_in, C_out] for each point
        batch, length, channels = x.shape
        skip_channels = 0 if skip is None else skip.shape[2]
        tiles = -(-length // TILE)
        threads = torch.get_num_threads()
        v = self._reuse("v", len(filters), batch * tiles, channels + skip_channels)
        sizes = batch, length, channels, skip_channels
        self._native.winograd_input(x.data_ptr(), _address(skip), v.data_ptr(), *sizes, threads)
        m = [matrix.multiply(rows) for matrix, rows in zip(filters, v, strict=True)]
        y = x.new_empty(batch, length, filters[0].shape[1])
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        points, *rest = [product.data_ptr() for product in m], *map(_address, (*norm, time_bias, residual, y))
        self._native.winograd_output(points, *rest, batch, length, y.shape[2], threads)
        return y

    def _reuse(self, name: str, *shape: int) -> Tensor:
        """An uninitialised bfloat16 tensor in the memory of the last one of this name; valid until the next call."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=torch.bfloat16)
        return self._scratch[name][:size].view(shape)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
