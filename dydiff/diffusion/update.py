"""The update of the diffusion model's weights: gradient repair, Adam and the moving average (SPEC section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dydiff.kernels import training_cpu

BETAS, EPSILON = (0.9, 0.999), 1e-8
INFINITE_GRADIENT = 1e5  # what an infinite gradient becomes


class Update:
    """Adam on the weights and their moving average; NaN gradients count as 0, infinite ones as +-1e5.

    `copies` maps weights to bfloat16 copies whose gradients count in their place, and which follow them. On a CPU the compiled
    pass does everything (kernels/training_cpu.py); otherwise PyTorch does, operator by operator, with the same results to
    rounding. The state is that of `torch.optim.Adam` in both cases.
    """

    def __init__(self, weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]):
        self.weights = weights
        self.averages = averages
        self.copies = copies
        self.adam = torch.optim.Adam(weights, betas=BETAS, eps=EPSILON, fused=True)
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
        self.in_one_pass = on_cpu and not training_cpu.why_unavailable()

    def clear_gradients(self) -> None:
        for tensor in (*self.weights, *self.copies.values()):
            tensor.grad = None

    @torch.no_grad()
    def repair_gradients(self) -> None:
        """Hand the copies' gradients to the weights and replace what is not finite; the compiled pass does that by itself.

        All of them at once, as one long tensor whose parts become the weights' gradients: a few operations instead of 300.
        """
        if self.in_one_pass:
            return
        gradients = {weight: self.copies.get(weight, weight).grad for weight in self.weights}
        # Autograd lays a gradient out like its weight, so what lies in memory is one row; those of odd length come last, since
        # optimizers read what begins at a multiple of 16 bytes faster.
        present = sorted((weight for weight in self.weights if gradients[weight] is not None), key=lambda one: one.numel() % 4 != 0)
        for dtype in {gradients[weight].dtype for weight in present}:
            weights = [weight for weight in present if gradients[weight].dtype == dtype]
            flat = torch.cat([gradients[weight].as_strided((weight.numel(),), (1,)) for weight in weights]).float()
            torch.nan_to_num(flat, nan=0, posinf=INFINITE_GRADIENT, neginf=-INFINITE_GRADIENT, out=flat)
            for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
                weight.grad = part.as_strided(weight.shape, weight.stride())

    def step(self, lr: float, rate: float) -> None:
        """Move the weights by one step of Adam with learning rate `lr`, then the average by `rate` of its distance to them."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        if self.in_one_pass:
            self._step_in_one_pass(lr, rate)
        else:
            self.adam.step()
            self.average(rate)
            self._refresh_copies()

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """Move the average by `rate` of its distance to the weights."""
        torch._foreach_lerp_(self.averages, self.weights, rate)

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    def _step_in_one_pass(self, lr: float, rate: float) -> None:
        states = [self._state_of(weight) for weight in self.weights]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        # All weights are updated at every step, so their counts are one.
        coefficients = training_cpu.AdamCoefficients(lr, *BETAS, EPSILON, int(steps[0]), rate, INFINITE_GRADIENT)
        for weight, state, average in zip(self.weights, states, self.averages, strict=True):
            copy = self.copies.get(weight)
            gradient = weight.grad if copy is None else copy.grad
            training_cpu.adam_average(weight, state["exp_avg"], state["exp_avg_sq"], average, gradient, copy, coefficients)

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """Adam's state of a weight, as Adam itself would begin it."""
        state = self.adam.state[weight]
        if not state:
            zeros = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state.update(step=torch.zeros(()), exp_avg=zeros, exp_avg_sq=zeros.clone(memory_format=torch.preserve_format))
        return state

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the weights themselves must have been loaded before."""
        self.adam.load_state_dict(state)
        for weight, own in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # what comes from a file is contiguous, the weight may be laid out otherwise
                own[name] = torch.empty_like(weight, requires_grad=False).copy_(own[name])
        self._refresh_copies()
