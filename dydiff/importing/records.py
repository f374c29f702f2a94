"""What the reader makes of a pickle, and how numbers and weights are found in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUMBERS = {f"{kind}{size}" for kind in "iuf" for size in (2, 4, 8)} | {"i1", "u1", "b1"}  # numpy's codes
MAX_DEPTH = 64  # of modules in each other


class Global(NamedTuple):
    """The name of a class or function, and no more than that."""

    path: str


@dataclass(eq=False)
class Record:
    """What a file says about an object that is not built: the class or function, its arguments, state and contents."""

    name: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)  # of a list's subclass; (key, value) pairs of a dict's


@dataclass(eq=False)
class Storage:
    """The numbers behind one or several tensors, as they lie in the file."""

    flat: Tensor  # [n]


def array_layout(dtype: Any, shape: Any) -> tuple[np.dtype, int]:
    """The type of an array's numbers and how many bytes they take; ValueError for anything but little-endian numbers."""
    if not isinstance(dtype, Record) or dtype.name != "numpy.dtype" or dtype.arguments[0] not in NUMBERS:
        raise ValueError("an array of something other than numbers")
    if dtype.state is not None and dtype.state[1] not in ("<", "|", "="):
        raise ValueError("an array of big-endian numbers")
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("an array of strange shape")
    kind = np.dtype(f"<{dtype.arguments[0]}")
    return kind, math.prod(shape) * kind.itemsize


def to_array(value: Any) -> np.ndarray | None:
    """The numbers of a tensor, or of a numpy array or scalar that the file describes; None for everything else."""
    if isinstance(value, Tensor):
        return None if value.dtype == torch.bfloat16 else value.numpy()  # numpy has no such type
    if not isinstance(value, Record):
        return None
    order = "C"
    if value.name.endswith(".multiarray._reconstruct") and value.state is not None:
        _, shape, dtype, is_fortran, raw = value.state
        order = "F" if is_fortran else "C"
    elif value.name.endswith(".numeric._frombuffer"):
        raw, dtype, shape, order = value.arguments
    elif value.name.endswith(".multiarray.scalar"):
        (dtype, raw), shape = value.arguments, ()
    elif value.name == "joblib.numpy_pickle.NumpyArrayWrapper":
        (raw,), dtype, shape, order = value.items, *(value.state[key] for key in ("dtype", "shape", "order"))
    else:
        return None
    if not isinstance(raw, (bytes, bytearray)):  # a list: an array of objects
        return None
    kind, _ = array_layout(dtype, shape)
    return np.frombuffer(raw, kind).reshape(shape, order=order)


def walk(root: Any) -> Iterator[tuple[Any, Any]]:
    """Everything reachable in what was read, once each, as (the key it stands under or None, value)."""
    pending, seen = [(None, root)], set()
    while pending:
        key, value = pending.pop()
        if isinstance(value, (dict, list, tuple, set, frozenset, Record)):
            if id(value) in seen:
                continue
            seen.add(id(value))
        yield key, value
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, Record):
            pending.extend((None, part) for part in (value.arguments, value.state))
            # A dict's subclass holds (key, value) pairs; of a list's subclass the key is None.
            pending.extend(
                item if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) else (None, item)
                for item in value.items
            )
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending.extend((None, item) for item in value)


def is_module(value: Any) -> bool:
    """Whether this describes a torch module."""
    return isinstance(value, Record) and isinstance(value.state, dict) and "_modules" in value.state


def named_tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of a module or of nested dicts under their names, in their order, as `state_dict` would name them.

    A module that occurs twice is named once, as by `named_parameters`. Raises ValueError where tensors share so much of their
    memory that copies of them would be much larger than the file.
    """
    found: dict[str, Tensor] = {}
    _collect(tree, "", 0, set(), found)
    storages = [tensor.untyped_storage() for tensor in found.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in found.values()) > 2 * held:
        raise ValueError("many tensors that share the same few numbers")
    return found


def _collect(node: Any, prefix: str, depth: int, seen: set[int], found: dict[str, Tensor]) -> None:
    if isinstance(node, Tensor):
        found[prefix.removesuffix(".")] = node
        return
    if not isinstance(node, dict) and not is_module(node):
        return
    if id(node) in seen:
        return
    if depth > MAX_DEPTH:
        raise ValueError("modules nested too deep")
    seen.add(id(node))
    parts = [node]
    if is_module(node):
        temporary = node.state.get("_non_persistent_buffers_set", ())
        buffers = {key: value for key, value in node.state.get("_buffers", {}).items() if key not in temporary}
        parts = [node.state.get("_parameters", {}), buffers, node.state["_modules"]]
    for part in parts:
        for key, value in part.items():
            _collect(value, f"{prefix}{key}.", depth + 1, seen, found)
