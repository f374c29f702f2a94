"""Parts of an update that several agents share: target networks, and an optimizer that is nothing but device work."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def make_target(network: nn.Module) -> nn.Module:
    """A copy of `network` that takes no gradients."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def move_target(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move every weight of `target` by `rate` of its distance to `source`, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


class Adam:
    """Adam (arXiv 1412.6980) as one fused kernel a step; all state is on the device and keeps its storage.

    It computes what `torch.optim.Adam(fused=True)` does, whose bookkeeping costs tiny networks more than the kernel does, and
    keeps an update from being compiled as a whole.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.lr = torch.tensor(lr, device=device)
        self.step = torch.zeros((), device=device)
        self.mean = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.square = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.stacked = False  # whether the parameters' first dimension is that of seeds

    def descend(self, loss: Tensor, max_norm: float | None = None) -> Tensor | None:
        """One step down the sum of `loss` in these parameters only: no other network gets a gradient.

        With `max_norm` the gradient of all parameters together (of one seed, where they are stacked) is scaled down to that norm
        where it is longer; returns the norm before, `[]` or `[S]`.
        """
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        with torch.no_grad():
            norm = divisor = None
            if max_norm is not None and (self.stacked or is_compiling()):
                norms = [torch.linalg.vector_norm(each.flatten(int(self.stacked)), dim=-1) for each in gradients]
                norm = torch.stack(norms).norm(dim=0)
                scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
                for each in gradients:
                    each.mul_(scale.view(*scale.shape, *[1] * (each.dim() - scale.dim())))
            elif max_norm is not None:  # the same in few operations
                norm = torch.stack(torch._foreach_norm(gradients)).norm()
                divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
            self._step_down(gradients, divisor)
        return norm

    def _step_down(self, gradients: Sequence[Tensor], divisor: Tensor | None) -> None:
        self.step += 1
        if not is_compiling():
            gradients = [each.contiguous() for each in gradients]  # the kernel goes by memory, not by strides
            steps = [self.step] * len(gradients)
            hyper = {"beta1": BETA1, "beta2": BETA2, "weight_decay": 0.0, "eps": EPS, "amsgrad": False, "maximize": False}
            hyper |= {"lr": self.lr, "grad_scale": divisor}
            torch._fused_adam_(self.parameters, gradients, self.mean, self.square, [], steps, **hyper)
            return
        # The kernel cannot be traced; from the formula the compiler makes one of its own.
        torch._foreach_lerp_(self.mean, gradients, 1 - BETA1)
        torch._foreach_mul_(self.square, BETA2)
        torch._foreach_addcmul_(self.square, gradients, gradients, 1 - BETA2)
        deviation = torch._foreach_sqrt(self.square)
        torch._foreach_div_(deviation, self._correct_bias(BETA2).sqrt())
        torch._foreach_add_(deviation, EPS)
        change = torch._foreach_div(self.mean, deviation)
        torch._foreach_mul_(change, -self.lr / self._correct_bias(BETA1))
        torch._foreach_add_(self.parameters, change)

    def _correct_bias(self, beta: float) -> Tensor:
        """1 - beta^step, as an exponential: the compiler computes it once, but a power anew for every weight."""
        return (1 - (self.step.double() * math.log(beta)).exp()).float()

    def state_dict(self) -> dict:
        """Learning rate, step count and moments (references, not copies)."""
        return {"lr": self.lr, "step": self.step, "mean": self.mean, "square": self.square}

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken, on this or another device."""
        for name, mine in self.state_dict().items():
            pairs = [(mine, tree[name])] if isinstance(mine, Tensor) else zip(mine, tree[name], strict=True)
            for tensor, loaded in pairs:
                tensor.copy_(loaded)


def store_parts(agent: object) -> dict:
    """The states of an agent's networks and optimizers by the names of its attributes (references, not copies)."""
    return {name: part.state_dict() for name, part in _parts(agent)}


def restore_parts(agent: object, tree: dict) -> None:
    """The inverse of `store_parts`: an agent's networks and optimizers take the states, and keep their storage."""
    for name, part in _parts(agent):
        part.load_state_dict(tree[name])


def _parts(agent: object) -> list[tuple[str, nn.Module | Adam]]:
    return [(name, part) for name, part in vars(agent).items() if isinstance(part, nn.Module | Adam)]
