"""The only place that knows torch.compile and CUDA graphs: turns plain functions into compiled or captured ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from dydiff.errors import DydiffError


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with Inductor at its first call; raises DydiffError then if the machine cannot compile."""
    compiled = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            raise DydiffError(
                f"torch.compile cannot compile here ({str(error).splitlines()[0]}). Install a C++ compiler (CPU) or a matching "
                "Triton (GPU), or choose another sampler_kwargs.backend."
            ) from error

    return call


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a compiler for this device: Triton for a GPU, a C++ compiler for the CPU."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
