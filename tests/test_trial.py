"""The trial that decides whether `auto` takes the fused kernels on a GPU: what it must refuse, and what it must let through."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from small_denoiser import DATA_DIM, HORIZON, make_denoiser

from dydiff import backends
from dydiff.backends import ON_GPU, choose_backend, prepare_denoiser
from dydiff.diffusion.edm import Denoiser
from dydiff.errors import DydiffError
from dydiff.networks.unet import UNet
from dydiff.trial import LEVELS, LIMIT, REPEATS, find_fault, time_evaluations

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


class Candidates:
    """Stand-ins for the fused backends: what they do to the network's output, and the seconds that the stopwatch shows.

    A backend without a change does not work.
    """

    def __init__(self, monkeypatch, changes: dict, seconds: dict[str, float]):
        self.denoiser = Denoiser(UNet(DATA_DIM, HORIZON, 8, (1, 2)), 2).requires_grad_(False)
        self.batches: list[int] = []
        self.changes, self.seconds = changes, seconds
        monkeypatch.setattr(backends, "prepare_denoiser", self.prepare)
        monkeypatch.setattr(backends, "time_evaluations", self.time)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def prepare(self, denoiser, name):
        change = self.changes.get(name, broken)
        evaluate = SimpleNamespace(evaluate=lambda x, sigma: change(denoiser.evaluate(x, sigma)))
        self.seconds[evaluate.evaluate] = self.seconds.get(name)
        return evaluate

    def time(self, evaluate, shape, device):
        self.batches.append(shape[0])
        seconds = self.seconds.get(evaluate, self.seconds["reference"])
        return seconds(shape[0]) if callable(seconds) else seconds

    def choose(self) -> str:
        return backends._race_backends(self.denoiser, CPU, 4, "reference")


def same(y):
    return y


def wrong(y):
    return 2 * y


def broken(y):
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize(
    "ways, times, chosen",  # of cudnn, triton-a, -b, -c
    [((same, same, same, same), (2, 2, 1, 2), "triton-b"), ((same, same, same, same), (2, 1, 2, 2), "triton-a"),
     ((same, same, same, same), (2, 2, 2, 1), "triton-c"), ((same, same, same, same), (1, 2, 2, 2), "cudnn"),
     ((broken, same, wrong, wrong), (1, 2, 1, 1), "triton-a"), ((same, broken, wrong, same), (2, 1, 1, 2.5), "cudnn")],
)  # fmt: skip
def test_the_fastest_of_those_that_are_right(monkeypatch, capsys, ways, times, chosen):
    changes, seconds = dict(zip(ON_GPU, ways, strict=True)), dict(zip(ON_GPU, times, strict=True))
    candidates = Candidates(monkeypatch, changes, seconds | {"reference": 3})
    assert candidates.choose() == chosen
    told = capsys.readouterr().err
    assert f"Rollouts take {chosen}. An evaluation of 4 starts took reference 3000.00 ms, " in told
    for name, way in changes.items():
        assert (f"{name} cannot be used here: " in told) == (way is not same)


def test_float32_where_nothing_is_better_with_the_reasons(monkeypatch):
    candidates = Candidates(monkeypatch, {"triton-a": broken, "triton-b": wrong}, {"triton-a": 1, "triton-b": 1, "reference": 3})
    reasons = "triton-a cannot .* RuntimeError: no such instruction.*triton-b cannot .* its error is 1,"
    with pytest.warns(RuntimeWarning, match=reasons):
        assert candidates.choose() == "reference"
    candidates = Candidates(monkeypatch, {"triton-a": same, "triton-b": same}, {"triton-a": 4, "triton-b": 5, "reference": 3})
    with pytest.warns(RuntimeWarning, match="of 4 starts took reference 3000.00 ms, triton-a 4000.00 ms"):
        assert candidates.choose() == "reference"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def reference(batch):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 3

    candidates = Candidates(
        monkeypatch, {"triton-a": same, "triton-b": same}, {"triton-a": 1, "triton-b": 2, "reference": reference}
    )
    assert candidates.choose() == "triton-a" and candidates.batches == [4, 2, 2, 2]


def test_a_gpu_that_a_kernel_ruined_ends_the_run(monkeypatch):
    """The message recommends the best of those that were tried before."""

    def synchronize(device):
        raise RuntimeError("an illegal memory access was encountered")

    for seconds, remedy in ((1, "cudnn"), (4, "reference")):
        candidates = Candidates(monkeypatch, {"cudnn": same}, {"cudnn": seconds, "reference": 3})
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(DydiffError, match=f"triton-a failed .*left cpu unusable .*no such instruction.*backend={remedy}"):
            candidates.choose()


def test_a_network_is_tried_once(monkeypatch):
    candidates = Candidates(monkeypatch, {"triton-a": same, "triton-b": same}, {"triton-a": 1, "triton-b": 2, "reference": 3})
    monkeypatch.setattr(backends.edm, "available_backend", lambda device, dtype: "reference")
    race, raced = backends._race_backends, []

    def watched(denoiser, device, batch, plain):
        raced.append(batch)
        return race(denoiser, CPU, batch, plain)

    monkeypatch.setattr(backends, "_race_backends", watched)
    for batch in (4, 4, 6, 5000, 2048):
        assert choose_backend(candidates.denoiser, torch.device("cuda:0"), batch) == "triton-a"
    assert raced == [4, 6, 2048]
    assert choose_backend(copy.deepcopy(candidates.denoiser), torch.device("cuda:0"), 4) == "triton-a" and len(raced) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the trial of the fused kernels themselves needs a GPU")
def test_auto_takes_fused_kernels_on_a_gpu():
    denoiser = Denoiser(UNet(14, 100), 11).cuda().requires_grad_(False)
    assert choose_backend(denoiser, torch.device("cuda"), 64) in ON_GPU
    assert prepare_denoiser(denoiser, "auto", 64).evaluate(torch.randn(2, 100, 14, device="cuda"), 1.0).isfinite().all()
