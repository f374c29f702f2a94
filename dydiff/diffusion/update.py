"""The update of the diffusion model's weights: gradient repair, Adam and the moving average (SPEC section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dydiff.kernels import training_cpu
from dydiff.kernels.training_cpu import AdamCoefficients
from dydiff.kernels.triton_trial import why_triton_fails

BETAS, EPSILON = (0.9, 0.999), 1e-8
INFINITE_GRADIENT = 1e5  # what an infinite gradient becomes


class Update:
    """Adam on the weights and their moving average; NaN gradients count as 0, infinite ones as +-1e5.

    `copies` maps weights to bfloat16 copies whose gradients count in their place, and which follow them. This one is PyTorch's
    operators on any device; those below do the same in one pass, to rounding. The state is that of `torch.optim.Adam` in all of
    them, and a state of one continues in another.
    """

    def __init__(self, weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]):
        self.weights = weights
        self.averages = averages
        self.copies = copies
        self.adam = torch.optim.Adam(weights, betas=BETAS, eps=EPSILON, fused=True)

    def clear_gradients(self) -> None:
        for tensor in (*self.weights, *self.copies.values()):
            tensor.grad = None

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the backward passes and before `step`: hand the copies' gradients to the weights, and replace what is not finite.

        All of them at once, as one long tensor whose parts become the weights' gradients: a few operations instead of 300.
        """
        gradients = {weight: self.gradient_of(weight) for weight in self.weights}
        present = sort_by_alignment([weight for weight in self.weights if gradients[weight] is not None])
        for dtype in {gradients[weight].dtype for weight in present}:
            weights = [weight for weight in present if gradients[weight].dtype == dtype]
            flat = torch.cat([as_it_lies(gradients[weight]) for weight in weights]).float()
            torch.nan_to_num(flat, nan=0, posinf=INFINITE_GRADIENT, neginf=-INFINITE_GRADIENT, out=flat)
            for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
                weight.grad = part.as_strided(weight.shape, weight.stride())

    def step(self, lr: float, rate: float) -> None:
        """Move the weights by one step of Adam with learning rate `lr`, then the average by `rate` of its distance to them."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self._move(lr, rate)

    @torch.no_grad()
    def _move(self, lr: float, rate: float) -> None:
        self.adam.step()
        torch._foreach_lerp_(self.averages, self.weights, rate)
        self._refresh_copies()

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    def gradient_of(self, weight: nn.Parameter) -> Tensor | None:
        """What the backward passes left: in bfloat16 if there is a copy."""
        return self.copies.get(weight, weight).grad

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the weights themselves must have been loaded before."""
        self.adam.load_state_dict(state)
        for weight, own in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # what comes from a file is contiguous, the weight may be laid out otherwise
                own[name] = torch.empty_like(weight, requires_grad=False).copy_(own[name])
        self._refresh_copies()


class OnePassUpdate(Update):
    """What the updates in one pass share: their own moments, and one count of steps, since all weights move at every step."""

    def __init__(self, weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]):
        super().__init__(weights, averages, copies)
        self.steps = 0
        self.moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}  # first and second, laid out like the weight

    def _next_coefficients(self, lr: float, rate: float) -> AdamCoefficients:
        self.steps += 1
        return AdamCoefficients(lr, *BETAS, EPSILON, self.steps, rate, INFINITE_GRADIENT)

    def state_dict(self) -> dict[str, Any]:
        for weight in self.weights:
            first, second = self.moments[weight]
            self.adam.state[weight] = {"step": torch.tensor(float(self.steps)), "exp_avg": first, "exp_avg_sq": second}
        state = super().state_dict()
        self.adam.state.clear()  # a copy: the moments are here
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for weight, loaded in self.adam.state.items():
            first, second = self.moments[weight]
            first.copy_(loaded["exp_avg"])
            second.copy_(loaded["exp_avg_sq"])
            self.steps = int(loaded["step"])
        self.adam.state.clear()


class CompiledUpdate(OnePassUpdate):
    """On a CPU: one compiled pass over each weight and all that belongs to it (kernels/training_cpu.py)."""

    def __init__(self, weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]):
        super().__init__(weights, averages, copies)
        self.moments = {weight: tuple(torch.zeros_like(weight, requires_grad=False) for _ in range(2)) for weight in weights}

    def collect_gradients(self) -> None:
        """Nothing to do: the pass reads them where they are, and replaces what is not finite."""

    def _move(self, lr: float, rate: float) -> None:
        coefficients = self._next_coefficients(lr, rate)
        for weight, average in zip(self.weights, self.averages, strict=True):
            gradient, copy = self.gradient_of(weight), self.copies.get(weight)
            training_cpu.adam_average(weight, *self.moments[weight], average, gradient, copy, coefficients)


def make_update(weights: list[nn.Parameter], averages: list[Tensor], copies: dict[nn.Parameter, Tensor]) -> Update:
    """The fastest update that works on the device of the weights."""
    kinds = {weight.device.type for weight in weights}
    if kinds == {"cpu"} and not training_cpu.why_unavailable():
        return CompiledUpdate(weights, averages, copies)
    if kinds == {"cuda"} and not why_triton_fails(weights[0].device):
        from dydiff.diffusion.kernel_update import KernelUpdate  # imports triton, which only a GPU needs

        return KernelUpdate(weights, averages, copies)
    return Update(weights, averages, copies)


def sort_by_alignment(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those of odd length last: in a row all others begin at a multiple of 16 bytes then, which everything reads faster."""
    return sorted(weights, key=lambda weight: weight.numel() % 8 != 0)


def as_it_lies(gradient: Tensor) -> Tensor:
    """All elements in the order of memory, which is the weight's: autograd lays a gradient out like its weight."""
    return gradient.as_strided((gradient.numel(),), (1,))
