"""Work that goes on in smaller pieces where the memory does not hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.progress import say

Result = TypeVar("Result")
# What PyTorch says of a CPU's memory, CUDA of a graph or a kernel, a library of its handles, and PyTorch of a convolution where no
# algorithm of cuDNN's got the memory that it works in.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
)


def compute_in_chunks(
    function: Callable[[Tensor], Result],
    rows: Tensor,
    size: int,
    generator: torch.Generator,
    on_halved: Callable[[int], None],
    setting: str,
) -> list[Result]:
    """Call `function` on rows [N, ...], `size` at a time; where the memory does not hold a chunk, halve the size and go on.

    What is computed stays. `generator`, the only source of randomness of `function`, is set back before a chunk is computed again,
    so that the results are those of the smaller size. `on_halved(size)` drops what larger chunks left in memory; `setting` is the
    name of the size in messages.

    Raises:
        DydiffError: the memory does not hold a single row.
    """
    results: list[Result] = []
    while len(rows) or not results:
        state = generator.get_state()
        chunk = rows[:size]
        try:
            results.append(function(chunk))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(chunk) <= 1:
                raise DydiffError(
                    f"The memory of {rows.device} does not hold a single rollout ({' '.join(str(error).split())[:200]}). End what "
                    "else runs there, or use a smaller diffusion model."
                ) from error
            reason = str(error).splitlines()[0][:120]
        else:
            rows = rows[size:]
            continue
        # Behind the except clause: until its end the error keeps the tensors of the failed chunk alive.
        generator.set_state(state)
        size = len(chunk) // 2
        on_halved(size)
        if rows.device.type == "cuda":
            torch.cuda.empty_cache()
        say(
            f"Out of memory with {len(chunk)} rollouts at a time ({reason}): going on with {size}. Set {setting} to {size} to "
            "begin with that."
        )
    return results


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out: outside of PyTorch's own allocator in words only."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
