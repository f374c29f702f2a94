"""The GPU's paths on a pretended card: whole commands and captured graphs give what the CPU gives, and no device meets another."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretend_cuda
import pytest
import tiny
import torch
from pretend_gpu import pretend
from test_one_step_models import assert_captured_steps_are_the_plain_ones
from test_rollout import HORIZON, OBSERVATION_DIM, starts
from test_rollout_capture import make_agent, make_rollouts, prepare
from test_training_precision import make_trainer, windows  # noqa: F401
from torch import Tensor

import dydiff.updates
from dydiff import capture, rollout
from dydiff.agents import AGENTS
from dydiff.backends.choice import choose_backend
from dydiff.capture import CapturedGraph, capture_if_gpu, warm_up
from dydiff.data import Transitions
from dydiff.diffusion import update
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.errors import DydiffError
from dydiff.kernels import native
from dydiff.models import load_policy
from dydiff.networks.unet import UNet
from dydiff.replay import ReplayBuffer
from dydiff.reward import RewardModel
from dydiff.rollout import make_synthetic_transitions
from dydiff.updates import Updates, choose_mode

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
TESTS = Path(__file__).parent
SECOND = "cuda:1"  # while the first one is current, as in a worker that was dealt another GPU


@pytest.fixture
def cards(monkeypatch):
    """Two pretended cards, whose EDM step is the CPU's compiled one."""
    monkeypatch.setattr(capture, "_side_stream", functools.cache(capture._side_stream.__wrapped__))
    if native.extension is not None:
        monkeypatch.setattr(native.extension, "cuda", SimpleNamespace(obstacle=lambda device: ""), raising=False)
    with pretend():
        yield


# The pretended cards themselves


def test_devices_do_not_meet(cards):
    here, there, source = torch.ones(3, device="cuda"), torch.ones(3, device=SECOND), torch.Generator("cuda")
    assert here.device == torch.device("cuda:0") and here.is_cuda and here.new_zeros(2).device == here.device
    for mix in (
        lambda: here + torch.ones(3),
        lambda: here + there,
        lambda: torch.stack([here[0], torch.tensor(1.0)]),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: torch.rand(3, generator=source),
        lambda: torch.rand(3, generator=source, device=SECOND),
        lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
    ):
        with pytest.raises(RuntimeError, match="same device|for generator"):
            mix()
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(here)
    here[1] = 5.0
    assert (here + torch.tensor(1.0)).tolist() == [2, 6, 2] and here[torch.tensor([1])].item() == 5


def test_graphs_replay_what_they_hold_and_notice_what_they_lost(cards):
    device, source = torch.device(SECOND), torch.Generator(SECOND).manual_seed(0)
    weight = torch.zeros(2, device=device)

    def count() -> tuple[Tensor, Tensor]:
        return weight.add_(1) * 2, torch.rand(2, generator=source, device=device)

    expected = torch.rand(2, 2, generator=torch.Generator(SECOND).manual_seed(0), device=device)
    graph = CapturedGraph(count, device, source)
    assert weight.sum() == 0 and graph.output[0].isnan().all(), "nothing is computed while capturing"
    for replayed in range(2):
        doubled, drawn = graph.replay()
        assert doubled.tolist() == 2 * [2 * replayed + 2.0] and drawn.tolist() == expected[replayed].tolist()
    weight.data = torch.zeros(2, device=device)
    with pytest.raises(AssertionError, match="let go"):
        graph.replay()
    for forbidden in (weight.sum().item, weight.cpu, weight.nonzero, lambda: torch.tensor(1.0, device=device)):
        with pytest.raises(DydiffError, match="capturing.*DYDIFF_CAPTURE=0"):
            CapturedGraph(forbidden, device)
    with pytest.raises(DydiffError, match="not in capture mode"):
        CapturedGraph(count, device)
    with pytest.raises(DydiffError, match="capturing"):
        CapturedGraph(lambda: float(torch.rand(2, generator=source, device=device).sum()), device, source)
    torch.rand(2, generator=source, device=device)  # a failed capture has left it whole
    elsewhere = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream("cuda:0"))
    with pytest.raises(RuntimeError, match="not in the capture"), elsewhere:
        weight.add_(1)
    assert warm_up(lambda: torch.cuda.current_device(), device) == 1 and torch.cuda.current_device() == 0


