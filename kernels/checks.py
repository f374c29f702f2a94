"""What must hold before a kernel sees a tensor, told in one sentence where it does not."""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.errors import DydiffError

# The extension counts elements in 32 bits.
MAX_ELEMENTS = 2**31 - 1


def check_like(x: Tensor, others: dict[str, Tensor]) -> None:
    """Raises DydiffError unless x is a floating-point [B, H, D] and the others (by name) share its shape and device."""
    if x.ndim != 3 or not x.is_floating_point():
        raise DydiffError(f"The EDM step takes floating-point trajectories [B, H, D], not {_describe(x)}.")
    for name, other in others.items():
        if other.shape != x.shape or other.device != x.device:
            raise DydiffError(
                f"The EDM step's {name} must have the trajectories' shape and device: it is {_describe(other)}, they "
                f"are {_describe(x)}."
            )


def check_conditioning(x: Tensor, first_observation: Tensor | None, actions: Tensor | None) -> None:
    """Raises DydiffError unless first_observation is [B, O] and actions is [B, H, A], D = O + A, where given."""
    batch, horizon, width = x.shape
    action_dims = range(1, width + 1)
    if first_observation is not None:
        if first_observation.ndim != 2 or first_observation.shape[0] != batch or first_observation.shape[1] > width:
            raise DydiffError(
                f"The EDM step's first_observation must be [{batch}, O], O at most {width}, but is "
                f"{_describe(first_observation)}."
            )
        action_dims = [width - first_observation.shape[1]]
    if actions is not None:
        if actions.ndim != 3 or actions.shape[:2] != (batch, horizon) or actions.shape[2] not in action_dims:
            wanted = f"{action_dims[0]}" if len(action_dims) == 1 else "A"
            raise DydiffError(
                f"The EDM step's actions must be [{batch}, {horizon}, {wanted}] for trajectories of width {width}, but "
                f"are {_describe(actions)}."
            )
    for name, part in (("first_observation", first_observation), ("actions", actions)):
        if part is not None and part.device != x.device:
            raise DydiffError(f"The EDM step's {name} lies on {part.device}, the trajectories on {x.device}.")


def check_philox(x: Tensor, state: Tensor, index: int) -> None:
    """Raises DydiffError unless state is a contiguous int64 [2] beside x and index fits 32 bits."""
    if state.shape != (2,) or state.dtype != torch.int64 or state.device != x.device or not state.is_contiguous():
        raise DydiffError(f"A Philox state is int64 [2] on the trajectories' device {x.device}, not {_describe(state)}.")
    if not 0 <= index < 2**32:
        raise DydiffError(f"A Philox draw's index must be at least 0 and below 2^32, not {index}.")


def check_addressable(tensors: dict[str, Tensor | None]) -> None:
    """Raises DydiffError unless all that are given are contiguous float32 of at most 2^31 - 1 elements."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise DydiffError(f"The compiled EDM step takes contiguous float32, but {name} is {_describe(tensor)}.")
        if tensor.numel() > MAX_ELEMENTS:
            raise DydiffError(
                f"The compiled EDM step takes at most {MAX_ELEMENTS} elements, but {name} is {_describe(tensor)}: "
                "split the batch."
            )


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{layout}"
