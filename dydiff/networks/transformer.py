"""Causal transformer over the horizon that attends to the noise level (`Transformer_RL`, SPEC section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydiff.errors import DydiffError
from dydiff.networks.embedding import NoiseEmbedding

ATTENTION_DROPOUT = 0.002


class Transformer(nn.Module):
    """The raw network F as a pre-norm decoder: rows attend to earlier rows and to the noise embedding (arXiv 1706.03762).

    Shapes: x [B, H, D] and noise_label [B] (or [1], shared by the batch) -> [B, H, D].

    Raises:
        DydiffError: `width` does not divide into the heads, or the sinusoidal embedding's halves.
    """

    def __init__(self, data_dim: int, horizon: int, width: int = 768, num_layers: int = 4, num_heads: int = 2):
        super().__init__()
        if width < 4 or width % 2 or width % num_heads:
            raise DydiffError(
                f"Transformer_RL's dim must be even, at least 4 and divisible by its {num_heads} heads; {width} is not."
            )
        self.embed = NoiseEmbedding(width)
        self.input = nn.Linear(data_dim, width)
        self.position = nn.Parameter(torch.randn(1, horizon, width) * 0.02)
        layer = nn.TransformerDecoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(width))
        for block in self.decoder.layers:  # the layer's own argument would drop residual and feed-forward units too
            block.self_attn.dropout = block.multihead_attn.dropout = ATTENTION_DROPOUT
        self.output = nn.Linear(width, data_dim)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(horizon), persistent=False)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        memory = self.embed(noise_label)[:, None].expand(len(x), 1, -1)  # [B, 1, width]
        rows = self.input(x) + self.position
        return self.output(self.decoder(rows, memory, tgt_mask=self.causal, tgt_is_causal=True))
