"""Temporal U-Net over trajectories: 1-D convolutions along the horizon, conditioned on the noise level (SPEC section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.errors import DydiffError
from dydiff.networks.embedding import NoiseEmbedding

GROUPS = 8  # GroupNorm groups of every convolution block


class ConvBlock(nn.Module):
    """Conv1d, GroupNorm over (channels in group x horizon), Mish: [B, C_in, H] -> [B, C_out, H]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two convolution blocks; the noise embedding enters between them as one bias per channel.

    Shapes: x [B, C_in, H], embedding [B or 1, dim] -> [B, C_out, H].
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, kernel_size: int):
        super().__init__()
        self.block1 = ConvBlock(in_channels, out_channels, kernel_size)
        self.block2 = ConvBlock(out_channels, out_channels, kernel_size)
        self.time = nn.Linear(embedding_dim, out_channels)
        same_width = in_channels == out_channels
        self.residual = nn.Identity() if same_width else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.block1(x) + self.time(F.mish(embedding))[:, :, None]
        return self.block2(hidden) + self.residual(x)


class UNet(nn.Module):
    """The raw network F of the diffusion model, `UNet_RL` of the published settings (arXiv 2405.19189; arXiv 2205.09991).

    Shapes: x [B, H, D] and noise_label [B] (or [1], shared by the batch) -> [B, H, D].
    58.75 M parameters at the defaults with D = 14.

    Raises:
        DydiffError: the horizon is not divisible by 2^(levels - 1), or `dim` not by the 8 GroupNorm groups.
    """

    def __init__(
        self,
        data_dim: int,
        horizon: int,
        dim: int = 128,
        dim_mults: Sequence[int] = (1, 4, 8),
        kernel_size: int = 5,
    ):
        super().__init__()
        stride = 2 ** (len(dim_mults) - 1)
        if horizon % stride:
            raise DydiffError(
                f"UNet_RL halves the horizon at each of its {len(dim_mults)} levels but the last, so the horizon must be "
                f"divisible by {stride}; {horizon} is not, {max(horizon // stride, 1) * stride} is."
            )
        if dim % GROUPS:
            raise DydiffError(f"UNet_RL's dim must be divisible by {GROUPS} (the GroupNorm groups); {dim} is not.")
        self.data_dim = data_dim
        self.horizon = horizon
        self.kernel_size = kernel_size
        self.sizes = {"data_dim": data_dim, "horizon": horizon, "dim": dim, "dim_mults": [*dim_mults], "kernel_size": kernel_size}
        self.embed = NoiseEmbedding(dim)
        widths = [dim * mult for mult in dim_mults]
        # Elements of the smallest normalisation group; a level also ends at the width of the one above it.
        narrowest = [min(pair) for pair in zip(widths, [widths[0], *widths], strict=False)]
        self.smallest_group = min(width // GROUPS * (horizon >> level) for level, width in enumerate(narrowest))

        def pair(in_channels: int, out_channels: int) -> nn.ModuleList:
            first = ResidualBlock(in_channels, out_channels, dim, kernel_size)
            return nn.ModuleList([first, ResidualBlock(out_channels, out_channels, dim, kernel_size)])

        self.down = nn.ModuleList(pair(a, b) for a, b in zip([data_dim, *widths], widths, strict=False))
        self.downsample = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = pair(widths[-1], widths[-1])
        # The way up mirrors the way down and stops at the second level: skip connections double the input width.
        up_widths = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(pair(2 * above, below) for above, below in up_widths)
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, stride=2, padding=1) for _, w in up_widths)
        self.final_block = ConvBlock(widths[0], widths[0], kernel_size)
        self.final_conv = nn.Conv1d(widths[0], data_dim, 1)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        embedding = self.embed(noise_label)
        x = x.transpose(1, 2)  # [B, D, H]
        skips = []
        for level, (first, second) in enumerate(self.down):
            x = second(first(x, embedding), embedding)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        for block in self.middle:
            x = block(x, embedding)
        for (first, second), upsample in zip(self.up, self.upsample, strict=True):
            x = torch.cat([x, skips.pop()], dim=1)
            x = upsample(second(first(x, embedding), embedding))
        return self.final_conv(self.final_block(x)).transpose(1, 2)  # [B, H, D]
