"""Standard normal noise from a counter: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Element i of a draw is a function of the state alone, so a kernel can make its own noise, on any device and in any order. The
compiled twin is csrc/philox.h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PhiloxDraw(NamedTuple):
    """Noise that the churn step makes itself: draw number `index` of a Philox state."""

    state: Tensor  # [2] int64 on the tensors' device: seed, pass
    index: int

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class PhiloxNoise:
    """Numbers the draws of one sampler pass; its state lives on the device, so that a replayed CUDA graph sees it advance.

    `advance()` begins a pass; each call after that names the next draw. The same seed gives the same noise on every device, to
    the last bits of log, sin and cos.
    """

    def __init__(self, seed: Tensor):
        """`seed`: 0-dim int64 on the device that the noise is needed on."""
        self.state = torch.stack([seed, torch.zeros_like(seed)])
        self._index = 0

    def advance(self) -> None:
        """Begin the next pass."""
        self.state[1] += 1
        self._index = 0

    def __call__(self, shape: tuple[int, ...]) -> PhiloxDraw:
        """Name the next draw; its shape is that of the x it is added to."""
        self._index += 1
        return PhiloxDraw(self.state, self._index - 1)


def philox_words(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): counters [4, N] of 32-bit words held in int64 -> random words [4, N]."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply_words(0xD2511F53, c0)
        high1, low1 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3])


def _multiply_words(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor times words, in halves, because the product does not fit a signed 64-bit number."""
    low = factor * (words & 0xFFFF)
    middle = factor * (words >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_normal(state: Tensor, index: int, shape: tuple[int, ...]) -> Tensor:
    """Draw number `index` of a Philox state [2] (seed, pass; int64): standard normal float32 numbers of `shape`.

    Four numbers a counter {block, index, pass}, by Box-Muller on uniforms (word + 1/2) / 2^32.
    """
    seed, count = (int(value) for value in state)
    size = math.prod(shape)
    block = torch.arange((size + 3) // 4, device=state.device)
    fixed = [torch.full_like(block, value) for value in (index, count & 0xFFFFFFFF, count >> 32)]
    words = philox_words(torch.stack([block, *fixed]), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    uniform = (words.float() + 0.5) * 2.0**-32  # [4, N]
    radius, angle = (-2 * uniform[0::2].log()).sqrt(), 2 * math.pi * uniform[1::2]  # [2, N]: one row a pair
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)  # [2, 2, N]
    return pairs.flatten(0, 1).T.flatten()[:size].view(shape)
