"""Where in a tree of tensors there are numbers that are none."""

from __future__ import annotations

from typing import Any

import torch


def find_not_finite(tree: Any, path: str = "") -> str | None:
    """The path of the first tensor in a tree (dicts, lists, tuples) that holds a NaN or an infinity, or None.

    One look at the device decides for the whole tree; only where it finds something, each tensor is looked at.
    """
    tensors = dict(_walk(tree, path))
    checks = [tensor.isfinite().all() for tensor in tensors.values()]
    if not checks or bool(torch.stack(checks).all()):
        return None
    return next(name for name, check in zip(tensors, checks, strict=True) if not bool(check))


def _walk(tree: Any, path: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(path, tree)] if tree.is_floating_point() else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [found for key, value in items for found in _walk(value, f"{path}.{key}" if path else str(key))]
