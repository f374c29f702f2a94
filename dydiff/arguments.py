"""What functions of the library are given, checked where a wrong thing would be broadcast or fail without a name."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from dydiff.errors import DydiffError


def as_rows(name: str, values: Tensor, count: int | None, width: int, device: torch.device, remedy: str) -> Tensor:
    """`values` in float32, if they are a tensor [count, width] (count None: any) on the device; nothing reads the numbers.

    Raises:
        DydiffError: they are not, and would be broadcast or fail somewhere else; it ends with the `remedy`.
    """
    if isinstance(values, Tensor):
        if values.shape == (len(values) if count is None and values.ndim else count, width) and values.device == device:
            return values.to(torch.float32)
        given = f"one {list(values.shape)} on {values.device}"
    else:
        given = describe(values)
    wanted = f"[{'B' if count is None else count}, {width}] on {device}"
    raise DydiffError(f"{name} must be a torch tensor {wanted}, not {given}. {remedy}")


def describe(value: object) -> str:
    """A value in a few words."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return f"an object of type {type(value).__module__}.{type(value).__qualname__}"


def check_count(name: str, value: int, least: int) -> None:
    """Raise DydiffError unless the value is a whole number of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise DydiffError(f"{name} must be a whole number of at least {least}, not {describe(value)}.")
