"""The trial of a way to evaluate the network on a device: what it must refuse, and what it must let through."""

from __future__ import annotations

import time

import pytest
import torch
from small_denoiser import DATA_DIM, HORIZON, make_denoiser

from dydiff.backends.trial import LEVELS, LIMIT, REPEATS, find_fault, time_evaluations

CPU = torch.device("cpu")
SHAPE = 3, HORIZON, DATA_DIM


def try_out(change) -> str:
    """The trial of a network whose output `change(output, sigma)` alters."""
    evaluate = make_denoiser().requires_grad_(False).evaluate
    return find_fault(lambda x, sigma: change(evaluate(x, sigma), sigma), evaluate, SHAPE, CPU)


def test_right_passes():
    assert try_out(lambda y, sigma: y * (1 + LIMIT / 2)) == ""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("factor", [1 + 2 * LIMIT, float("nan"), 0.0])
def test_an_error_at_any_noise_level_is_named(level, factor):
    fault = try_out(lambda y, sigma: y * factor if sigma == level else y)
    assert f"noise level {level} " in fault and "allowed" in fault


def test_one_infinite_element_is_found():
    def poison(y, sigma):
        y = y.clone()
        y[-1, -1, -1] = torch.inf
        return y

    assert "error is inf" in try_out(poison)


def test_one_different_bit_in_one_of_many_calls_is_found():
    calls = []

    def stumble(y, sigma):
        calls.append(sigma)
        return y if len(calls) != REPEATS else torch.nextafter(y, torch.full_like(y, torch.inf))

    assert try_out(stumble) == "its results change from call to call"


def test_evaluations_are_timed():
    assert 0.004 < time_evaluations(lambda x, sigma: time.sleep(0.005) or x, SHAPE, CPU) < 0.1


def test_what_a_kernel_raises_is_passed_on():
    def break_down(y, sigma):
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        try_out(break_down)
