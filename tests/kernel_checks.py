"""What tests of the U-Net's blocks share: inputs, modules, and a comparison with PyTorch in the same precision."""

from __future__ import annotations

import torch
from interpreter import DEVICE
from torch import Tensor, nn

from dydiff.kernels import unet_reference
from dydiff.kernels.channels_last import ChannelsLastBlocks
from dydiff.kernels.unet_winograd import Output


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def seeded(make, *arguments) -> nn.Module:
    """A module with the same weights every time; norms and biases are moved off their initial 1 and 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(*arguments)
        for name, parameter in module.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False).to(DEVICE)


def rows_of(activation, blocks) -> Tensor:
    """What a backend computed, as it stores it: of an activation its rows."""
    if isinstance(activation, Output):
        activation = blocks.rows(activation)
    return activation if isinstance(activation, Tensor) else activation.rows


def plain(activation, blocks, has_left: bool = False) -> Tensor:
    """Any backend's activation as [B, C, L] float64, a gapped one with zeros in its gaps; or what has left it."""
    rows = rows_of(activation, blocks).double()
    if isinstance(activation, Tensor):
        return rows.transpose(1, 2) if isinstance(blocks, ChannelsLastBlocks) and not has_left else rows
    if isinstance(activation, Output):
        activation = activation.rows
    gap, pitch = activation.gap, activation.pitch
    assert not rows[:gap].any()
    samples = rows[gap:].view(activation.batch, pitch, -1)
    assert not samples[:, activation.length :].any()
    return samples[:, : activation.length].transpose(1, 2)


def assert_as_good_as_pytorch(compute, dtype: torch.dtype, backend, has_left: bool = False) -> None:
    """compute(blocks) -> result, an activation or what `leave` made of it (`has_left`); the kernels' largest error is at most
    twice that of PyTorch in the same precision."""
    exact, reference, result = (
        plain(compute(blocks), blocks, has_left)
        for blocks in (unet_reference.ReferenceBlocks(torch.float64), unet_reference.ReferenceBlocks(dtype), backend)
    )
    floor = torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert result.shape == exact.shape
    assert (result - exact).abs().max() <= 2 * torch.maximum((reference - exact).abs().max(), floor)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same input for everyone: what the low precision can hold."""
    return x.to(dtype).double()
