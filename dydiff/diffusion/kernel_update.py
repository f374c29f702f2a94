"""The update of the diffusion model's weights on an NVIDIA card: all of them at once, by one kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydiff.diffusion.update import OnePassUpdate, as_it_lies, sort_by_alignment
from dydiff.kernels.adam import BLOCK, adam_average
from dydiff.kernels.launch import Launch
from dydiff.kernels.training_cpu import AdamCoefficients


class KernelUpdate(OnePassUpdate):
    """On an NVIDIA card: one launch for all weights with a bfloat16 copy, and one for the others (kernels/adam.py).

    Weights, averages and copies move into rows, one behind the other, and keep their shapes and layouts.
    """

    def __init__(self, weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]):
        super().__init__(weights, averages, copies)
        average_of = dict(zip(weights, averages, strict=True))
        kinds = [[weight for weight in weights if (weight in copies) == copied] for copied in (True, False)]
        self.rows = [_Rows(kind, average_of, copies) for kind in kinds if kind]
        for rows in self.rows:
            self.moments |= rows.moments

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for rows in self.rows:
            torch.cat([as_it_lies(self.gradient_of(weight)) for weight in rows.weights], out=rows.gradient[: rows.used])

    def _move(self, lr: float, rate: float) -> None:
        coefficients = self._next_coefficients(lr, rate)
        for rows in self.rows:
            rows.launch(coefficients).run()


class _Rows:
    """Weights of one kind and all that belongs to them, each one row of memory; what lies behind the last weight is zero."""

    @torch.no_grad()
    def __init__(self, weights: list[nn.Parameter], averages: dict[nn.Parameter, Tensor], copies: dict[nn.Parameter, Tensor]):
        self.weights = sort_by_alignment(weights)
        self.used = sum(weight.numel() for weight in weights)
        length = -(-self.used // BLOCK) * BLOCK
        low = torch.bfloat16 if weights[0] in copies else torch.float32
        device = weights[0].device
        self.weight, self.first, self.second, self.average = (torch.zeros(length, device=device) for _ in range(4))
        self.gradient = torch.zeros(length, dtype=low, device=device)
        self.copy = torch.zeros_like(self.gradient) if low == torch.bfloat16 else None
        self.moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        start = 0
        for weight in self.weights:
            place = weight.shape, weight.stride(), start
            for tensor, row in ((averages[weight], self.average), (copies.get(weight), self.copy), (weight, self.weight)):
                if tensor is not None:
                    tensor.data = row.as_strided(*place).copy_(tensor)
            self.moments[weight] = self.first.as_strided(*place), self.second.as_strided(*place)
            start += weight.numel()

    def launch(self, coefficients: AdamCoefficients) -> Launch:
        """Of the kernel that updates them all."""
        return adam_average(self.weight, self.first, self.second, self.average, self.gradient, self.copy, coefficients)
