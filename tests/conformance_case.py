"""A recorded case: the file, and what of dydiff is made of its settings and arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydiff.agents.diffusion_actor import PUBLISHED_NAMES
from dydiff.data import Transitions, dataset_from_arrays
from dydiff.diffusion.edm import Denoiser
from dydiff.dynamics import DynamicsEnsemble
from dydiff.networks.published import rename_unet
from dydiff.networks.unet import UNet
from dydiff.replay import split_rows

FIELDS = dict(zip(Transitions._fields, ("observations", "actions", "rewards", "next_observations", "terminals"), strict=True))


class Case:
    """One file: `case[name]` is an array as a tensor, `case.meta` the settings."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.device = device
        with np.load(path, allow_pickle=False) as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {name: file[name] for name in file.files if name != "meta"}

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name], device=self.device)

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.arrays else None

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Every array below a prefix such as `w/`, by the rest of its name."""
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}


def read_denoiser(case: Case, weights: str = "w/") -> Denoiser:
    meta = case.meta
    network = UNet(meta["data_dim"], meta["horizon"], meta["dim"], meta["dim_mults"], meta["kernel_size"])
    network.load_state_dict(rename_unet(case.under(weights)))
    return Denoiser(network, meta["observation_dim"], meta["sigma_data"]).eval().requires_grad_(False).to(case.device)


def read_dynamics(case: Case, settings: dict, weights: str, bounds: dict) -> DynamicsEnsemble:
    observation_dim = case.meta["observation_dim"]
    layers = len(settings["hidden"]) + 1
    model = DynamicsEnsemble(
        observation_dim,
        case.under(weights)["layers.0.weight"].shape[1] - observation_dim,
        settings["hidden"],
        settings["num_nets"],
        num_elites=1,
        weight_decay=[0.0] * layers,
        **bounds,
    )
    model.network.load_state_dict(case.under(weights))
    return model.to(case.device)


def read_sampler(meta: dict) -> dict[str, float]:
    names = ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")
    return {name.lower(): meta[name] for name in names}


def replay(*draws: Tensor):
    """A noise source that hands out recorded numbers in the order in which they were drawn."""
    recorded = iter(draws)
    return lambda shape: next(recorded).reshape(shape)


def read_batch(case: Case, step: int | None = None) -> Transitions:
    fields = [case["batch/" + name] if step is None else case["batch/" + name][step] for name in FIELDS.values()]
    return split_rows(torch.cat(fields, dim=1), [field.shape[1] for field in fields])  # as they come from replay


def read_dataset(case: Case, prefix: str):
    """The case's arrays as a dataset; windows cases have no rewards, which they do not need."""
    arrays = {name: value.numpy() for name, value in case.under(prefix).items()}
    arrays.setdefault("rewards", np.zeros(len(arrays["observations"]), np.float32))
    return dataset_from_arrays(arrays, "conformance")


def rename_actor(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names of the diffusion actor's layers to ours."""
    renamed = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{PUBLISHED_NAMES[layer]}.{kind}"] = value
    return renamed
