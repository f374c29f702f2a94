"""Weights of the U-Net's layers as the matrices that the Triton kernels multiply by.

A convolution with K taps reads K consecutive rows of the activation at once, so its matrix is [K C_in, C_out], tap by tap:
`matrix[k C_in + c, o] = weight[o, c, k]`. A concatenated input is two products, so there the rows of each source come together.
A transposed convolution (k4 s2 p1) is two convolutions with two taps each, one for the even and one for the odd outputs:
`out[2j] = w[3] x[j-1] + w[1] x[j]`, `out[2j+1] = w[2] x[j] + w[0] x[j+1]`; their matrices lie one below the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.kernels.layout import Activation, round_up

# Rows of a source are padded with zeros to a multiple of the deepest tile, so that loads of the matrix need no mask.
DEPTH = 64
EVEN_TAPS, ODD_TAPS = [3, 1], [2, 0]


@dataclass
class Convolution:
    """The weights of one convolution: phases [P, K, C_in, C_out] with channels rounded up to multiples of 8, bias [C_out]."""

    phases: Tensor
    bias: Tensor  # float32
    matrices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def taps(self) -> int:
        return self.phases.shape[1]

    def matrix(self, widths: tuple[int, ...]) -> Tensor:
        """The matrix for an input that is the concatenation of sources of these widths; made on first use, then kept."""
        if widths not in self.matrices:
            parts = []
            for phase in self.phases:
                for source in phase.split(widths, dim=1):
                    rows = source.reshape(-1, source.shape[-1])
                    parts.append(F.pad(rows, (0, 0, 0, -len(rows) % DEPTH)))
            self.matrices[widths] = torch.cat(parts)
        return self.matrices[widths]


class Filters(Protocol):
    """The weights of a block's convolution, as the backend wants them, and its bias [C_out] float32."""

    bias: Tensor


# What makes them of weight [C_out, C_in, K] and bias [C_out] in a dtype.
PackFilters = Callable[[Tensor, Tensor, torch.dtype], Filters]


@dataclass
class ConvBlock:
    """Convolution, GroupNorm with this scale and shift [C_out] float32, Mish."""

    convolution: Filters
    scale: Tensor
    shift: Tensor


class Residual(NamedTuple):
    """The addend of a convolution block: one or two activations, through a 1x1 convolution unless they are one of its width."""

    sources: tuple[Activation, ...]
    convolution: Convolution | None


@dataclass
class ResidualBlock:
    """The packed weights of one residual block."""

    block1: ConvBlock
    block2: ConvBlock
    residual: Convolution | None  # 1x1, where the width changes

    def residual_of(self, sources: tuple[Activation, ...]) -> Residual:
        """What the block adds; a concatenation that is as wide as the output needs a convolution that joins its sources."""
        if self.residual is None and len(sources) > 1:
            self.residual = identity(self.block2.convolution.bias, sources[0].rows.dtype)
        return Residual(sources, self.residual)


def pack_convolution(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Convolution:
    """weight [C_out, C_in, K], or [C_in, C_out, 4] of a transposed convolution (the only one with an even K)."""
    if weight.shape[2] == 4:
        taps = weight.permute(2, 0, 1)  # [4, C_in, C_out]
        phases = torch.stack([taps[EVEN_TAPS], taps[ODD_TAPS]])
    else:
        phases = weight.permute(2, 1, 0)[None]
    rows, columns = phases.shape[2:]
    phases = F.pad(phases, (0, round_up(columns, 8) - columns, 0, round_up(rows, 8) - rows))
    # A copy even where nothing changes: training the network further must not change what was packed.
    return Convolution(phases.to(dtype, copy=True).contiguous(), bias.to(torch.float32, copy=True))


def identity(like: Tensor, dtype: torch.dtype) -> Convolution:
    """The 1x1 convolution that changes nothing, exactly; like: a bias of its width."""
    return Convolution(torch.eye(len(like), dtype=dtype, device=like.device)[None, None], torch.zeros_like(like))


def pack(
    weights: dict[str, Tensor], dtype: torch.dtype, pack_filters: PackFilters = pack_convolution
) -> ResidualBlock | ConvBlock | Convolution:
    """The weights of a residual block, a convolution block or a single convolution, told apart by their names.

    pack_filters: what packs the convolutions of blocks; all others are a `Convolution`.
    """

    def convolution(prefix: str, pack_one: PackFilters = pack_convolution) -> Filters:
        return pack_one(weights[prefix + "weight"].detach(), weights[prefix + "bias"].detach(), dtype)

    def block(prefix: str) -> ConvBlock:
        scale, shift = (weights[f"{prefix}norm.{name}"].detach().to(torch.float32, copy=True) for name in ("weight", "bias"))
        return ConvBlock(convolution(prefix + "conv.", pack_filters), scale, shift)

    if "block1.conv.weight" in weights:
        residual = convolution("residual.") if "residual.weight" in weights else None
        return ResidualBlock(block("block1."), block("block2."), residual)
    return block("") if "conv.weight" in weights else convolution("")
