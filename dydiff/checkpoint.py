"""Checkpoints: one safetensors file whose header holds JSON; nothing in it can execute, and writes are atomic.

A checkpoint stores a *tree* (dicts, lists and tuples of tensors and plain scalars, as `state_dict()` returns them) and a
*manifest* (JSON: what this is, which dataset and settings made it). Tensors keep their path in the tree as their name, so any
safetensors reader can open them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dydiff import __version__
from dydiff.errors import DydiffError

FORMAT = 1
SCALARS = (bool, int, float, str, type(None))


def save_checkpoint(path: Path, kind: str, tree: Any, manifest: dict[str, Any]) -> None:
    """Write a checkpoint of `kind` atomically: the old file stays until the new one is complete and on disk.

    Raises:
        DydiffError: the folder cannot be written, or the disk is full.
        TypeError: the tree holds something other than tensors, scalars, dicts, lists and tuples.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(tree, "", tensors)
    header = {"format": FORMAT, "kind": kind, "dydiff": __version__, **manifest}
    write_atomically(
        path,
        lambda temporary: save_file(
            tensors, temporary, metadata={"manifest": json.dumps(header), "structure": json.dumps(structure)}
        ),
    )


def load_checkpoint(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint of `kind` and return (tree on the CPU, manifest).

    Raises:
        DydiffError: the file is missing, damaged, of another kind, or written by a newer format.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, it takes any name, however long
        raise DydiffError(f"Checkpoint '{path}' does not exist. Train the {kind} first, or correct the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            manifest = json.loads(metadata["manifest"])
            if manifest["format"] > FORMAT:  # before anything that a newer format may store otherwise
                raise DydiffError(
                    f"Checkpoint '{path}' has format {manifest['format']}, written by dydiff {manifest['dydiff']}; this is "
                    f"dydiff {__version__}, which reads formats up to {FORMAT}. Upgrade dydiff to load it."
                )
            if manifest["kind"] != kind:
                raise DydiffError(f"'{path}' holds a {manifest['kind']}, but a {kind} is needed here. Correct the path.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return _decode(json.loads(metadata["structure"]), tensors), manifest
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DydiffError(
            f"'{path}' is not a dydiff checkpoint or is damaged ({error}). Use an earlier snapshot of the run, or train again."
        ) from error


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; raises DydiffError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DydiffError(f"Cannot read '{path}': {error.strerror or error}. Put the file back, or correct the path.") from error


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)` beside `path`, flush the result to disk and rename it over `path`.

    Raises:
        DydiffError: the folder cannot be written, or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner may read
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise DydiffError(
            f"Cannot write '{path}': {error}. Free space or choose another --outdir; the file that was there is untouched."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder itself is at fault, so is this
            temporary.unlink()


def make_folder(path: Path) -> Path:
    """Make a folder, unless it is there, before the work whose results belong into it.

    Raises:
        DydiffError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DydiffError(f"Cannot make the folder '{path}': {error.strerror}. Choose another --outdir.") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of a tree into `tensors`; what is left is JSON with one-key tags for containers."""
    if isinstance(node, torch.Tensor):
        while path in tensors:  # {"a": {"b": x}, "a.b": y}
            path += "'"
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(node, dict):
        return {"dict": [[key, _encode(value, f"{path}.{key}" if path else str(key), tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        tag = "list" if isinstance(node, list) else "tuple"
        return {tag: [_encode(value, f"{path}.{index}", tensors) for index, value in enumerate(node)]}
    if isinstance(node, SCALARS):
        return node
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__} (at '{path}')")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    items = [_decode(item, tensors) for item in value]
    return items if tag == "list" else tuple(items)
