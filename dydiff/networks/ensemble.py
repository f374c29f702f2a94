"""Several MLPs of one shape evaluated together, one batched matrix product a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.networks.mlp import find_activation


class EnsembleLayer(nn.Module):
    """`num_members` linear maps at once: `[E, B, in]` -> `[E, B, out]`, weight `[E, in, out]`, bias `[E, 1, out]`."""

    def __init__(self, num_members: int, input_dim: int, output_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        bound = input_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_members, input_dim, output_dim))
        self.bias = nn.Parameter(torch.empty(num_members, 1, output_dim))
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        if members is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class EnsembleMLP(nn.Module):
    """`num_members` MLPs of one shape with names `layers.i.weight [E, in, out]` and `layers.i.bias [E, 1, out]`.

    Initialised like `MLP`. Raises DydiffError for an unknown activation.
    """

    def __init__(
        self,
        num_members: int,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.num_members = num_members
        self.activation = find_activation(activation)
        dims = [input_dim, *hidden_dims, output_dim]
        self.layers = nn.ModuleList(
            EnsembleLayer(num_members, fan_in, fan_out, generator) for fan_in, fan_out in zip(dims[:-1], dims[1:], strict=True)
        )

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        """Evaluate every member, or the `K` members whose indices `members [K]` (long, on the device) holds.

        Shapes: `x [B, in]` shared by all, or `[E or K, B, in]` -> `[E or K, B, out]`.
        """
        if x.dim() == 2:
            x = x.expand(self.num_members if members is None else len(members), -1, -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x, members))
        return self.layers[-1](x, members)

    def forward_member(self, member: int, x: Tensor) -> Tensor:
        """Evaluate one member alone: `[..., in]` -> `[..., out]`."""
        for layer in self.layers[:-1]:
            x = self.activation(F.linear(x, layer.weight[member].mT, layer.bias[member, 0]))
        return F.linear(x, self.layers[-1].weight[member].mT, self.layers[-1].bias[member, 0])

    def member_state_dict(self, member: int) -> dict[str, Tensor]:
        """One member under the names and shapes of an equal `MLP` (weights `[out, in]`): copies, detached."""
        tree = {}
        for i, layer in enumerate(self.layers):
            tree[f"layers.{i}.weight"] = layer.weight[member].detach().mT.clone()
            tree[f"layers.{i}.bias"] = layer.bias[member, 0].detach().clone()
        return tree

    @torch.no_grad()
    def load_member_state_dict(self, member: int, tree: Mapping[str, Tensor]) -> None:
        """Copy the weights of an equal `MLP` into one member; every name must be there."""
        for i, layer in enumerate(self.layers):
            layer.weight[member].copy_(tree[f"layers.{i}.weight"].mT)
            layer.bias[member, 0].copy_(tree[f"layers.{i}.bias"])