def test_a_graph_has_a_workspace_of_its_own(cards, monkeypatch):
    """PyTorch 2.13 frees a stream's workspace with any graph that was captured on it."""
    events = []

    def clear() -> None:
        events.append("captures" if torch.cuda.is_current_stream_capturing() else "cleared")

    def work() -> Tensor:
        events.append("works")
        return torch.ones(2, device=SECOND)

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    CapturedGraph(work, torch.device(SECOND))
    with pytest.raises(DydiffError):
        CapturedGraph(lambda: work().cpu(), torch.device(SECOND))
    assert events == 2 * ["cleared", "works", "cleared"]


# The method


def test_a_policy_that_cannot_be_captured_spoils_no_other(cards):
    """Neither one that was captured before it nor one that comes after it: memory of a failed capture is not used again."""
    engine, agents = prepare(SECOND), [make_agent("td3_bc", seed, SECOND) for seed in (0, 1)]
    source = torch.Generator(SECOND).manual_seed(0)

    def waits(observation: Tensor) -> Tensor:
        return agents[0].act(observation) * float(observation.mean() > -9)

    for _ in range(2):
        engine.roll_out(agents[0].act, starts(5).to(SECOND), source)
    engine.roll_out(waits, starts(5).to(SECOND), source)
    with pytest.raises(DydiffError, match="must not read its tensors on the host"):
        engine.roll_out(waits, starts(5).to(SECOND), source)
    for agent in agents:
        for _ in range(3):
            assert engine.roll_out(agent.act, starts(5).to(SECOND), source).action.isfinite().all()


@pytest.mark.parametrize(
    "name, settings", [("td3_bc", {"backend": "auto"}), ("diffusion_ql", {"fast": FastMode(2, 0.8, 2)})], ids=["td3_bc", "diffql"]
)
def test_captured_rollouts_are_the_plain_ones(cards, name, settings):
    results = []
    for on in (False, True):
        engine, agent = prepare(SECOND, capture=on, **settings), make_agent(name, 0, SECOND)
        source = torch.Generator(SECOND).manual_seed(3)
        reward = RewardModel(OBSERVATION_DIM, 1, [8], generator=torch.Generator().manual_seed(0)).to(SECOND)
        rollouts = make_rollouts(engine, reward)
        judge = capture_if_gpu(lambda *each, r=rollouts, s=source: r.judge(s, *each), source.device, source) if on else None

        def act(observation: Tensor, agent=agent, source=source) -> Tensor:
            return agent.act(observation, source)

        for call in range(4):
            if call == 3:  # the weights change where they are, as an update changes them
                agent.load_state_dict(make_agent(name, 1, SECOND).state_dict())
            trajectory = engine.roll_out(act, starts(5, call).to(SECOND), source)
            scores, keep, finite = judge(*trajectory) if on else rollouts.judge(source, *trajectory)
            assert finite and keep.any()
            made, _ = make_synthetic_transitions(trajectory, reward, rollouts.is_terminal, engine.spaces)
            results.append([*trajectory, scores, keep, *made])
    for plain, captured in zip(results[:4], results[4:], strict=True):
        for one, other in zip(plain, captured, strict=True):
            torch.testing.assert_close(other.cpu(), one.cpu(), rtol=1e-4, atol=1e-4)


def test_graphs_of_many_sizes_are_not_all_kept(cards, monkeypatch):
    monkeypatch.setattr(rollout, "KEPT_GRAPHS", 2)
    engine, agent = prepare(SECOND), make_agent("td3_bc", 0, SECOND)
    source = torch.Generator(SECOND).manual_seed(3)
    for size in (3, 3, 4, 5, 5, 4, 3, 3):  # the third size comes when one graph has been captured
        assert engine.roll_out(agent, starts(size).to(SECOND), source).action.isfinite().all()
        assert len(engine._captured) <= 2


