"""What `auto` stands for on a GPU: the fastest backend that passes a trial, whatever the others do to the process of theirs."""

from __future__ import annotations

import copy
import os
import time
from types import SimpleNamespace

import pytest
import torch
from small_denoiser import DATA_DIM, HORIZON, OBSERVATION_DIM

from dydiff.backends import ON_GPU
from dydiff.backends import choice as backend_choice
from dydiff.backends.choice import choose_backend, prepare_denoiser
from dydiff.child import Child
from dydiff.diffusion.edm import Denoiser
from dydiff.errors import DydiffError
from dydiff.networks.unet import UNet

CPU = torch.device("cpu")


def make_denoiser() -> Denoiser:
    return Denoiser(UNet(DATA_DIM, HORIZON, 8, (1, 2)), OBSERVATION_DIM).requires_grad_(False)


class Candidates:
    """Stand-ins for the fused backends: what they do to the network's output, and the seconds that the stopwatch shows.

    A backend without a change does not work. All are tried in this process, unless they shall be tried `apart`.
    """

    def __init__(self, monkeypatch, changes: dict, seconds: dict[str, float], apart: bool = False):
        self.denoiser = make_denoiser()
        self.batches: list[int] = []
        self.changes, self.seconds = changes, seconds
        if not apart:
            monkeypatch.setattr(backend_choice, "_try_apart", backend_choice._try_here)
        monkeypatch.setattr(backend_choice, "apply_backend", self.apply)
        monkeypatch.setattr(backend_choice, "time_evaluations", self.time)

    def apply(self, denoiser, name):
        change = self.changes.get(name, broken)
        evaluate = SimpleNamespace(evaluate=lambda x, sigma: change(denoiser.evaluate(x, sigma)))
        self.seconds[evaluate.evaluate] = self.seconds.get(name)
        return evaluate

    def time(self, evaluate, shape, device):
        self.batches.append(shape[0])
        seconds = self.seconds.get(evaluate, self.seconds["reference"])
        return seconds(shape[0]) if callable(seconds) else seconds

    def choose(self) -> str:
        return backend_choice.race(self.denoiser, CPU, 4, "reference", ON_GPU)


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


def test_a_network_is_tried_once(monkeypatch):
    candidates = Candidates(monkeypatch, {"triton-a": same, "triton-b": same}, {"triton-a": 1, "triton-b": 2, "reference": 3})
    monkeypatch.setattr(backend_choice.edm, "available_backend", lambda device, dtype: "reference")
    race, raced = backend_choice.race, []

    def watched(denoiser, device, batch, plain, names):
        raced.append(batch)
        return race(denoiser, CPU, batch, plain, names)

    monkeypatch.setattr(backend_choice, "race", watched)
    for batch in (4, 4, 6, 5000, 2048):
        assert choose_backend(candidates.denoiser, torch.device("cuda:0"), batch) == "triton-a"
    assert raced == [4, 6, 2048]
    assert choose_backend(copy.deepcopy(candidates.denoiser), torch.device("cuda:0"), 4) == "triton-a" and len(raced) == 4


# Processes


@pytest.fixture
def in_children(monkeypatch, tmp_path):
    """Replaces backends in the processes of trials, by the source of `way(denoiser, name)`; what takes two seconds hangs."""

    class Impatient(Child):
        def receive(self, patience=None):
            message = super().receive(patience if self.starting else 2.0)
            self.starting = False
            return message

        starting = True

    def replace(source: str) -> None:
        monkeypatch.setattr(backend_choice, "Child", Impatient)
        lines = ["import os, signal, time, torch, dydiff.backends", source, "dydiff.backends.apply_backend = way"]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path).strip(os.pathsep))

    return replace


# Beside these, `triton-c` is the network itself, and so as fast as float32; `cudnn` returns what it was asked for first.
WAYS = """
def way(denoiser, name):
    if name == "{crashing}":
        {crash}
    if name == "{hanging}":
        {hang}
    class Denoiser:
        def evaluate(self, x, sigma):
            if name == "cudnn":
                if sigma not in kept:
                    kept[sigma] = denoiser.evaluate(x, sigma)
                return kept[sigma].clone()
            return denoiser.evaluate(x, sigma)
    return Denoiser()
kept = {{}}
"""


