"""The compiled extension (csrc/), joined to PyTorch's threads; None where it is missing, with the reason and the remedy.

The CPU units share the OpenMP pool that PyTorch was linked with. Threads of their own would wait for a core behind PyTorch's,
which spin for some milliseconds after every operation: on two cores the Winograd transforms took 41 ms instead of 10.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def _read_build() -> tuple[str, str]:
    """What the installation did, and the digest of the sources that it saw; empty without one."""
    path = Path(__file__).with_name("_native_build.txt")
    if not path.exists():
        return "", ""
    report, _, digest = path.read_text().strip().partition("\n")
    return f"the installation {report}", digest


def _find_obstacle() -> str:
    """Why the extension must not be used although it may be there: a checkout goes on after its build."""
    build, digest = _read_build()
    folder = Path(__file__).parents[1] / "csrc"
    if not folder.is_dir() or not digest:
        return ""
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cpp", ".cu"))
    same = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest() == digest
    return "" if same else f"csrc/ has changed since {build}"


extension = None
_obstacle = _find_obstacle()
if _obstacle:
    warnings.warn(f"{_obstacle}. Run `pip install -e .` again; until then it is left unused.", RuntimeWarning, stacklevel=2)
else:
    try:
        from dydiff.kernels import _native as extension
    except ImportError as error:
        _obstacle = _read_build()[0] or str(error)


def why_unavailable(device: torch.device | str = "cpu") -> str:
    """Why the extension cannot serve this device and how to build it; empty if it can."""
    device = torch.device(device)
    kind = device.type
    rebuild = "run `pip install -e .` in the repository with a C++ compiler on PATH" + (
        ", and nvcc on PATH or CUDA_HOME set" if kind == "cuda" else ""
    )
    if kind not in ("cpu", "cuda"):
        return f"There is no compiled EDM step for {kind} tensors, only for cpu and cuda; plain PyTorch takes its place."
    if extension is None:
        return (
            f"The compiled EDM step (dydiff.kernels._native) is missing: {_obstacle}. "
            f"Plain PyTorch takes its place. To build it, {rebuild}."
        )
    if not hasattr(extension, kind):
        return (
            f"The compiled EDM step has no CUDA unit: {_read_build()[0] or 'it was built without nvcc'}. "
            f"Plain PyTorch takes its place. To build it, {rebuild}."
        )
    if kind == "cuda" and (obstacle := _ask_once(extension.cuda.obstacle, -1 if device.index is None else device.index)):
        return f"The compiled EDM step cannot use {device}: {obstacle}. Plain PyTorch takes its place."
    return ""


@cache
def _ask_once(obstacle: Callable[[int], str], index: int) -> str:
    """The answer takes calls that may be forbidden while a graph is captured, where a sampler asks for its backend, too."""
    with torch.cuda.device(index) if index >= 0 and torch.cuda.is_available() else contextlib.nullcontext():
        return obstacle(index)


def join_threads() -> bool:
    """Hand the extension the entry points of PyTorch's OpenMP; False where it has none of this kind (MSVC)."""
    torch_library = ctypes.CDLL(torch._C.__file__)  # a symbol is looked for in all that it was linked with
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    functions = [getattr(torch_library, name, None) for name in names]
    if None in functions:
        return False
    extension.threads.join(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
    return True


if extension is not None:
    join_threads()
