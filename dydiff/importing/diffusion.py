"""A published `network-snapshot-*.pkl` as a diffusion model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydiff.data import Dataset, Limits
from dydiff.errors import DydiffError
from dydiff.importing.product import Product, check_weights, find_setting, load_strictly
from dydiff.importing.records import is_module, named_tensors, to_array, walk
from dydiff.models import DIFFUSION
from dydiff.networks import build_trajectory_network
from dydiff.networks.published import rename_unet

SIGMA_DATA = 0.5  # of `Denoiser`
MAX_HORIZON = 100_000  # more is no horizon, but damage
HORIZON_NAMES = ("horizon", "max_length_of_trajectory")  # where a snapshot may say its horizon


def convert_diffusion(tree: dict[str, Any], dataset: Dataset, horizon: int | None) -> Product:
    """Convert the averaged network of a snapshot; `horizon` is for files that do not say it.

    Raises:
        DydiffError: not a UNet_RL, not of this dataset (its limits are compared), or its horizon is unknown.
    """
    if not is_module(tree["ema"]):
        raise DydiffError("The file's 'ema' is not a network.")
    published = named_tensors(tree["ema"])
    weights = check_weights(rename_unet(published))
    if len(weights) != len(published):
        raise DydiffError("The file's network has two weights of one name.")
    notes: list[str] = []
    network = {**_infer_network(weights), "horizon": _find_horizon(tree, horizon)}
    with torch.device("meta"):  # the file decides the sizes: compare before memory is reserved for them
        load_strictly(build_trajectory_network(**network), weights, "UNet_RL")
    sigma_data = tree["ema"].state.get("sigma_data", SIGMA_DATA)
    if sigma_data != SIGMA_DATA:
        raise DydiffError(f"The snapshot was trained with sigma_data = {sigma_data}, but dydiff has {SIGMA_DATA}.")
    columns = dataset.observation_dim, dataset.observation_dim + dataset.action_dim
    if network["data_dim"] not in columns:
        raise DydiffError(
            f"The snapshot's trajectories have {network['data_dim']} columns; dataset '{dataset.name}' has {columns[0]}, or "
            f"{columns[1]} with actions. Give the dataset that it was trained on."
        )
    include_action = network["data_dim"] == columns[1]
    skip = {id(weight) for weight in published.values()}
    limits = _match_limits(_find_vectors(tree, dataset, skip), dataset, include_action)
    flags = {name: _find_flag(tree, name, notes) for name in ("use_cond", "cond_on_action")}
    manifest = {"network": network, "observation_dim": columns[0], "include_action": include_action, **flags}
    limits_tree = {"minimum": limits.minimum, "maximum": limits.maximum}
    return Product(DIFFUSION, {"weights": weights, "limits": limits_tree}, manifest, notes)


def _infer_network(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `build_trajectory_network`, but for the horizon, from the shapes of a U-Net's weights."""
    first = [weights[f"down.{level}.0.block1.conv.weight"] for level in _levels(weights)]
    hidden = weights.get("embed.hidden.weight")
    if not first or hidden is None or hidden.dim() != 2 or any(weight.dim() != 3 for weight in first):
        raise DydiffError("The snapshot's network is not a UNet_RL, the only one that can be imported.")
    dim = hidden.shape[1]
    widths = [len(weight) for weight in first]
    if any(width % dim for width in widths):
        raise DydiffError(f"The snapshot's U-Net has widths {widths}, which are not multiples of its dim {dim}.")
    return {
        "kind": "UNet_RL",
        "data_dim": first[0].shape[1],
        "dim": dim,
        "dim_mults": [width // dim for width in widths],
        "kernel_size": first[0].shape[2],
    }


def _levels(weights: dict[str, Tensor]) -> range:
    count = 0
    while f"down.{count}.0.block1.conv.weight" in weights:
        count += 1
    return range(count)


def _find_horizon(tree: Any, given: int | None) -> int:
    found = find_setting(tree, HORIZON_NAMES, int)
    if given is not None and found - {given}:
        raise DydiffError(f"The snapshot says its horizon is {sorted(found)}, not {given}. Leave --horizon out.")
    if given is not None:
        return given
    if len(found) != 1:
        says = f"names several horizons {sorted(found)[:4]}" if found else "does not say its horizon"
        raise DydiffError(
            f"The snapshot {says}. Import it with `dydiff import FILE --dataset NAME --horizon H`, where H is the "
            "--max_length_of_trajectory that it was trained with."
        )
    (horizon,) = found
    if not 1 <= horizon <= MAX_HORIZON:
        raise DydiffError(f"The snapshot's horizon of {horizon} is not between 1 and {MAX_HORIZON:,}.")
    return horizon


def _find_flag(tree: Any, name: str, notes: list[str]) -> bool:
    found = find_setting(tree, [name], bool)
    if len(found) == 1:
        return found.pop()
    notes.append(f"The snapshot does not say {name}; True is assumed, as in the published commands.")
    return True


def _find_vectors(tree: Any, dataset: Dataset, skip: set[int]) -> list[np.ndarray]:
    """Every vector in the file with as many entries as the dataset has columns of some kind, but for the weights."""
    widths = {dataset.observation_dim, dataset.action_dim, dataset.observation_dim + dataset.action_dim}
    found = []
    for _, value in walk(tree):
        array = None if id(value) in skip else to_array(value)
        if array is not None and array.size in widths and array.shape[-1] == array.size:
            found.append(array.reshape(-1).astype(np.float64))
    return found


def _match_limits(vectors: list[np.ndarray], dataset: Dataset, include_action: bool) -> Limits:
    """The limits that the file embeds: the vectors in it that equal the dataset's minima and maxima, whole or in two parts.

    They are told by their values, whatever they are called. Raises DydiffError where there are none: other data.
    """
    expected = Limits.from_dataset(dataset, include_action)
    split = dataset.observation_dim if include_action else expected.dim
    bounds = {}
    for name in ("minimum", "maximum"):
        whole = getattr(expected, name).numpy()
        match = _find_equal(vectors, whole)
        if match is None:
            parts = [_find_equal(vectors, part) for part in (whole[:split], whole[split:]) if len(part)]
            if any(part is None for part in parts):
                raise DydiffError(_describe_mismatch(vectors, name, whole, split, dataset))
            match = np.concatenate(parts)
        bounds[name] = match.astype(np.float32)
    return Limits(**bounds)


def _find_equal(vectors: list[np.ndarray], expected: np.ndarray) -> np.ndarray | None:
    for vector in vectors:
        if vector.shape == expected.shape and np.allclose(vector, expected, rtol=1e-5, atol=1e-6):
            return vector
    return None


def _describe_mismatch(vectors: list[np.ndarray], name: str, whole: np.ndarray, split: int, dataset: Dataset) -> str:
    """Name the column in which the vector that comes nearest differs."""
    head = f"The snapshot holds no limits that equal those of dataset '{dataset.name}'"
    rivals = [(vector, part) for vector in vectors for part in (whole, whole[:split]) if vector.shape == part.shape]
    if not rivals:
        return f"{head}: it embeds no vector of {split} or {len(whole)} numbers. It cannot be told to be of this dataset."
    nearest, part = min(rivals, key=lambda rival: np.nan_to_num(np.abs(rival[0] - rival[1]), nan=np.inf).max())
    column = int(np.nan_to_num(np.abs(nearest - part), nan=np.inf).argmax())
    return (
        f"{head}: the nearest has {nearest[column]:g} in column {column}, whose {name} in the dataset is {part[column]:g}. "
        "It was trained on other data; give that dataset, or train a model on this one."
    )
