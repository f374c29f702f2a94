"""The U-Net's blocks on NVIDIA cards as Winograd convolutions ("triton-c"): cuBLAS multiplies, Triton does what is around it.

One kernel makes of a convolution's product the activation and, if another convolution reads it, the points for that one
(winograd_triton.py). Who reads it is known when it is read, so what a block computes is finished only then. Down- and upsampling,
the residuals' 1x1 convolutions and the last one are triton-b's: an evaluation of the default network is 70 launches.

Work: the products are 2.5 times less than a direct convolution's. At 2048 x 25 positions and 1024 channels these are 0.21 TFLOP
where there were 0.54, and 0.5 to 0.6 GB around them. With few samples the ten products keep a card busy that one would not: each
has a fifth of a direct convolution's K and a matrix of its own.

Error: where rows are independent, 2.04 times the rounding of a direct convolution in the same 16 bit. Points and products are some
ten times larger than activations, which leaves float16 (up to 65504) less room. Unmeasured on a card so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.kernels import packing
from dydiff.kernels.convolution import Form
from dydiff.kernels.launch import Launch
from dydiff.kernels.layout import Activation, round_up
from dydiff.kernels.packing import ConvBlock, Convolution, ResidualBlock
from dydiff.kernels.unet_triton import TwoPassBlocks
from dydiff.kernels.winograd import F5, TAPS
from dydiff.kernels.winograd_triton import transform_input, transform_output


@dataclass
class WinogradFilters:
    """The weights of a block's convolution."""

    values: Tensor  # [10, C_in, C_out], C_in rounded up to a multiple of 8
    bias: Tensor  # [C_out] float32


def pack_filters(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> WinogradFilters:
    """weight [C_out, C_in, 5], of any dtype; NotForNetwork if it has another number of taps."""
    channels = weight.shape[1]
    values = F5.filters(F.pad(weight, (0, 0, 0, round_up(channels, 8) - channels))).to(dtype).contiguous()
    return WinogradFilters(values, bias.to(torch.float32, copy=True))


@dataclass
class Output:
    """What a layer puts out: an activation, and its points [10, B T, C] if a convolution reads it.

    A block's is `pending`, the launch that computes it not yet made, until `WinogradBlocks` knows whether points are wanted.
    """

    rows: Activation | None = None
    points: Tensor | None = None
    pending: Callable[[bool], tuple[Launch, Activation, Tensor | None]] | None = None  # points? -> the launch, and what it fills


class WinogradBlocks:
    """Blocks backend of Winograd convolutions; see `unet_reference.ReferenceBlocks` for the methods.

    dtype, capability and execute as in `TwoPassBlocks`, which does everything but the blocks' convolutions.

    Raises:
        DydiffError: another dtype than float16 or bfloat16; from `pack`, a kernel size other than 5.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float16,
        capability: int | None = None,
        execute: Callable[[Launch], None] = Launch.run,
    ):
        self.dtype = dtype
        self.execute = execute
        self.others = TwoPassBlocks(dtype, TAPS, capability, execute)

    def pack(self, weights: dict[str, Tensor]) -> ResidualBlock | ConvBlock | Convolution:
        return packing.pack(weights, self.dtype, pack_filters)

    def enter(self, x: Tensor) -> Output:
        return Output(self.others.enter(x))

    def residual_block(self, x: Output, skip: Output | None, packed: ResidualBlock, time_bias: Tensor) -> Output:
        sources = (x,) if skip is None else (x, skip)
        hidden = self.conv_block(sources, packed.block1, time=time_bias.float())
        residual = packed.residual_of(tuple(self.rows(source) for source in sources))
        added = residual.sources[0]
        if residual.convolution is not None:
            added = self.others.convolve(residual.sources, residual.convolution, Form(gapped=True))
        return self.conv_block((hidden,), packed.block2, residual=added)

    def downsample(self, x: Output, packed: Convolution) -> Output:
        return Output(self.others.downsample(self.rows(x), packed))

    def upsample(self, x: Output, packed: Convolution) -> Output:
        return Output(self.others.upsample(self.rows(x), packed))

    def leave(self, x: Output, final_block: ConvBlock, final_conv: Convolution) -> Tensor:
        return self.others.project(self.rows(self.conv_block((x,), final_block)), final_conv)

    def conv_block(
        self, sources: tuple[Output, ...], block: ConvBlock, time: Tensor | None = None, residual: Activation | None = None
    ) -> Output:
        """mish(group_norm(conv(sources))) + time + residual, either of which may be absent; pending."""
        points = [self.points(source) for source in sources]
        filters = block.convolution.values.split([each.shape[2] for each in points], dim=1)
        products = [torch.bmm(each, part) for each, part in zip(points, filters, strict=True)]
        return Output(pending=partial(transform_output, products, block, sources[0].rows, time, residual))

    def rows(self, x: Output) -> Activation:
        """The rows of an activation whose points are not wanted, or not yet."""
        if x.pending is not None:
            self._finish(x, points=False)
        return x.rows

    def points(self, x: Output) -> Tensor:
        """The points of an activation."""
        if x.pending is not None:
            self._finish(x, points=True)
        elif x.points is None:
            launch, x.points = transform_input(x.rows)
            self.execute(launch)
        return x.points

    def _finish(self, x: Output, points: bool) -> None:
        launch, x.rows, x.points = x.pending(points)
        x.pending = None
        self.execute(launch)
