"""The U-Net for sampling: the same network as `UNet`, forward only, through a blocks backend of `dydiff.kernels`.

All samples of a batch share one noise level, so the noise MLP and every block's time bias are a table over the schedule,
computed once; the blocks themselves are fused by the backend (see kernels/unet_reference.py for what a backend is).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.networks.unet import ResidualBlock, UNet


class Blocks(Protocol):
    """What a backend offers; an activation is whatever its `enter` returns. kernels/unet_reference.py documents each method."""

    def pack(self, weights: dict[str, Tensor]) -> Any: ...
    def enter(self, x: Tensor) -> Any: ...
    def residual_block(self, x: Any, skip: Any | None, packed: Any, time_bias: Tensor) -> Any: ...
    def downsample(self, x: Any, packed: Any) -> Any: ...
    def upsample(self, x: Any, packed: Any) -> Any: ...
    def leave(self, x: Any, final_block: Any, final_conv: Any) -> Tensor: ...


class FusedUNet:
    """Forward pass of a trained `UNet` with packed weights: x [B, H, D] float32 and a row of the time table -> [B, H, D] float32.

    The weights are copied when this is made; training the U-Net further does not change it.
    """

    def __init__(self, unet: UNet, blocks: Blocks):
        self.unet = unet
        self.blocks = blocks

        def pack(module: nn.Module) -> Any:
            return blocks.pack(module.state_dict())

        self.down, self.up = ([[pack(block) for block in pair] for pair in pairs] for pairs in (unet.down, unet.up))
        self.downsample = [pack(layer) for layer in unet.downsample]
        self.middle = [pack(block) for block in unet.middle]
        self.upsample = [pack(layer) for layer in unet.upsample]
        self.final = pack(unet.final_block), pack(unet.final_conv)

    @torch.no_grad()
    def time_table(self, noise_labels: Tensor) -> list[list[Tensor]]:
        """The time bias of every residual block, in the order in which they run, for each noise label [S]: S lists of [C_out]."""
        embedding = F.mish(self.unet.embed(noise_labels))
        columns = [block.time(embedding) for block in self._residual_blocks()]
        return [[column[row].contiguous() for column in columns] for row in range(len(noise_labels))]

    def _residual_blocks(self) -> list[ResidualBlock]:
        groups = [*self.unet.down, self.unet.middle, *self.unet.up]
        return [block for group in groups for block in group]

    @torch.no_grad()
    def __call__(self, x: Tensor, time_biases: list[Tensor]) -> Tensor:
        blocks, biases = self.blocks, iter(time_biases)
        x = blocks.enter(x)
        skips = []
        for level, pair in enumerate(self.down):
            for packed in pair:
                x = blocks.residual_block(x, None, packed, next(biases))
            skips.append(x)
            if level < len(self.downsample):
                x = blocks.downsample(x, self.downsample[level])
        for packed in self.middle:
            x = blocks.residual_block(x, None, packed, next(biases))
        for (first, second), upsample in zip(self.up, self.upsample, strict=True):
            x = blocks.residual_block(x, skips.pop(), first, next(biases))
            x = blocks.residual_block(x, None, second, next(biases))
            x = blocks.upsample(x, upsample)
        return blocks.leave(x, *self.final)
