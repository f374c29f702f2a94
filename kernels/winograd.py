"""Winograd convolutions of five taps, whose tiles of output rows take fewer products.

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

Every matrix product runs over B ceil(L / tile) contiguous rows. What is done around the products is the business of the device:
unet_cpu.py (C++, bfloat16 and float32) and unet_winograd.py (NVIDIA cards, 16 bit).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dydiff.errors import NotForNetwork
from dydiff.kernels.unet_reference import GROUPS

TAPS = 5
BACKENDS = "bf16", "winograd", "triton-c"  # of dydiff/backends: those made of these convolutions
# A norm over few elements blows up rounding. From so many in a network's smallest group on, samples of a CPU's backends stayed well
# within their limits: the worst of 12 networks at 1e-2 of 2e-2 in bf16, at 1e-4 of 2e-3 in winograd. Groups of 4, of 2 broke them.
SMALLEST_GROUP = {"bf16": 16, "winograd": 4}


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
