"""Whether Triton's kernels work on a device; for those who have another way, without importing Triton where it is not installed."""

from __future__ import annotations

import torch


def why_triton_fails(device: torch.device) -> str:
    """Why Triton's kernels cannot be used on a device, from trying one there once; empty if they can."""
    try:
        from dydiff.kernels import finish  # imports triton, which only a GPU needs
    except ImportError as error:
        return str(error)
    return finish.why_unusable(device)
