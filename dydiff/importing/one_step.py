"""Published dynamics and reward `.pkl` files, plain dicts of tensors, as dynamics and reward models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydiff.data import Dataset, Spaces, Transitions
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.importing.product import Product, check_weights, name_layers, note_unused, read_layers
from dydiff.importing.records import named_tensors, to_array, walk
from dydiff.models import DYNAMICS, REWARD
from dydiff.reward import RewardModel

NUM_ELITES = 5  # where the file names none
MEASURED_ROWS = 5000  # transitions that then decide which they are
ON_TRUST = "The file does not say which data it was trained on; --dataset is taken at its word."


def is_dynamics(tree: Any) -> bool:
    """Whether a dict of tensors holds an ensemble."""
    return any(tensor.dim() == 3 and name.endswith("weight") for name, tensor in named_tensors(tree).items())


def convert_reward(tree: Any, dataset: Dataset) -> Product:
    """Convert a reward model; DydiffError where its layers do not fit the dataset."""
    tensors = named_tensors(tree)
    layers = read_layers(tensors, dataset.observation_dim + dataset.action_dim, "reward model")
    widths = [len(bias) for _, bias in layers.values()]
    if widths[-1] != 1 or any(weight.dim() != 2 for weight, _ in layers.values()):
        raise DydiffError(f"The file's network gives {widths[-1]} numbers; a reward model gives one.")
    model = {"observation_dim": dataset.observation_dim, "action_dim": dataset.action_dim, "hidden_dims": widths[:-1]}
    notes = [ON_TRUST]
    note_unused(notes, tensors, _names(layers))
    reward = RewardModel(**model)
    reward.network.load_state_dict(name_layers(layers.values()))
    return Product(REWARD, reward.state_dict(), {"model": model}, notes)


def convert_dynamics(tree: Any, dataset: Dataset, spaces: Spaces, transitions: Transitions) -> Product:
    """Convert a dynamics ensemble. Without elites in the file, those with the smallest error on the dataset are taken.

    Raises:
        DydiffError: its layers do not fit the dataset, or its elites are not members of it.
    """
    tensors = named_tensors(tree)
    observation_dim = dataset.observation_dim
    layers = read_layers(tensors, observation_dim + dataset.action_dim, "dynamics ensemble")
    num_nets = {len(weight) if weight.dim() == 3 else 0 for weight, _ in layers.values()}
    widths = [bias.shape[-1] for _, bias in layers.values()]
    if widths[-1] != 2 * observation_dim or len(num_nets) != 1 or num_nets == {0}:
        raise DydiffError(
            f"The file's ensemble gives {widths[-1]} numbers; a dynamics model gives a mean and a log-variance for each of "
            f"{observation_dim} observation columns, and all of its layers have as many networks."
        )
    notes = [ON_TRUST]
    elites = _find_elites(tree)
    model = {
        "observation_dim": observation_dim,
        "action_dim": dataset.action_dim,
        "hidden_dims": widths[:-1],
        "num_nets": num_nets.pop(),
        "weight_decay": [0.0] * len(layers),  # of a training that is over
    }
    if elites is not None and not (elites and set(elites) <= set(range(model["num_nets"])) and len(set(elites)) == len(elites)):
        raise DydiffError(f"The file names the elites {elites[:8]} of an ensemble of {model['num_nets']} networks.")
    model["num_elites"] = min(NUM_ELITES, model["num_nets"]) if elites is None else len(elites)
    ensemble = DynamicsEnsemble(**model)
    ensemble.network.load_state_dict(name_layers(layers.values()))
    bounds = _load_bounds(ensemble, tensors)
    if elites is None:
        error = _measure(ensemble, spaces, transitions)
        ensemble.set_elites(error)
        notes.append(
            f"The file names no elites; of its networks, {ensemble.elites.tolist()} have the smallest error on the dataset."
        )
    else:
        ensemble.elites.copy_(torch.tensor(elites))
    note_unused(notes, tensors, [*_names(layers), *bounds, *(name for name in tensors if "elite" in name)])
    return Product(DYNAMICS, ensemble.state_dict(), {"model": model}, notes)


def _names(layers: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    return [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]


def _find_elites(tree: Any) -> list[int] | None:
    """The members that stand under a name with 'elite' in it, if there is one."""
    for key, value in walk(tree):
        if isinstance(key, str) and "elite" in key:
            array = to_array(value)
            members = array.tolist() if array is not None else value
            if isinstance(members, (list, tuple)) and all(type(member) is int for member in members):
                return list(members)
    return None


def _load_bounds(ensemble: DynamicsEnsemble, tensors: dict[str, Tensor]) -> list[str]:
    """Load bounds of the log-variance, where the file has its own; returns the names of what was used."""
    used = []
    for name, tensor in tensors.items():
        for ours in ("max_log_var", "min_log_var"):
            if name.lower().replace("_", "").endswith(ours.replace("_", "")):
                bound = getattr(ensemble, ours).data
                bound.copy_(check_weights({name: tensor})[name].expand_as(bound))
                used.append(name)
    return used


def _measure(ensemble: DynamicsEnsemble, spaces: Spaces, transitions: Transitions) -> Tensor:
    """Each network's mean squared error [E] on transitions spread over the dataset."""
    rows = np.linspace(0, len(transitions.reward) - 1, MEASURED_ROWS).astype(np.int64)
    batch = spaces.transitions_to_policy(Transitions(*(column[rows] for column in transitions)), "cpu")
    with torch.no_grad():
        return ensemble.error_per_network(batch.observation, batch.action, ensemble.target(batch))
