"""The U-Net for training: the same network as `UNet`, with its convolutions as matrix products, in one of three precisions.

A convolution of x [B, L, C_in] is the product of a [B L, K C_in] matrix of neighbouring rows and a [K C_in, C_out] of filters;
both gradients are products of the same sizes. On a CPU they reach the processor's rate at batch 8 already. Filters keep their
names and shapes but lie in memory as [C_out, K, C_in], so that no product needs a reordered copy of them.

    float32     that
    bf16        products take bfloat16 copies of the filters and give bfloat16 gradients with respect to these; the weights that
                learn stay float32
    winograd    float32, but convolutions of five taps with a quarter of the multiplications, rounded to some 3e-5
                (kernels/convolution_cpu.py; compiled, for CPUs)

Everything of one dimension, the noise embedding and the last, narrow product are float32 throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.kernels.convolution_cpu import convolve
from dydiff.kernels.training_cpu import norm_mish
from dydiff.networks.unet import ConvBlock, ResidualBlock, UNet


class TrainingUNet:
    """A differentiable forward pass of a `UNet`: x [B, H, D], noise_label [B] -> [B, H, D] float32.

    `precision` is that of the products: one of the three above. `copies` maps filters to their copies in bfloat16, which collect
    the gradients in the filters' place (those of several backward passes add up in bfloat16); whoever changes the weights brings
    them up to date. In float32 there are none. The filters are laid out anew in place.
    """

    def __init__(self, unet: UNet, precision: str):
        self.unet = unet
        self.winograd = precision == "winograd"
        self.dtype = dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.copies: dict[nn.Parameter, Tensor] = {}
        for parameter in unet.parameters():
            if parameter.ndim == 3 and parameter is not unet.final_conv.weight:
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
                if dtype != torch.float32:
                    self.copies[parameter] = parameter.detach().to(dtype).requires_grad_()

    def __call__(self, x: Tensor, noise_label: Tensor) -> Tensor:
        unet = self.unet
        embedding = F.mish(unet.embed(noise_label))
        x = x.to(self.dtype)
        skips = []
        for level, (first, second) in enumerate(unet.down):
            x = self._residual_block(second, self._residual_block(first, x, embedding), embedding)
            skips.append(x)
            if level < len(unet.downsample):
                x = self._convolve(unet.downsample[level], x)
        for block in unet.middle:
            x = self._residual_block(block, x, embedding)
        for (first, second), upsample in zip(unet.up, unet.upsample, strict=True):
            x = torch.cat([x, skips.pop()], dim=2)
            x = self._residual_block(second, self._residual_block(first, x, embedding), embedding)
            x = _TransposedConvolution.apply(x, self._filters(upsample), upsample.bias, 2, 1)
        x = self._conv_block(unet.final_block, x)
        return F.linear(x.float(), unet.final_conv.weight[:, :, 0], unet.final_conv.bias)

    def _residual_block(self, block: ResidualBlock, x: Tensor, embedding: Tensor) -> Tensor:
        time_bias = block.time(embedding).to(self.dtype)  # [B or 1, C_out]
        hidden = self._conv_block(block.block1, x) + time_bias[:, None]
        residual = x if isinstance(block.residual, nn.Identity) else self._convolve(block.residual, x)
        return self._conv_block(block.block2, hidden) + residual

    def _conv_block(self, block: ConvBlock, x: Tensor) -> Tensor:
        conv = block.conv
        hidden = convolve(x, conv.weight, conv.bias) if self.winograd else self._convolve(conv, x)
        return norm_mish(hidden, block.norm.weight, block.norm.bias)

    def _filters(self, layer: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
        return self.copies.get(layer.weight, layer.weight)

    def _convolve(self, layer: nn.Conv1d, x: Tensor) -> Tensor:
        return _Convolution.apply(x, self._filters(layer), layer.bias, layer.stride[0], layer.padding[0])


class _Convolution(torch.autograd.Function):
    """Conv1d on [B, L, C_in] with filters [C_out, C_in, K]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = weight.shape[2], stride, padding
        y = torch.addmm(bias.to(x.dtype), unfold(x, *ctx.geometry), _as_matrix(weight).T)
        return y.view(len(x), -1, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, 1)  # [B L_out, C_out]
        dweight = rows.T @ unfold(x, *ctx.geometry)  # [C_out, K C_in]
        dx = fold(rows @ _as_matrix(weight), x.shape, *ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, _as_filters(dweight, weight), rows.sum(0, dtype=torch.float32), None, None


class _TransposedConvolution(torch.autograd.Function):
    """ConvTranspose1d on [B, L, C_in] with filters [C_in, C_out, K]: a convolution's two directions exchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = weight.shape[2], stride, padding
        batch, length, _ = x.shape
        shape = batch, (length - 1) * stride - 2 * padding + weight.shape[2], weight.shape[1]
        return fold(x.flatten(0, 1) @ _as_matrix(weight), shape, *ctx.geometry) + bias.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        columns = unfold(dy, *ctx.geometry)  # [B L, K C_out]
        dweight = x.flatten(0, 1).T @ columns  # [C_in, K C_out]
        dx = (columns @ _as_matrix(weight).T).view_as(x)
        return dx, _as_filters(dweight, weight), dy.sum((0, 1), dtype=torch.float32), None, None


def unfold(x: Tensor, taps: int, stride: int, padding: int) -> Tensor:
    """Neighbouring rows side by side: [B, L, C] -> [B L_out, K C]."""
    if taps == 1 and stride == 1 and padding == 0:
        return x.reshape(-1, x.shape[2])
    batch, length, channels = x.shape
    padded = F.pad(x, (0, 0, padding, padding))
    rows = (length + 2 * padding - taps) // stride + 1
    steps = (length + 2 * padding) * channels, stride * channels, 1
    return padded.as_strided((batch, rows, taps * channels), steps).reshape(batch * rows, -1)


def fold(columns: Tensor, shape: tuple[int, int, int], taps: int, stride: int, padding: int) -> Tensor:
    """The transpose of `unfold`: [B L_out, K C] -> [B, L, C], every entry added to the row that it came from."""
    if taps == 1 and stride == 1 and padding == 0:
        return columns.view(shape)
    batch, length, channels = shape
    columns = columns.view(batch, -1, taps, channels)
    padded = columns.new_zeros(batch, length + 2 * padding, channels)
    span = (columns.shape[1] - 1) * stride + 1
    for tap in range(taps):
        padded[:, tap : tap + span : stride] += columns[:, :, tap]
    return padded[:, padding : padding + length]


def _as_matrix(filters: Tensor) -> Tensor:
    """[A, B, K] in memory as [A, K, B] -> [A, K B], the same memory."""
    return filters.transpose(1, 2).flatten(1)


def _as_filters(matrix: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_as_matrix`."""
    return matrix.view(len(like), like.shape[2], like.shape[1]).transpose(1, 2)
