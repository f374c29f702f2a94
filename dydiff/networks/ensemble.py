"""Several MLPs of one shape evaluated together, one batched matrix product a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

# Up to so many inputs a sum that the compiler writes out and fuses with bias and activation takes less time than a matrix product.
FEW_INPUTS = 24


class EnsembleLayer(nn.Module):
    """The parameters of `num_members` linear maps: weight `[E, in, out]`, bias `[E, 1, out]`."""

    def __init__(self, num_members: int, input_dim: int, output_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        bound = input_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_members, input_dim, output_dim))
        self.bias = nn.Parameter(torch.empty(num_members, 1, output_dim))
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)


class EnsembleMLP(nn.Module):
    """`num_members` MLPs of one shape with names `layers.i.weight [E, in, out]` and `layers.i.bias [E, 1, out]`.

    Initialised like `MLP`.
    """

    def __init__(
        self,
        num_members: int,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.num_members = num_members
        self.activation = activation
        dims = [input_dim, *hidden_dims, output_dim]
        self.layers = nn.ModuleList(
            EnsembleLayer(num_members, fan_in, fan_out, generator) for fan_in, fan_out in zip(dims[:-1], dims[1:], strict=True)
        )

    def forward(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Evaluate every member, or the `K` or the one that `gather` took the `weights` of.

        Shapes: `x [B, in]` shared by all, or `[E or K, B, in]` -> `[E or K, B, out]`, and `[B, in]` -> `[B, out]` for one; where
        the weights are stacked over seeds (`dydiff.agents.stack`), everything has that dimension in front.
        """
        *hidden, last = weights or [(layer.weight, layer.bias) for layer in self.layers]
        if x.dim() < last[0].dim():
            x = x.unsqueeze(-3).expand(*last[0].shape[:-2], -1, -1)
        for weight, bias in hidden:
            x = self.activation(_apply_linear(x, weight, bias))
        return _apply_linear(x, *last)

    def gather(self, members: Tensor | int) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of one member, as views, or copies of those of the `K` in `members [K]` (long, on the device)."""
        return [(layer.weight[..., members, :, :], layer.bias[..., members, :, :]) for layer in self.layers]

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


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear maps `[*L, in, out]` with biases `[*L, 1, out]` of `x [*L, B, in]`."""
    if weight.shape[-1] == 1:  # a product with one column wastes a matrix multiplication, and cannot be fused with its neighbours
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    if is_compiling():  # the compiler adds the bias where it applies the activation
        narrow = weight.shape[-2] <= FEW_INPUTS and x.device.type == "cpu"
        return (_NarrowProduct.apply(x, weight) if narrow else x @ weight) + bias
    return torch.baddbmm(bias, x, weight) if weight.dim() == 3 else x @ weight + bias


class _NarrowProduct(torch.autograd.Function):
    """`x @ weight` as a sum over few inputs; left to itself, the compiler would write out the gradient of `weight` as well, whose
    sum over the batch is better a matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.unsqueeze(-1) * weight.unsqueeze(-3)).sum(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (gradient.unsqueeze(-2) * weight.unsqueeze(-3)).sum(-1), x.mT @ gradient
