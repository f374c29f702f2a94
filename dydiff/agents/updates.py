"""Parts of an update that several agents share: target networks and optimizers whose state keeps its storage."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def make_target(network: nn.Module) -> nn.Module:
    """A copy of `network` that takes no gradients."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def move_target(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move every weight of `target` by `rate` of its distance to `source`, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def make_adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """Fused Adam; on a GPU the step count and the learning rate live there too, as CUDA graphs need."""
    parameters = list(parameters)
    device = parameters[0].device
    if device.type == "cuda":
        return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), fused=True, capturable=True)
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Change the learning rate where it lives: a captured graph reads the tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, tree: dict) -> None:
    """Load an optimizer's state in the form of this device, so that a GPU's checkpoint continues on a CPU and back."""
    kept = [{key: group[key] for key in ("lr", "fused", "capturable")} for group in optimizer.param_groups]
    optimizer.load_state_dict(tree)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        loaded_lr = float(group["lr"])
        group.update(own)
        if isinstance(own["lr"], Tensor):
            own["lr"].fill_(loaded_lr)
        else:
            group["lr"] = loaded_lr


def descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor], max_norm: float | None = None
) -> Tensor | None:
    """One step down `loss` in `parameters` only: no other network gets a gradient. Returns the norm if clipped."""
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = None
    if max_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    return norm
