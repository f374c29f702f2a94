"""A trial on the device at hand: which way to evaluate a network gives what the trusted way gives, and sooner?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dydiff.capture import CapturedGraph, captures, warm_up

Evaluate = Callable[[Tensor, float], Tensor]  # model input [B, H, D], sigma -> the network's output [B, H, D]

LEVELS = (0.01, 0.5, 20.0)  # of noise, from clean trajectories to noise alone
LIMIT = 2e-2  # of |candidate - trusted| / |trusted|
REPEATS = 20  # calls that must agree to the last bit
CALLS = 10  # that are timed


@torch.no_grad()
def find_fault(candidate: Evaluate, trusted: Evaluate, shape: tuple[int, int, int], device: torch.device) -> str:
    """Why `candidate` must not take `trusted`'s place on a device, for trajectories of `shape` (B, H, D); empty if it may.

    It must be close to it at every level of noise, and repeat itself exactly: a race between threads may strike rarely. Inputs
    are random and of unit scale, as a preconditioned network sees them. What calls raise is passed on.
    """
    model_input = _make_input(shape, device)
    for sigma in LEVELS:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = trusted(model_input, sigma)
        found = candidate(model_input, sigma)
        error = ((found - expected).norm() / expected.norm()).item()
        if not error <= LIMIT:  # NaN is a fault
            return f"at noise level {sigma} its error is {error:.2g}, and {LIMIT} is allowed"
    if not all(torch.equal(candidate(model_input, sigma), found) for _ in range(REPEATS)):
        return "its results change from call to call"
    return ""


@torch.no_grad()
def time_evaluations(evaluate: Evaluate, shape: tuple[int, int, int], device: torch.device) -> float:
    """Seconds of an evaluation for trajectories of `shape` (B, H, D), as a rollout runs it."""
    return _time_calls(partial(evaluate, _make_input(shape, device), LEVELS[0]), device) / CALLS


def _make_input(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _time_calls(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of some calls in a row; on a GPU replays of a graph, as in a rollout, whose launches cost nothing."""
    run = call  # which has the input that a graph reads
    if captures(device):
        warm_up(call, device)
        run = CapturedGraph(call, device).replay
    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
