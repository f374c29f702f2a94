"""A trial on the device at hand: does one way to evaluate a network give what the trusted way gives, and sooner?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dydiff.capture import CapturedGraph, warm_up

Evaluate = Callable[[Tensor, float], Tensor]  # model input [B, H, D], sigma -> the network's output [B, H, D]

LEVELS = (0.01, 0.5, 20.0)  # of noise, from clean trajectories to noise alone
LIMIT = 2e-2  # of |candidate - trusted| / |trusted|
CALLS = 10  # that are timed


@torch.no_grad()
def find_fault(candidate: Evaluate, trusted: Evaluate, shape: tuple[int, int, int], device: torch.device) -> str:
    """Why `candidate` should not take `trusted`'s place on a device, for trajectories of `shape` (B, H, D); empty if it should.

    Inputs are random and of unit scale, as a preconditioned network sees them. What calls raise is passed on.
    """
    model_input = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    for sigma in LEVELS:
        expected = trusted(model_input, sigma)
        error = ((candidate(model_input, sigma) - expected).norm() / expected.norm()).item()
        if not error <= LIMIT:  # NaN is a fault
            return f"at noise level {sigma} its error is {error:.2g}, and {LIMIT} is allowed"
    ours, theirs = (_time_calls(partial(evaluate, model_input, LEVELS[0]), device) for evaluate in (candidate, trusted))
    return "" if ours < theirs else f"{CALLS} evaluations take {1e3 * ours:.1f} ms, and {1e3 * theirs:.1f} ms in float32"


def _time_calls(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of some calls in a row; on a GPU replays of a graph, as in a rollout, whose launches cost nothing."""
    if device.type == "cuda":
        warm_up(call, device)
        call = CapturedGraph(call, device).replay
        call()
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
