"""A plain MLP over the flattened trajectory (`MLP_RL`, SPEC section 3): the baseline without temporal structure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydiff.networks.embedding import NoiseEmbedding


class TrajectoryMLP(nn.Module):
    """The raw network F as an MLP over all H x D entries and the noise embedding.

    Shapes: x [B, H, D] and noise_label [B] (or [1], shared by the batch) -> [B, H, D].
    """

    def __init__(self, data_dim: int, horizon: int, width: int = 1024, num_layers: int = 3, embedding_dim: int = 128):
        super().__init__()
        self.embed = NoiseEmbedding(embedding_dim)
        sizes = [horizon * data_dim + embedding_dim] + [width] * num_layers
        hidden = [module for a, b in zip(sizes, sizes[1:], strict=False) for module in (nn.Linear(a, b), nn.Mish())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, horizon * data_dim))

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        embedding = self.embed(noise_label).expand(len(x), -1)
        return self.body(torch.cat([x.flatten(1), embedding], dim=1)).view_as(x)
