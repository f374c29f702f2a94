"""The U-Net's blocks on the CPU: Winograd convolutions (winograd.py) with everything around the products fused.

In bfloat16 for processors that multiply it (AVX-512 bf16 or AMX), in float32 for all others. Matrix products (matrix_cpu.py) are
against matrices that are laid out once for them. The transforms, the normalisation and the activation are csrc/unet_cpu.cpp: one
pass before and one after the products, where PyTorch's chain of operators makes a dozen. Sums and norms are float32.

Error of a convolution of independent rows: bfloat16 2.04 times the rounding of a direct one, float32 264 times, some 1e-5. Rollouts
in bfloat16 stay within 2e-2 of float32 (tests/conformance.py --backend bf16), those in float32 within float32's limits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.kernels.channels_last import ChannelsLastBlocks, Packed
from dydiff.kernels.matrix_cpu import ConstantMatrices, ConstantMatrix
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.winograd import F5, F13


class CpuBlocks(ChannelsLastBlocks):
    """Blocks backend for CPU tensors in bfloat16 or float32; see `unet_reference.ReferenceBlocks` for the methods.

    Raises:
        DydiffError: the compiled part is missing (names how to build it); from `pack`, a kernel size other than 5.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if reason := why_unavailable("cpu"):
            raise DydiffError(reason)
        self.dtype = dtype
        in_16_bit = dtype == torch.bfloat16
        self.transform = F5 if in_16_bit else F13
        self._native = native.extension.unet.bfloat16 if in_16_bit else native.extension.unet.float32
        # Megabytes that are asked for anew come as untouched pages, and touching them costs more than the transforms do.
        self._scratch = torch.empty(0, dtype=dtype)

    def make_matrix(self, weight: Tensor, bias: Tensor) -> ConstantMatrix:
        return ConstantMatrix(weight, bias, self.dtype)

    def make_filters(self, weight: Tensor) -> ConstantMatrices:
        return ConstantMatrices(self.transform.filters(weight), self.dtype)

    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # [C_in, C_out] for each point
        batch, length, channels = x.shape
        skip_channels = 0 if skip is None else skip.shape[2]
        tiles = -(-length // self.transform.tile)
        threads = torch.get_num_threads()
        v = self._reuse(self.transform.points, batch * tiles, channels + skip_channels)
        sizes = batch, length, channels, skip_channels
        self._native.winograd_input(x.data_ptr(), _address(skip), v.data_ptr(), *sizes, threads)
        m = filters.multiply(v)
        y = x.new_empty(batch, length, filters.columns)
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        points, *rest = [product.data_ptr() for product in m], *map(_address, (*norm, time_bias, residual, y))
        self._native.winograd_output(points, *rest, batch, length, y.shape[2], threads)
        return y

    def _reuse(self, *shape: int) -> Tensor:
        """An uninitialised tensor in the memory of the last one; valid until the next call."""
        size = math.prod(shape)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self.dtype)
        return self._scratch[:size].view(shape)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
