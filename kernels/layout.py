"""The layout that the Triton blocks share: channels-last rows with zero rows between the samples.

    rows [gap + B (L + gap), C]:   gap | sample 0, L rows | gap | sample 1, L rows | gap | ...
    sample b, position l  ->  row gap + b (L + gap) + l

The gaps are zero, so a convolution needs no masks: with `gap >= K // 2` its operand for output row r is the *contiguous* slice
of K C elements that starts K // 2 rows earlier, and the whole convolution is one matrix product over an overlapping view.
Channel counts are multiples of 8 (16 bytes), as copies into shared memory need them; only the data's columns are padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Activation:
    """B samples of L positions and C channels in the gapped layout."""

    rows: Tensor  # [gap + B (L + gap), C], 16 bit
    batch: int
    length: int
    gap: int

    @property
    def channels(self) -> int:
        return self.rows.shape[1]

    @property
    def pitch(self) -> int:
        """Rows from one sample to the next."""
        return self.length + self.gap

    def empty(self, length: int, channels: int) -> Activation:
        """Uninitialised room for another length and width: whoever fills it writes the gaps too."""
        rows = self.rows.new_empty(self.gap + self.batch * (length + self.gap), channels)
        return Activation(rows, self.batch, length, self.gap)


def enter(x: Tensor, gap: int, dtype: torch.dtype) -> Activation:
    """Trajectories [B, H, D] of any float type -> activation with D rounded up to a multiple of 8 by zero channels."""
    batch, length, width = x.shape
    rows = torch.zeros(gap + batch * (length + gap), round_up(width, 8), dtype=dtype, device=x.device)
    rows[gap:].view(batch, length + gap, rows.shape[1])[:, :length, :width].copy_(x)
    return Activation(rows, batch, length, gap)
