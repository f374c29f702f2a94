"""Sinusoidal embeddings of a scalar, shared by the trajectory networks and the diffusion actor."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(value: Tensor, dim: int) -> Tensor:
    """Embed `value [B]` as `[B, dim]`: sines then cosines at frequencies exp(-ln(10000) i / (dim/2 - 1)) (arXiv 1706.03762)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=value.device) * (-math.log(10000.0) / (half - 1)))
    angle = value[:, None].to(frequency.dtype) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class NoiseEmbedding(nn.Module):
    """Noise label `[B]` -> `[B, dim]`: sinusoidal, Linear to 4 dim, Mish, Linear to dim (SPEC section 3)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.hidden = nn.Linear(dim, 4 * dim)
        self.output = nn.Linear(4 * dim, dim)

    def forward(self, noise_label: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(noise_label, self.dim).to(self.hidden.weight.dtype)
        return self.output(F.mish(self.hidden(embedding)))
