"""The trial that decides whether `auto` takes the fused kernels on a GPU: what it must refuse, and what it must let through."""

from __future__ import annotations

import time

import pytest
import torch
from small_denoiser import DATA_DIM, HORIZON, make_denoiser

from dydiff.backends import choose_backend, prepare_denoiser
from dydiff.diffusion.edm import Denoiser
from dydiff.networks.unet import UNet
from dydiff.trial import LEVELS, LIMIT, find_fault

SHAPE = 3, HORIZON, DATA_DIM


def try_out(change, pause: float = 0.0, trusted_pause: float = 0.0) -> str:
    """The trial of a network whose output `change(output, sigma)` alters, each call taking so much longer."""
    evaluate = make_denoiser().requires_grad_(False).evaluate

    def candidate(x, sigma):
        time.sleep(pause)
        return change(evaluate(x, sigma), sigma)

    def trusted(x, sigma):
        time.sleep(trusted_pause)
        return evaluate(x, sigma)

    return find_fault(candidate, trusted, SHAPE, torch.device("cpu"))


def test_right_and_faster_passes():
    assert try_out(lambda y, sigma: y * (1 + LIMIT / 2), trusted_pause=0.005) == ""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("factor", [1 + 2 * LIMIT, float("nan"), 0.0])
def test_an_error_at_any_noise_level_is_named(level, factor):
    fault = try_out(lambda y, sigma: y * factor if sigma == level else y, trusted_pause=0.005)
    assert f"noise level {level} " in fault and "allowed" in fault


def test_one_infinite_element_is_found():
    def poison(y, sigma):
        y = y.clone()
        y[-1, -1, -1] = torch.inf
        return y

    assert "error is inf" in try_out(poison, trusted_pause=0.005)


def test_slower_than_float32_is_refused():
    assert "ms in float32" in try_out(lambda y, sigma: y, pause=0.005)


def test_what_a_kernel_raises_is_passed_on():
    def break_down(y, sigma):
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        try_out(break_down)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the trial of the fused kernels themselves needs a GPU")
def test_auto_takes_the_fused_kernels_on_a_gpu():
    denoiser = Denoiser(UNet(14, 100), 11).cuda().requires_grad_(False)
    assert choose_backend(denoiser, torch.device("cuda")) == "triton-a"
    assert prepare_denoiser(denoiser, "auto").evaluate(torch.randn(2, 100, 14, device="cuda"), 1.0).isfinite().all()
