"""Whether the Triton kernels of training work on a device; for those who have another way, and perhaps no Triton."""

from __future__ import annotations

from functools import cache

import torch


@cache
def why_triton_fails(device: torch.device) -> str:
    """Why the kernels that training takes cannot be used on a device, from trying each there once; empty if they can."""
    try:
        from dydiff.kernels import adam, finish  # these import triton, which only a GPU needs
        from dydiff.kernels.unet_triton import why_unavailable
    except ImportError as error:
        return str(error)
    if reason := why_unavailable(device):
        return reason
    try:
        wrong = [kernel.__name__ for kernel in (adam, finish) if not kernel.is_right(device)]
    except Exception as error:  # whatever Triton's compiler or launch raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return f"the results of {' and '.join(wrong)} are wrong here" if wrong else ""
