"""The U-Net's blocks on NVIDIA cards with cuDNN's convolutions, and one Triton kernel for all that follows each (finish.py).

This is the plainest of the backends in 16 bit, for convolutions of any length: what PyTorch's strongest arrangement computes, with
the passes between its convolutions fused. A concatenation is copied, once a block. Unmeasured on a card so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.kernels.channels_last import ChannelsLastBlocks, Packed
from dydiff.kernels.finish import finish
from dydiff.kernels.launch import Launch
from dydiff.kernels.matrix_gpu import GpuMatrix


class CudnnBlocks(ChannelsLastBlocks):
    """Blocks backend with cuDNN's convolutions in float16 or bfloat16; execute: what happens to a launch."""

    channel_multiple = 8  # of 16 bit each: what cuDNN's kernels for channels-last tensors load at once

    def __init__(self, dtype: torch.dtype = torch.float16, execute: Callable[[Launch], None] = Launch.run):
        self.dtype = dtype
        self.execute = execute

    def make_matrix(self, weight: Tensor, bias: Tensor) -> GpuMatrix:
        return GpuMatrix(weight, bias, self.dtype)

    def make_filters(self, weight: Tensor) -> Tensor:
        return weight[:, :, None].to(self.dtype, memory_format=torch.channels_last)

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: Packed, time_bias: Tensor) -> Tensor:
        return super().residual_block(x if skip is None else torch.cat([x, skip], dim=2), None, packed, time_bias)

    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # [C_out, C_in, 1, K]
        image = x.transpose(1, 2)[:, :, None]  # [B, C_in, 1, L], channels last
        with _repeatable():
            y = F.conv2d(image, filters, padding=(0, filters.shape[3] // 2))
        y = y[:, :, 0].transpose(1, 2).contiguous()  # contiguous already, as cuDNN leaves it
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        self.execute(finish(y, *norm, time_bias, residual, out=y))
        return y


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN choose among algorithms that repeat themselves to the last bit, and by rule: a race may end otherwise next time."""
    settings = torch.backends.cudnn
    before = settings.deterministic, settings.benchmark
    settings.deterministic, settings.benchmark = True, False
    try:
        yield
    finally:
        settings.deterministic, settings.benchmark = before