def test_auto_times_float32_as_a_graph_and_takes_it_where_no_kernel_runs(cards, capfd):
    denoiser = Denoiser(UNet(3, HORIZON, 8, (1,)), 2).to(SECOND).requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="in float32. An evaluation of 4 starts took .*cudnn cannot be used.*triton-c cannot"):
        assert choose_backend(denoiser, torch.device(SECOND), 4) in ("extension", "reference")
    assert f"another one did not get to use {SECOND}" in capfd.readouterr().err


def test_a_capture_that_does_not_fit_is_halved(cards, capsys):
    engine, agent = prepare(SECOND), make_agent("td3_bc", 0, SECOND)
    source = torch.Generator(SECOND).manual_seed(3)
    act = agent.act
    for call in range(4):
        if call == 1:
            pretend_cuda.limits.largest_tensor = 64 * HORIZON * 3 * 4 - 1  # bytes of all trajectories
        trajectory = engine.roll_out(act, starts(64, call).to(SECOND), source)
        assert trajectory.observation.isfinite().all() and len(trajectory.action) == 64
    told = capsys.readouterr().err
    assert "64 rollouts at a time (CUDA out of memory" in told and engine.chunk_size in (8, 16, 32)


def make_updates(name: str, mode: str, seed: int) -> Updates:
    random = torch.Generator().manual_seed(seed)
    fields = (torch.randn(40, OBSERVATION_DIM, generator=random) for _ in range(2))
    numbers = (torch.rand(40, generator=random) for _ in range(2))
    (observation, following), (reward, terminal) = fields, numbers
    made = Transitions(observation, torch.rand(40, 1, generator=random), reward, following, (terminal < 0.2).float())
    made = Transitions(*(field.to(SECOND) for field in made))
    synthetic = ReplayBuffer(30, OBSERVATION_DIM, 1, SECOND)
    synthetic.extend(made)
    options = {"cql": {"num_random": 2}, "diffusion_ql": {"n_timesteps": 2}}.get(name, {})
    agent = AGENTS[name](OBSERVATION_DIM, 1, hidden_dims=[8], device=SECOND, generator=random, **options)
    real = ReplayBuffer.from_transitions(made, 100)
    return Updates(agent, real, synthetic, 8, 0.6, torch.Generator(SECOND).manual_seed(seed), mode, num_updates=0)


@pytest.mark.parametrize("name, at_once, together", [("td3_bc", 2, True), ("diffusion_ql", 5, False), ("cql", 2, True)])
def test_graphs_of_updates_agree(cards, monkeypatch, name, at_once, together):
    monkeypatch.setattr(dydiff.updates, "UPDATES_A_GRAPH", at_once)
    figures, states = [], []
    for mode in ("eager", "graph"):
        parts = [make_updates(name, mode, seed) for seed in range(2)]
        updates = Updates.together(parts) if together else parts[0]
        figures.append(updates.run_all(3 * at_once))
        states.append([value.cpu() for value in _tensors(parts[0].learners[0].agent.state_dict())])
    assert figures[1] == [pytest.approx(each, rel=1e-4, abs=1e-6) for each in figures[0]]
    for plain, captured in zip(*states, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5)


def _tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, (dict, list)):
        return [each for value in (tree.values() if isinstance(tree, dict) else tree) for each in _tensors(value)]
    return [tree] if isinstance(tree, Tensor) else []