def test_crashes_and_hangs_cost_a_process_of_the_trial_alone(in_children, capfd):
    ways = {"crashing": "triton-a", "crash": "os.kill(os.getpid(), signal.SIGSEGV)"}
    in_children(WAYS.format(**ways, hanging="triton-b", hang="time.sleep(1000)"))
    assert backend_choice.race(make_denoiser(), CPU, 3, "reference", ON_GPU) == "cudnn"
    told = capfd.readouterr().err
    assert "triton-a cannot be used here: in its trial, its process ended by SIGSEGV" in told
    assert "triton-b cannot be used here: in its trial, it took more than" in told
    assert "triton-c cannot" not in told and " triton-c " in told


def test_a_trial_that_hangs_ends_with_its_parent(in_children, monkeypatch, tmp_path):
    in_children(f"def way(denoiser, name):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(1000)")
    children = []
    monkeypatch.setattr(backend_choice, "Child", lambda module: children.append(Child(module)) or children[-1])
    trial = backend_choice._try_apart(make_denoiser(), (3, HORIZON, DATA_DIM), CPU, ON_GPU)
    assert next(trial).seconds is None
    (child,) = children
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    child._connection.close()  # what the death of this process would do
    assert child.process.wait(10) == 1


def test_the_process_of_a_trial_has_the_networks_own_weights(in_children):
    """With any others the float32 network, which stands in for all backends here, would not be what this process computes."""
    denoiser = make_denoiser()
    x = torch.randn(3, HORIZON, DATA_DIM, generator=torch.Generator().manual_seed(0))
    expected = denoiser.evaluate(x, 0.5).sum().item()
    in_children(
        f"def way(denoiser, name):\n    x = torch.randn(3, {HORIZON}, {DATA_DIM}, generator=torch.Generator().manual_seed(0))\n"
        "    raise RuntimeError(repr(denoiser.evaluate(x, 0.5).sum().item()))"
    )
    with pytest.warns(RuntimeWarning) as warned:
        backend_choice.race(denoiser, CPU, 3, "reference", ON_GPU[:1])
    found = float(str(warned[0].message).split("RuntimeError: ")[1].rstrip("."))
    assert found == pytest.approx(expected, rel=1e-5)


def test_where_no_other_process_can_use_the_device_this_one_tries(monkeypatch, capfd):
    candidates = Candidates(monkeypatch, {"triton-a": same}, {"triton-a": 1, "reference": 3}, apart=True)
    monkeypatch.setattr(backend_choice, "Child", lambda module: Child("dydiff.nothing"))
    assert candidates.choose() == "triton-a"
    told = capfd.readouterr().err
    assert "tried in this process, since another one did not get to use cpu: its process ended with status 1" in told


def test_a_gpu_that_a_kernel_ruined_for_this_process_ends_the_run(monkeypatch):
    """The message recommends the best of those that were tried before."""

    def lose(device):
        raise backend_choice.DeviceLost

    for seconds, remedy in ((1, "cudnn"), (4, "reference")):
        candidates = Candidates(monkeypatch, {"cudnn": same}, {"cudnn": seconds, "reference": 3})
        monkeypatch.setattr(backend_choice, "_insist_on_usable", lose)
        with pytest.raises(DydiffError, match=f"triton-a failed .*left cpu unusable .*no such instruction.*backend={remedy}"):
            candidates.choose()


# On a card

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the trial of the fused kernels themselves needs a GPU")


@needs_gpu
def test_auto_takes_fused_kernels_on_a_gpu():
    denoiser = Denoiser(UNet(14, 100), 11).cuda().requires_grad_(False)
    assert choose_backend(denoiser, torch.device("cuda"), 64) in ON_GPU
    assert prepare_denoiser(denoiser, "auto", 64).evaluate(torch.randn(2, 100, 14, device="cuda"), 1.0).isfinite().all()


@needs_gpu
def test_a_gpu_that_a_kernel_ruins_or_holds_is_there_for_the_next_process(in_children, capfd):
    ruin = "torch.zeros(3, device='cuda')[torch.tensor([7], device='cuda')].sum().item()"
    hold = "[torch.cuda._sleep(2**40) for _ in range(9)]; torch.cuda.synchronize()"
    in_children(WAYS.format(crashing="triton-a", crash=ruin, hanging="triton-b", hang=hold))
    assert backend_choice.race(make_denoiser().cuda(), torch.device("cuda"), 3, "reference", ON_GPU) in ("cudnn", "triton-c")
    told = capfd.readouterr().err
    assert "triton-a cannot be used here: " in told and "triton-b cannot be used here: in its trial, it took" in told
    assert torch.ones(3, device="cuda").sum().item() == 3
