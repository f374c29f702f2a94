"""The U-Net for training: the same network as `UNet` on activations [B, L, C], in one of three precisions.

On a CPU a convolution of x [B, L, C_in] is the product of a [B L, K C_in] matrix of neighbouring rows and a [K C_in, C_out] of
filters; both gradients are products of the same sizes. They reach the processor's rate at batch 8 already. On a GPU convolutions
are cuDNN's. Filters keep their names and shapes but lie in memory as [C_out, K, C_in], so that neither needs a reordered copy.

    float32     that; on a GPU with convolutions in TF32 where PyTorch has them so, as by default
    bf16        products take bfloat16 copies of the filters and give bfloat16 gradients with respect to these; the weights that
                learn stay float32
    winograd    float32, but convolutions of five taps with a quarter of the multiplications, rounded to some 3e-5
                (kernels/convolution_cpu.py; compiled, for CPUs)

Everything of one dimension, the noise embedding and the last, narrow product are float32 throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.kernels import unet_reference
from dydiff.kernels.convolution_cpu import convolve
from dydiff.kernels.training_cpu import norm_mish
from dydiff.kernels.triton_trial import why_triton_fails
from dydiff.networks.unet import ConvBlock, ResidualBlock, UNet

# x, bias, scale, shift, time, residual -> y, as `unet_reference.finish_block`
FinishBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


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
            x = self._upsample(upsample, x)
        x = self._conv_block(unet.final_block, x)
        return F.linear(x.float(), unet.final_conv.weight.squeeze(2), unet.final_conv.bias)

    def _residual_block(self, block: ResidualBlock, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self._conv_block(block.block1, x, time=block.time(embedding))
        residual = x if isinstance(block.residual, nn.Identity) else self._convolve(block.residual, x)
        return self._conv_block(block.block2, hidden, residual=residual)

    def _conv_block(self, block: ConvBlock, x: Tensor, time: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """mish(norm(conv(x))) + time [B or 1, C_out] + residual [B, L, C_out], either of which may be absent."""
        conv = block.conv
        hidden = convolve(x, conv.weight, conv.bias) if self.winograd else self._convolve(conv, x)
        y = norm_mish(hidden, block.norm.weight, block.norm.bias)
        if time is not None:
            y = y + time.to(self.dtype)[:, None]
        return y if residual is None else y + residual

    def _filters(self, layer: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
        return self.copies.get(layer.weight, layer.weight)

    def _convolve(self, layer: nn.Conv1d, x: Tensor) -> Tensor:
        return _Convolution.apply(x, self._filters(layer), layer.bias, layer.stride[0], layer.padding[0])

    def _upsample(self, layer: nn.ConvTranspose1d, x: Tensor) -> Tensor:
        return _TransposedConvolution.apply(x, self._filters(layer), layer.bias, layer.stride[0], layer.padding[0])


class CudnnTrainingUNet(TrainingUNet):
    """The same on an NVIDIA card: cuDNN's convolutions, and what follows each of a block by `finish_block`.

    That is kernels/unet_reference.py's function, or the same as one kernel each way (kernels/finish.py).
    """

    def __init__(self, unet: UNet, precision: str, finish_block: FinishBlock):
        super().__init__(unet, precision)
        self.finish_block = finish_block

    def _conv_block(self, block: ConvBlock, x: Tensor, time: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        conv, norm = block.conv, block.norm
        filters, padding = self._filters(conv)[:, :, None], (0, conv.padding[0])
        y = _as_rows(F.conv2d(_as_image(x), filters, padding=padding))
        return self.finish_block(y, conv.bias, norm.weight, norm.bias, time, residual)

    def _convolve(self, layer: nn.Conv1d, x: Tensor) -> Tensor:
        filters, bias = self._filters(layer), layer.bias.to(self.dtype)
        if layer.kernel_size[0] == 1:
            return F.linear(x, filters.squeeze(2), bias)
        return _as_rows(F.conv2d(_as_image(x), filters[:, :, None], bias, (1, layer.stride[0]), (0, layer.padding[0])))

    def _upsample(self, layer: nn.ConvTranspose1d, x: Tensor) -> Tensor:
        filters, bias = self._filters(layer)[:, :, None], layer.bias.to(self.dtype)
        return _as_rows(F.conv_transpose2d(_as_image(x), filters, bias, (1, layer.stride[0]), (0, layer.padding[0])))


def is_on_gpu(unet: UNet) -> bool:
    """Whether a network's weights lie on an NVIDIA card."""
    return unet.final_conv.weight.is_cuda


def make_training_unet(unet: UNet, precision: str) -> TrainingUNet:
    """The network for training in a precision on the device of its weights (see TrainingUNet); warns where a fast kernel fails."""
    if not is_on_gpu(unet):
        return TrainingUNet(unet, precision)
    device = unet.final_conv.weight.device
    if obstacle := why_triton_fails(device):
        told = f"Training on {device} goes without fused kernels, and slower, because they cannot be used here: {obstacle}."
        warnings.warn(told, RuntimeWarning, stacklevel=2)
        return CudnnTrainingUNet(unet, precision, unet_reference.finish_block)
    from dydiff.kernels import finish  # imports triton, which only a GPU needs

    return CudnnTrainingUNet(unet, precision, finish.finish_block)


def _as_image(x: Tensor) -> Tensor:
    """[B, L, C] -> [B, C, 1, L] in the same memory: channels last, as are filters of one row."""
    return x.transpose(1, 2)[:, :, None]


def _as_rows(image: Tensor) -> Tensor:
    """The reverse of `_as_image`."""
    return image.squeeze(2).transpose(1, 2)


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
