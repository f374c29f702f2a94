"""What the U-Net's blocks share on every device where activations are [B, L, C], channels last: all but the block's convolution.

Then every other layer is a matrix product over contiguous rows: the 1x1 convolutions over B L of them, down- and upsampling over
rows of three and two positions that overlap. Which convolution a block has is the business of the backend: unet_cpu.py or
unet_cudnn.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.kernels.unet_reference import Weights

Packed = dict[str, Any]


class Matrix(Protocol):
    """A constant matrix [K, N] with a bias [N]."""

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> rows @ matrix + bias [M, N]."""
        ...


class ChannelsLastBlocks(ABC):
    """Blocks backend for activations [B, L, C]; see `unet_reference.ReferenceBlocks` for the methods."""

    dtype: torch.dtype
    channel_multiple = 1  # to which the data's columns are padded with zeros; a block's width is one of GroupNorm's groups

    @abstractmethod
    def make_matrix(self, weight: Tensor, bias: Tensor) -> Matrix:
        """Prepare weight [K, N] and bias [N], float32, for products."""

    @abstractmethod
    def make_filters(self, weight: Tensor) -> Any:
        """Prepare the filters of a block's convolution, [C_out, C_in, K] float32."""

    @abstractmethod
    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """mish(group_norm(conv(x ++ skip))) + time_bias [C_out] + residual [B, L, C_out]; all but x may be absent."""

    def pack(self, weights: Weights) -> Packed:
        """Filters of the blocks by `make_filters`, other convolutions to matrices with their bias; the rest as float32."""
        weights = {name: value.detach().to(torch.float32, copy=True).contiguous() for name, value in weights.items()}
        packed: Packed = {name: value for name, value in weights.items() if value.ndim == 1}
        for name, value in weights.items():
            bias = weights.get(name.removesuffix("weight") + "bias")
            if value.ndim == 3 and value.shape[2] != 4:
                value = F.pad(value, (0, 0, 0, -value.shape[1] % self.channel_multiple))
            if name.endswith("conv.weight"):
                packed[name] = self.make_filters(value)
            elif value.ndim == 3 and value.shape[2] == 4:
                packed[name] = [self.make_matrix(taps, bias) for taps in _pair_taps(value)]
            elif name == "weight" and value.shape[2] == 1:  # the network's last, narrow product is float32 everywhere
                packed[name] = value[:, :, 0].T
            elif value.ndim == 3:
                packed[name] = self.make_matrix(value.permute(2, 1, 0).flatten(0, 1), bias)
        return packed

    def enter(self, x: Tensor) -> Tensor:
        return F.pad(x.to(self.dtype).contiguous(), (0, -x.shape[2] % self.channel_multiple))

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: Packed, time_bias: Tensor) -> Tensor:
        hidden = self.conv_block(x, skip, packed, "block1.", time_bias, None)
        return self.conv_block(hidden, None, packed, "block2.", None, _residual(x, skip, packed))

    def downsample(self, x: Tensor, packed: Packed) -> Tensor:
        batch, length, channels = x.shape
        half = (length + 1) // 2
        rows = F.pad(x, (0, 0, 1, 1)).as_strided(  # row i: x[2i - 1], x[2i], x[2i + 1]
            (batch, half, 3 * channels), ((length + 2) * channels, 2 * channels, 1)
        )
        return _multiply(rows, packed["weight"])

    def upsample(self, x: Tensor, packed: Packed) -> Tensor:
        # Each output row takes two taps: y[2i] = x[i-1] w3 + x[i] w1 and y[2i+1] = x[i] w2 + x[i+1] w0.
        batch, length, channels = x.shape
        pairs = F.pad(x, (0, 0, 1, 1)).as_strided(  # row i: x[i - 1], x[i]
            (batch, length + 1, 2 * channels), ((length + 2) * channels, channels, 1)
        )
        even_taps, odd_taps = packed["weight"]
        even, odd = _multiply(pairs[:, :-1], even_taps), _multiply(pairs[:, 1:], odd_taps)
        return torch.stack([even, odd], dim=2).flatten(1, 2)

    def leave(self, x: Tensor, final_block: Packed, final_conv: Packed) -> Tensor:
        hidden = self.conv_block(x, None, final_block, "", None, None)
        return hidden.float() @ final_conv["weight"] + final_conv["bias"]


def _pair_taps(weight: Tensor) -> Tensor:
    """[C_in, C_out, 4] of a transposed convolution -> [2, 2 C_in, C_out]: the taps of even and of odd output rows."""
    taps = weight.permute(2, 0, 1)
    return torch.stack([torch.cat([taps[3], taps[1]]), torch.cat([taps[2], taps[0]])])


def _residual(x: Tensor, skip: Tensor | None, packed: Packed) -> Tensor:
    """The block's input, through its 1x1 convolution where the width changes."""
    whole = x if skip is None else torch.cat([x, skip], dim=2)
    return _multiply(whole, packed["residual.weight"]) if "residual.weight" in packed else whole


def _multiply(rows: Tensor, matrix: Matrix) -> Tensor:
    """rows [B, L, K] -> [B, L, N]."""
    product = matrix.multiply(rows.reshape(-1, rows.shape[2]))
    return product.view(*rows.shape[:2], product.shape[1])
