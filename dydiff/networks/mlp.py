"""The plain multilayer perceptron behind critics, policies and one-step models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

# Up to so many outputs a sum that the compiler writes out and fuses with its neighbours takes half the time of a matrix product.
FEW_OUTPUTS = 16


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) (arXiv 1908.08681); on the CPU x q / (2 - q), q = s (2 - s), s = sigmoid(x): a third of the time."""
    if x.is_cuda:
        return F.mish(x)
    sigmoid = x.sigmoid()
    q = sigmoid * (2 - sigmoid)
    return x * q / (2 - q)


class MLP(nn.Module):
    """Linear layers with an activation between them: `[..., input_dim]` -> `[..., output_dim]`.

    Parameters are called `layers.i.weight [out, in]` and `layers.i.bias [out]`. Both start uniform in ±1/sqrt(fan-in)
    and are drawn from `generator` (a CPU generator; None takes torch's global one).

    Where the weights are stacked over S seeds (`dydiff.agents.stack`), it maps `[S, ..., input_dim]` or, shared by all seeds,
    `[B, input_dim]` to `[S, ..., output_dim]`.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.activation = activation
        dims = [input_dim, *hidden_dims, output_dim]
        # skip_init: nn.Linear would draw weights from the global generator only to have them overwritten here.
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, fan_in, fan_out) for fan_in, fan_out in zip(dims[:-1], dims[1:], strict=True)
        )
        for layer in self.layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = [(layer.weight, layer.bias) for layer in self.layers]
        if last[0].dim() == 3 and x.dim() == 2:
            x = x.expand(len(last[0]), -1, -1)
        for weight, bias in hidden:
            x = self.activation(_apply_linear(x, weight, bias))
        return _apply_linear(x, *last)


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map `[out, in]` with bias `[out]` of `x [..., in]`, or one for every seed of `x [S, ..., in]`."""
    if weight.dim() == 2:
        if len(weight) <= FEW_OUTPUTS and is_compiling() and x.device.type == "cpu":
            return (x.unsqueeze(-2) * weight).sum(-1) + bias
        return F.linear(x, weight, bias)
    rows = torch.baddbmm(bias.unsqueeze(1), x.flatten(1, -2), weight.mT)
    return rows.unflatten(1, x.shape[1:-1])