def plain_adam(weight, first, second, average, gradient, copy, coefficients) -> SimpleNamespace:
    """What kernels/adam.py's launch does, by PyTorch; kernels do not run on a pretended card."""

    def run() -> None:
        rest_1, beta_2, rest_2, epsilon, step_size, root_correction, rate, limit = coefficients.arguments()
        g = gradient.float().nan_to_num(nan=0, posinf=limit, neginf=-limit)
        first.lerp_(g, rest_1)
        second.mul_(beta_2).addcmul_(g, g, value=rest_2)
        weight.addcdiv_(first, (second.sqrt() / root_correction).add_(epsilon), value=-step_size)
        average.lerp_(weight, rate)
        if copy is not None:
            copy.copy_(weight)

    return SimpleNamespace(run=run)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_captured_training_of_the_diffusion_model(cards, windows, by_kernel, monkeypatch):  # noqa: F811
    if by_kernel:
        kernel_update = pytest.importorskip("dydiff.diffusion.kernel_update")
        monkeypatch.setattr(kernel_update, "adam_average", plain_adam)
        monkeypatch.setattr(update, "why_triton_fails", lambda device: "")
    there = copy.deepcopy(windows)
    for name in ("start", "length", "rows", "_offset", "limits"):
        setattr(there, name, getattr(there, name).to(SECOND))
    captured, plain = (make_trainer(there, "bf16") for _ in range(2))
    assert type(captured.update).__name__ == ("KernelUpdate" if by_kernel else "Update")
    plain.captures = False
    for _ in range(2):
        captured._step(), plain._step()
    resumed = make_trainer(there, "bf16")
    resumed.load_state_dict(copy.deepcopy(captured.state_dict()))
    losses = [trainer._step().item() for trainer in (captured, plain, resumed)]
    assert losses == [pytest.approx(losses[0], rel=1e-3)] * 3


def test_nothing_is_captured_where_the_environment_forbids_it(cards, windows, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DYDIFF_CAPTURE", "0")
    monkeypatch.delattr(torch.cuda, "graph")
    engine, agent, source = prepare(SECOND), make_agent("td3_bc", 0, SECOND), torch.Generator(SECOND).manual_seed(3)
    first, *others = [engine.roll_out(agent, starts(5, 0).to(SECOND), source.manual_seed(3)) for _ in range(3)]
    for other in others:
        assert torch.equal(first.observation.cpu(), other.observation.cpu())
    assert choose_mode("auto", torch.device(SECOND), 10**6) == "eager"
    assert capture_if_gpu(len, source.device, source) is len
    there = copy.deepcopy(windows)
    for name in ("start", "length", "rows", "_offset", "limits"):
        setattr(there, name, getattr(there, name).to(SECOND))
    trainer = make_trainer(there, "bf16")
    assert all(trainer._step().isfinite() for _ in range(3))


# Whole commands


@pytest.mark.parametrize("kind", ["dynamics", "reward"])
def test_captured_steps_of_one_step_models_are_the_plain_ones(cards, kind, monkeypatch):
    assert_captured_steps_are_the_plain_ones(kind, SECOND, monkeypatch)


def test_every_stage_trains_resumes_and_is_reported(cards, dataset, command, run_stage, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:0] = {[str(TESTS), str(TESTS.parent)]!r}\nimport pretend_gpu\nkept = pretend_gpu.pretend()\n"
        "kept.__enter__()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
    runs, device = tmp_path / "runs", f"--device={SECOND}"
    short = ["--set=rl_trainer_params.num_train_steps_per_train_call=4", "--set=rl_trainer_params.num_epochs="]

    def check(outcome) -> None:
        assert outcome.status == 0, outcome.errors

    check(command("train", "-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN, "--duration=0.00008", device, f"--outdir={runs}"))
    for stage, section in (("dynamics", "dyn_model_params"), ("reward", "model_params")):
        check(run_stage(stage, dataset, device, f"--set={section}.max_epochs=2"))
    states = torch.cuda.get_rng_state_all
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: 2 * states())  # as if the job that resumes saw fewer cards
    for epochs in (1, 2):
        check(run_stage("td3_bc", dataset, device, f"{short[1]}{epochs}", short[0], "--resume"))
    beside = ["--set=rl_trainer_params.evaluation_worker=true", "--set=sampler_kwargs.fast=true", "--set=seeds=[0, 1]"]
    check(run_stage("diffusion_ql", dataset, device, f"{short[1]}2", *beside))
    check(command("report", f"--outdir={runs}", f"--dataset={dataset}", "--starts=4", device))
    (file,) = runs.glob("*-td3_bc-s0/agent.safetensors")
    actions = [load_policy(file, where)(np.zeros((3, 4), np.float32)) for where in (SECOND, "cpu")]
    np.testing.assert_allclose(*actions, rtol=1e-5)
