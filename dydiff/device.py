"""Which device to compute on, and what it is good at."""

from __future__ import annotations

import torch

from dydiff.errors import DydiffError


def find_device(name: str) -> str:
    """Check a device by its name; `auto` is the first GPU, or the CPU without one.

    Raises:
        DydiffError: no such device on this machine.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DydiffError(f"'{name}' is not a device; use cpu, cuda:0, cuda:1, ...") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DydiffError(f"Device '{name}' was asked for, but PyTorch finds no CUDA GPU here. Use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DydiffError(f"Device '{name}' was asked for, but this machine has {torch.cuda.device_count()} GPU(s).")
    elif device.type != "cpu":
        raise DydiffError(f"Device '{name}' is not supported; use cpu or a CUDA device such as cuda:0.")
    return name


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; without that, bf16 would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
