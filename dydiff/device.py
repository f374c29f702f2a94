"""Which device to compute on, and what it is good at."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator

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


def has_idle_core(device: str) -> bool:
    """Whether training on a device leaves a core of this process's share to other work."""
    busy = torch.get_num_threads() if device == "cpu" else 1
    return len(os.sched_getaffinity(0)) > busy


@contextlib.contextmanager
def sum_in_float32() -> Iterator[None]:
    """Keep cuBLAS within from adding parts of a sum in 16 bit, as PyTorch permits by default; captured graphs keep it, too."""
    settings, names = torch.backends.cuda.matmul, [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [getattr(settings, name) for name in names]
    try:
        for name in names:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


@contextlib.contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Let oneDNN compute a CPU's float32 matrix products within, where its results are as exact as the default's.

    By default PyTorch takes them to MKL, which uses half of what an AMD core with AVX-512 can do: a product of 256 x 256 takes
    290 us there and 142 us in oneDNN (one core of an EPYC). PyTorch offers oneDNN only as a permission to multiply in bfloat16;
    CPUs without AMX make no use of that.
    """
    if device.type != "cpu" or not _onednn_is_exact():
        yield
        return
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def multiply_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Let matrix products within be float32, or (`bf16`) take bfloat16 and give it, with float32 sums.

    Weights are rounded anew for every product: PyTorch would keep them, and compute with old ones after an optimizer's step.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, instead of giving it back and faulting it in again at every update.

    How much glibc gives back depends on what the process did before: the same updates of TD3+BC run without page faults or with
    500 each, which then take a sixth of their time. Other C libraries have their own ways and are left alone.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_threshold = -1, -3  # the names of glibc's malloc.h
        mallopt(trim_threshold, 2**29)
        mallopt(mmap_threshold, 2**27)


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether a product under the permission has float32's error (1e-7), and not bfloat16's (1e-3)."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # PyTorch before 2.9 has none
    if settings is None or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        error = (a @ b).double() - a.double() @ b.double()
    finally:
        settings.fp32_precision = before
    return bool(error.norm() < 1e-5 * (a @ b).norm())
