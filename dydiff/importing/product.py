"""What an import results in, and what the conversions of all kinds of model share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.importing.records import to_array, walk


@dataclass
class Product:
    """A model in the form of a checkpoint of `kind`; `notes` say in sentences what the file leaves open and was assumed."""

    kind: str
    tree: dict[str, Any]
    manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def check_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, as they are wherever they already were.

    Raises:
        DydiffError: one is empty, not a number, or infinite.
    """
    for name, weight in weights.items():
        if not weight.numel() or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise DydiffError(f"The weight '{name}' in the file is empty, or holds something other than finite numbers.")
    return {name: weight.float() for name, weight in weights.items()}


def read_layers(weights: dict[str, Tensor], input_dim: int, what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The linear layers of an MLP or of an ensemble of them by name, in the file's order: (weight, bias) in float32.

    An MLP's weights are [out, in] with biases [out]; an ensemble's [E, in, out] with biases [E, 1, out].

    Raises:
        DydiffError: the layers are incomplete, do not fit together, or hold a NaN.
    """
    layers = {}
    width = input_dim
    for name, weight in weights.items():
        if name.rpartition(".")[2] != "weight":
            continue
        bias = weights.get(f"{name.removesuffix('weight')}bias")
        is_ensemble = weight.dim() == 3
        fan_in, fan_out = (weight.shape[1:] if is_ensemble else weight.shape[::-1]) if weight.dim() in (2, 3) else (None, None)
        bias_shape = (len(weight), 1, fan_out) if is_ensemble else (fan_out,)
        if fan_in != width or bias is None or bias.shape != bias_shape:
            raise DydiffError(
                f"The layer '{name}' of the {what} has weights of shape {tuple(weight.shape)} and biases of shape "
                f"{None if bias is None else tuple(bias.shape)}, which do not fit an input of width {width}. "
                "Give the dataset that it was trained on."
            )
        check_weights({name: weight, f"the bias of {name}": bias})
        layers[name.removesuffix(".weight")] = (weight.float(), bias.float())
        width = fan_out
    if not layers:
        raise DydiffError(f"The file holds no layers of a {what} (tensors named *.weight and *.bias).")
    return layers


def find_setting(tree: Any, names: Iterable[str], kind: type) -> set:
    """The different values of type `kind` (int or bool) that stand under one of `names` anywhere in a file."""
    names, found = set(names), set()
    for key, value in walk(tree):
        if isinstance(key, str) and key in names:
            array = to_array(value)
            if array is not None and array.ndim == 0:
                value = array.item()
            if type(value) is kind:
                found.add(value)
    return found


def name_layers(layers: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Weights and biases in their order under the names of `MLP` and `EnsembleMLP`."""
    named = {}
    for index, (weight, bias) in enumerate(layers):
        named[f"layers.{index}.weight"] = weight
        named[f"layers.{index}.bias"] = bias
    return named


def note_unused(notes: list[str], weights: Iterable[str], used: Iterable[str]) -> None:
    """Tell which of the tensors in a file were left out."""
    used = set(used)
    unused = [name for name in weights if name not in used]
    if unused:
        notes.append(f"Not used: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}.")


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights whose names and shapes must be exactly the module's; DydiffError names the differences."""
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        listing = "; ".join(f"{name}: {theirs.get(name, 'missing')}, not {ours.get(name, 'there')}" for name in wrong[:4])
        raise DydiffError(f"The weights in the file are not those of a {what}: {listing}{' ...' if len(wrong) > 4 else ''}.")
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.load_state_dict(weights)
