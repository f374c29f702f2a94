"""A small denoiser with random weights and random inputs for it, which the tests of the diffusion model share."""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.diffusion.edm import Denoiser
from dydiff.networks import build_trajectory_network

HORIZON, OBSERVATION_DIM, ACTION_DIM = 4, 2, 1
DATA_DIM = OBSERVATION_DIM + ACTION_DIM


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def make_denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(build_trajectory_network("MLP_RL", DATA_DIM, HORIZON, dim=16), OBSERVATION_DIM)
