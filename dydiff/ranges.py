"""Named ranges for profilers: NVTX for Nsight, `record_function` for torch.profiler; free unless DYDIFF_RANGES=1."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext

ENABLED = os.environ.get("DYDIFF_RANGES") == "1"


def named_range(name: str) -> AbstractContextManager[object]:
    """A context whose time profilers show under `name`; a shared do-nothing context when ranges are off."""
    if not ENABLED:
        return _NOTHING
    import torch

    stack = ExitStack()
    stack.enter_context(torch.profiler.record_function(name))
    if torch.cuda.is_available():
        stack.enter_context(torch.cuda.nvtx.range(name))
    return stack


_NOTHING = nullcontext()
