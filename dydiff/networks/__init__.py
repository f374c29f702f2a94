"""Neural networks: the three trajectory networks behind one builder, and the MLPs, policies and ensembles around them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dydiff.errors import DydiffError
from dydiff.networks.mlp_rl import TrajectoryMLP
from dydiff.networks.transformer import Transformer
from dydiff.networks.unet import UNet

TRAJECTORY_NETWORKS = ("UNet_RL", "Transformer_RL", "MLP_RL")


def build_trajectory_network(
    kind: str, data_dim: int, horizon: int, dim: int | None = None, dim_mults: Sequence[int] = (1, 4, 8), kernel_size: int = 5
) -> nn.Module:
    """Build the raw network F(x [B, H, D], noise_label [B]) by the name that `--rl_model_type` takes.

    `dim` is the base width (None: the network's default of 128, 768 or 1024); `dim_mults` and `kernel_size` are UNet_RL's.

    Raises:
        DydiffError: unknown name, or sizes that the network cannot take.
    """
    width = {} if dim is None else {"dim" if kind == "UNet_RL" else "width": dim}
    if kind == "UNet_RL":
        return UNet(data_dim, horizon, dim_mults=dim_mults, kernel_size=kernel_size, **width)
    if kind == "Transformer_RL":
        return Transformer(data_dim, horizon, **width)
    if kind == "MLP_RL":
        return TrajectoryMLP(data_dim, horizon, **width)
    raise DydiffError(f"--rl_model_type '{kind}' is unknown; choose one of {', '.join(TRAJECTORY_NETWORKS)}.")
