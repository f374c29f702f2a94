"""Triton's interpreter as tests need it: right in bfloat16, and without work that it repeats for every call and operation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from guarded import guard_memory
from triton.runtime import interpreter

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
on_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA: runs in the interpreter, in a process of its own"
)
in_the_interpreter = pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this very process"
)


def interpret_again(file: str, folder: Path) -> None:
    """Run a test file with Triton's interpreter, for which it takes another process, and with guarded memory: a kernel that reads
    beyond a tensor, which a card may forgive or not, crashes."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = os.environ | guard_memory(folder) | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout


class NothingToRestore:
    """What the interpreter expects of `_patch_lang`: here the language stays as it is, since nothing but kernels uses it."""

    def restore(self) -> None:
        pass


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Change the interpreter, in a process whose kernels are all interpreted, as long as the patch lasts."""
    _widen_bfloat16(patch)
    for name, quicker in (("_patch_lang", _patched_once), ("_get_np_dtype", _looked_up), ("_convert_float", _rounded)):
        if hasattr(interpreter, name):  # these are internals, and another Triton may do without them
            patch.setattr(interpreter, name, quicker(getattr(interpreter, name)))


def _widen_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies that; give its dot float32 operands instead."""
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), triton.language.float32)

    def create_dot(self, a, b, *arguments):
        return dot(self, widened(a), widened(b), *arguments)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _rounded(convert: Callable) -> Callable:
    """It cuts float32 to bfloat16, where cards round to the nearest, and takes long for the other direction."""
    float32, bfloat16 = triton.language.float32, triton.language.bfloat16

    def round_to_nearest(values, source, target, mode):
        if (source, target) == (float32, bfloat16):
            bits = np.asarray(values, np.float32).view(np.uint32)
            even = bits + 0x7FFF + ((bits >> 16) & 1)
            return np.where(np.isnan(values), 0x7FC0, even >> 16).astype(np.uint16)
        if (source, target) == (bfloat16, float32):
            return np.asarray(values).view(np.uint16).astype(np.uint32) << 16
        return convert(values, source, target, mode)

    return round_to_nearest


def _patched_once(patch_language: Callable) -> Callable:
    """It goes through all of Triton's language at every call of a device function; once for each module says the same."""
    done = set()

    def patch_once(function: Callable) -> NothingToRestore:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch_language(function)
        return NothingToRestore()

    return patch_once


def _looked_up(find: Callable) -> Callable:
    """It builds its table of NumPy's types anew for every look into it."""
    known: dict[str, np.dtype] = {}

    def look_up(dtype) -> np.dtype:
        name = str(dtype.scalar)  # a block's elements; a pointer is its own scalar
        if name not in known:
            known[name] = find(dtype.scalar)
        return known[name]

    return look_up
