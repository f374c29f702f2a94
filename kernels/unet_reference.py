"""The U-Net's blocks in plain PyTorch: what every fused backend computes, the path without one, and the oracle of its tests.

A *blocks backend* is a class with the methods below. It packs the weights of one block once, and then maps *activations*, whose
layout is its own, through the network; only `enter` and `leave` see `[B, H, D]` tensors. Weights arrive under the names of
`dydiff.networks.unet` (`block1.conv.weight` is [C_out, C_in, K], GroupNorm has 8 groups over channels-in-group x horizon). All
samples of a batch share one noise level, so a block's noise embedding is one bias per channel, `time_bias [C_out]`, computed
once per checkpoint and schedule. Here activations are plain `[B, C, L]` tensors of the weights' dtype. The
other backends are unet_cudnn.py, unet_triton.py and unet_winograd.py (NVIDIA cards, 16 bit) and unet_cpu.py (CPU).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 8

Weights = Mapping[str, Tensor]


class ReferenceBlocks:
    """Blocks in PyTorch's own operators, of any dtype: float64 makes it an oracle."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def pack(self, weights: Weights) -> dict[str, Tensor]:
        """Prepare the weights of one block or layer (any of those below)."""
        return {name: value.detach().to(self.dtype) for name, value in weights.items()}

    def enter(self, x: Tensor) -> Tensor:
        """[B, H, D] float32 -> activation."""
        return x.to(self.dtype).transpose(1, 2)

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: dict[str, Tensor], time_bias: Tensor) -> Tensor:
        """block2(block1(x) + time_bias) + residual(x); with `skip`, x is the concatenation of x and skip along channels."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        hidden = self._conv_block(x, packed, "block1.") + time_bias.to(self.dtype)[:, None]
        residual = F.conv1d(x, packed["residual.weight"], packed["residual.bias"]) if "residual.weight" in packed else x
        return self._conv_block(hidden, packed, "block2.") + residual

    def downsample(self, x: Tensor, packed: dict[str, Tensor]) -> Tensor:
        """Conv1d(k=3, stride 2, pad 1): half the length, rounded up."""
        return F.conv1d(x, packed["weight"], packed["bias"], stride=2, padding=1)

    def upsample(self, x: Tensor, packed: dict[str, Tensor]) -> Tensor:
        """ConvTranspose1d(k=4, stride 2, pad 1): twice the length. Its weight is [C_in, C_out, 4]."""
        return F.conv_transpose1d(x, packed["weight"], packed["bias"], stride=2, padding=1)

    def leave(self, x: Tensor, final_block: dict[str, Tensor], final_conv: dict[str, Tensor]) -> Tensor:
        """Convolution block, then 1x1 convolution -> [B, H, D] float32, contiguous."""
        hidden = self._conv_block(x, final_block, "")
        y = F.conv1d(hidden, final_conv["weight"], final_conv["bias"])
        return y.transpose(1, 2).to(torch.float32 if self.dtype != torch.float64 else torch.float64).contiguous()

    @staticmethod
    def _conv_block(x: Tensor, packed: dict[str, Tensor], prefix: str) -> Tensor:
        weight = packed[prefix + "conv.weight"]  # [C_out, C_in, K], K odd
        y = F.conv1d(x, weight, packed[prefix + "conv.bias"], padding=weight.shape[-1] // 2)
        return F.mish(F.group_norm(y, GROUPS, packed[prefix + "norm.weight"], packed[prefix + "norm.bias"]))


def finish_block(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, time: Tensor | None, residual: Tensor | None) -> Tensor:
    """mish(group_norm(x + bias)) + time + residual -> [B, L, C]: what follows a convolution in a block, channels last.

    x and residual [B, L, C] of one dtype, in which it is computed; bias, scale, shift [C] and time [B or 1, C]. time and residual
    may be absent.
    """
    columns = (x + bias.to(x.dtype)).transpose(1, 2)
    y = F.mish(F.group_norm(columns, GROUPS, scale.to(x.dtype), shift.to(x.dtype))).transpose(1, 2)
    if time is not None:
        y = y + time.to(x.dtype)[:, None]
    return y if residual is None else y + residual
