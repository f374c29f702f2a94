"""Winograd convolutions of five taps, whose tiles of output rows take fewer products, and the U-Net's blocks made of them.

    conv block   v = B^T x;  m[p] = v[p] u[p], p = 0 .. P - 1;  y = mish(group_norm(A^T m + bias)) (+ time bias) (+ residual)

A tile of output rows at a time, y = A^T [(G w) * (B^T x)] (Lavin & Gray 2016, arXiv 1509.09308). The polynomial product behind it
is found from its remainders modulo x - p for points p, and from its leading coefficient, the point at infinity. Points come with
their negatives, which share half of the work. There are two transforms, of points that a search found to amplify rounding least;
the figures are for products of independent rows:

    F5    5 rows, 10 products instead of 25, for 16 bit: 2.04 times the rounding of a direct convolution. Nine real points would do
          with one product less, but 6.4 times at best; in place of two of them stands x^2 + 1, whose product takes three
          multiplications (Karatsuba). F(2, 5), which has 15 products for five rows, has 2.3 at best.
    F13   13 rows, 17 products instead of 65, for float32: 264 times, which leaves five digits. A horizon of 100 has 50 and 25 rows
          farther down, of which tiles of 13 waste a row in 26.

Activations are [B, L, C], channels last, so that every matrix product runs over B ceil(L / tile) contiguous rows. What is done
around the products is the business of the device: unet_cpu.py (C++, bfloat16 and float32) and winograd_triton.py (NVIDIA cards,
16 bit).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.errors import NotForNetwork
from dydiff.kernels.unet_reference import GROUPS, Weights

TAPS = 5
BACKENDS = "bf16", "winograd", "triton-c"  # of dydiff/backends.py: those made of these blocks


@dataclass(frozen=True)
class Transform:
    """The points of a Winograd convolution: p and -p for each of `real_points`, infinity, and with `with_i` the pair +-i."""

    real_points: tuple[float, ...]
    with_i: bool

    @property
    def points(self) -> int:
        """Products of a tile."""
        return 2 * len(self.real_points) + 3 * self.with_i + 1

    @property
    def tile(self) -> int:
        """Output rows of a tile."""
        return 2 * (len(self.real_points) + self.with_i) + 2 - TAPS

    def filters(self, weight: Tensor) -> Tensor:
        """G w: [C_out, C_in, 5] -> [points, C_in, C_out] float64: of the real points, x^2 + 1, infinity.

        Raises:
            NotForNetwork: another number of taps, or of channels that have no groups.
        """
        if weight.shape[2] != TAPS or weight.shape[0] % GROUPS:
            raise NotForNetwork(
                f"The backends {', '.join(BACKENDS)} compute convolutions of {TAPS} taps over a multiple of {GROUPS} channels, not "
                f"{weight.shape[2]} taps over {weight.shape[0]} channels. Use --set sampler_kwargs.backend=extension."
            )
        rows = []
        for point in self.real_points:
            # The derivative at the point of the polynomial whose roots all points are.
            slope = 2 * point * math.prod(point**2 - other**2 for other in self.real_points if other != point)
            slope *= point**2 + 1 if self.with_i else 1
            rows += [[sign * (sign * point) ** tap / slope for tap in range(TAPS)] for sign in (1, -1)]
        if self.with_i:
            scale = math.prod(-1 - point**2 for point in self.real_points)
            real, imaginary = [1 / scale, 0, -1 / scale, 0, 1 / scale], [0, 1 / scale, 0, -1 / scale, 0]  # of 1, i, -1, -i, 1
            rows += [real, [-x for x in imaginary], [x + y for x, y in zip(real, imaginary, strict=True)]]
        matrix = torch.tensor([*rows, [0.0] * (TAPS - 1) + [1.0]], dtype=torch.float64, device=weight.device)
        return torch.einsum("pk,oik->pio", matrix, weight.double())


F5 = Transform((1 / 3, 7 / 8, 8 / 5), with_i=True)
F13 = Transform((0.13, 0.39, 0.63, 0.85, 1.05, 1.34, 1.94, 3.8), with_i=False)

Packed = dict[str, Any]


class Matrix(Protocol):
    """A constant matrix [K, N] with a bias [N]."""

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> rows @ matrix + bias [M, N]."""
        ...


class WinogradBlocks(ABC):
    """What the blocks of all devices share; see `unet_reference.ReferenceBlocks` for the methods.

    Raises:
        DydiffError: from `pack`, a kernel size other than 5.
    """

    dtype: torch.dtype
    transform: Transform

    @abstractmethod
    def make_matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        """Prepare weight [K, N] and bias [N], float32, for products."""

    @abstractmethod
    def make_points(self, filters: Tensor) -> Any:
        """Prepare the filters' matrices at all points, [points, C_in, C_out] float64."""

    @abstractmethod
    def conv_block(
        self, x: Tensor, skip: Tensor | None, packed: Packed, prefix: str, time_bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """mish(group_norm(conv(x ++ skip))) + time_bias [C_out] + residual [B, L, C_out]; all but x may be absent."""

    def pack(self, weights: Weights) -> Packed:
        """Filters of the blocks to a matrix for each point, other convolutions to matrices with their bias; the rest as float32."""
        weights = {name: value.detach().to(torch.float32, copy=True).contiguous() for name, value in weights.items()}
        packed: Packed = {name: value for name, value in weights.items() if value.ndim == 1}
        for name, value in weights.items():
            bias = weights.get(name.removesuffix("weight") + "bias")
            if name.endswith("conv.weight"):
                packed[name] = self.make_points(self.transform.filters(value))
            elif value.ndim == 3 and value.shape[2] == 4:
                packed[name] = [self.make_matrix(taps, bias) for taps in _pair_taps(value)]
            elif name == "weight" and value.shape[2] == 1:  # the network's last, narrow product is float32 everywhere
                packed[name] = value[:, :, 0].T
            elif value.ndim == 3:
                packed[name] = self.make_matrix(value.permute(2, 1, 0).flatten(0, 1), bias)
        return packed

    def enter(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()

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
