"""Updates from replay: all modes compute the same, and the figures, random numbers and schedules are those of a plain loop."""

from __future__ import annotations

import copy
import json

import conformance
import pytest
import torch

import dydiff.updates
from dydiff.agents import AGENTS
from dydiff.capture import can_compile
from dydiff.data import Transitions
from dydiff.device import fast_float32, sum_in_float32
from dydiff.errors import DydiffError
from dydiff.replay import ReplayBuffer, sample_mixed
from dydiff.updates import WORTH_COMPILING, Updates, choose_mode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST_MODES = ["compiled"] * can_compile(torch.device(DEVICE)) + ["graph"] * (DEVICE == "cuda")
# The sizes of the recorded cases, whose compiled code is then found in Inductor's cache.
OBSERVATION_DIM, ACTION_DIM, HIDDEN, BATCH = 5, 2, [32, 32], 16


def transitions(count: int, seed: int) -> Transitions:
    random = torch.Generator().manual_seed(seed)
    fields = (
        torch.randn(count, OBSERVATION_DIM, generator=random),
        torch.rand(count, ACTION_DIM, generator=random) * 2 - 1,
        torch.randn(count, generator=random),
        torch.randn(count, OBSERVATION_DIM, generator=random),
        (torch.rand(count, generator=random) < 0.2).float(),
    )
    return Transitions(*(field.to(DEVICE) for field in fields))


def make_updates(name: str, mode: str, num_synthetic: int = 50, precision: str = "float32", **options) -> Updates:
    agent = AGENTS[name](OBSERVATION_DIM, ACTION_DIM, HIDDEN, device=DEVICE, generator=torch.Generator().manual_seed(0), **options)
    synthetic = ReplayBuffer(100, OBSERVATION_DIM, ACTION_DIM, DEVICE)
    synthetic.extend(transitions(num_synthetic, seed=2))
    real = ReplayBuffer.from_transitions(transitions(80, seed=1), 1000)
    return Updates(agent, real, synthetic, BATCH, 0.6, torch.Generator(DEVICE).manual_seed(3), mode, 0, precision)


def assert_close(ours: object, theirs: object, where: str = "") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_close(*pair, f"{where}/{index}")
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), where


@pytest.mark.parametrize("mode", FAST_MODES)
@pytest.mark.parametrize("name", AGENTS)
def test_modes_agree_step_by_step(name, mode):
    ours, plain = make_updates(name, mode), make_updates(name, "eager")
    for step in range(6):
        if step == 3:  # another mixture, and other weights in the very same place
            ours.learners[0].synthetic.extend(transitions(20, seed=4))
            plain.learners[0].synthetic.extend(transitions(20, seed=4))
            ours.learners[0].agent.load_state_dict(copy.deepcopy(plain.learners[0].agent.state_dict()))
        assert_close(ours.run(1), plain.run(1), f"step {step}")
        assert_close(ours.learners[0].agent.state_dict(), plain.learners[0].agent.state_dict(), f"step {step}")
    if (name, mode) == ("td3_bc", "compiled"):  # in pairs, with the single update that is compiled by now as the remainder
        done = []
        assert_close(ours.run(5, done.append), plain.run(5))
        assert_close(ours.learners[0].agent.state_dict(), plain.learners[0].agent.state_dict(), "pairs")
        assert done == [2, 2, 1]
    assert torch.equal(ours.learners[0].generator.get_state(), plain.learners[0].generator.get_state())


@pytest.mark.skipif("compiled" not in FAST_MODES, reason="needs a compiler")
def test_batches_of_one_are_not_compiled():
    """With PyTorch 2.13 their critics took first steps of 0.76 to 1.25 times the learning rate, where Adam's are exactly that."""
    whole = make_updates("td3_bc", "compiled")
    part, how = whole.learners[0], (1, 0.5, whole.learners[0].generator, "compiled", 0)
    assert (whole.mode, Updates(part.agent, part.real, part.synthetic, *how).mode) == ("compiled", "eager")



@pytest.mark.skipif("compiled" not in FAST_MODES, reason="needs a compiler")
def test_compiled_updates_are_those_of_their_own_agent():
    """Nothing is checked at a call of compiled code: it must not be shared with an agent of other settings."""
    for discount in (0.99, 0.5):
        ours, plain = (make_updates("td3_bc", mode, discount=discount) for mode in ("compiled", "eager"))
        assert_close(ours.run(1), plain.run(1), f"discount {discount}")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", AGENTS)
def test_graphs_of_several_updates_agree(name):
    options = {"ema_start": 10, "ema_every": 5} if name == "diffusion_ql" else {}
    ours, plain = make_updates(name, "graph", **options), make_updates(name, "eager", **options)
    for _ in range(3):  # captured, replayed, and a remainder
        assert_close(ours.run(23), plain.run(23))
    assert_close(ours.learners[0].agent.state_dict(), plain.learners[0].agent.state_dict())


@pytest.mark.parametrize("mode", ["eager", *FAST_MODES])
@pytest.mark.parametrize("file", ["td3bc-a.npz", "diffql-heads.npz"])
def test_recorded_updates_pass_in_every_mode(file, mode):
    path = conformance.Path(__file__).parent / "data" / "conformance" / file
    ((_, error, limit, _, name),) = conformance.run_file(path, [], DEVICE, [mode])
    assert error <= limit and name == mode


@pytest.mark.parametrize("num_synthetic", [0, 50])
def test_a_run_is_a_plain_loop(num_synthetic):
    updates, other = make_updates("td3_bc", "eager", num_synthetic), make_updates("td3_bc", "eager", num_synthetic)
    done = []
    figures = updates.run(4, done.append)
    ((agent, real, synthetic, random), logs) = *other.learners, []
    for _ in range(4):
        batch = sample_mixed(real, synthetic, BATCH, 9 if num_synthetic else BATCH, random)
        logs.append(agent.update(batch, agent.draw_noise(BATCH, random)))
    ours = updates.learners[0].agent
    assert_close(ours.state_dict(), agent.state_dict())
    assert done == [1] * 4 and ours.step == 4
    for name, value in figures.items():  # the policy moved twice, and its loss is the mean over these
        values = [float(log[name]) for log in logs if name in log]
        assert len(values) == (2 if name in ("policy_loss", "cloning_loss") else 4)
        assert value == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("mode", ["graph", *FAST_MODES[:1]])
def test_graphs_are_made_once_per_pattern(mode, monkeypatch):
    """The bookkeeping around CUDA graphs, also of compiled updates, with stand-ins for capture and replay."""

    class Recorded:
        def __init__(self, function, device, generator):
            captured.append(function)
            self.replay = function

    def warm_up(function, device):
        warmed.append(function)
        return function()

    captured, warmed = [], []
    plain = make_updates("td3_bc", "eager")
    monkeypatch.setattr(dydiff.updates, "CapturedGraph", Recorded)
    monkeypatch.setattr(dydiff.updates, "warm_up", warm_up)
    monkeypatch.setattr(dydiff.updates, "choose_mode", lambda *_: mode)
    monkeypatch.setattr(dydiff.updates, "captures", lambda device: True)
    ours = make_updates("td3_bc", mode)
    for _ in range(3):
        assert_close(ours.run(24), plain.run(24))
    assert (len(warmed), len(captured)) == (2, 2)  # of ten updates and of four
    assert len(ours._functions) == (1 if mode == "compiled" else 2)  # which are made of pairs, or as they are
    assert_close(ours.learners[0].agent.state_dict(), plain.learners[0].agent.state_dict())


def test_choice_of_the_mode(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_mode("auto", torch.device("cuda"), 1) == "graph"
    assert choose_mode("auto", cpu, WORTH_COMPILING - 1) == "eager"
    monkeypatch.setattr(dydiff.updates, "can_compile", lambda device: False)
    assert choose_mode("auto", cpu, WORTH_COMPILING) == "eager"
    with pytest.raises(DydiffError, match="compiler"):
        choose_mode("compiled", cpu, 1)
    with pytest.raises(DydiffError, match="cpu"):
        choose_mode("graph", cpu, 1)
    with pytest.raises(DydiffError, match="'fast'.*eager"):
        choose_mode("fast", cpu, 1)
    monkeypatch.setattr(dydiff.updates, "can_compile", lambda device: True)
    monkeypatch.setattr(dydiff.updates, "trace_gradients", lambda: True)
    assert choose_mode("auto", cpu, WORTH_COMPILING) == "compiled"


def weights(updates: Updates) -> torch.Tensor:
    agent = updates.learners[0].agent
    networks = [part for part in vars(agent).values() if isinstance(part, torch.nn.Module)]
    return torch.cat([weight.detach().flatten() for network in networks for weight in network.parameters()])


def with_one_compiled() -> list:
    """Every agent in every mode; but compiling takes half a minute each, so two of them are left to long runs."""
    cases = [(name, mode) for name in AGENTS for mode in ["eager", *FAST_MODES]]
    marks = [[pytest.mark.long] if mode == "compiled" and name != "diffusion_ql" else [] for name, mode in cases]
    return [pytest.param(*case, marks=each) for case, each in zip(cases, marks, strict=True)]


@pytest.mark.parametrize(("name", "mode"), with_one_compiled())
def test_bf16_updates_are_those_of_float32_but_for_rounding(name, mode):
    ours, exact = make_updates(name, mode, precision="bf16"), make_updates(name, "eager")
    before = weights(exact)
    for _ in range(3):
        figures, expected = ours.run(1), exact.run(1)
        assert figures.keys() == expected.keys()
        for key, value in figures.items():
            assert value == pytest.approx(expected[key], rel=0.05, abs=0.05), key
    change, difference = weights(exact) - before, weights(ours) - weights(exact)
    # Of three steps of Adam, which hardly differ in size, a wrong gradient would turn half.
    assert 1e-4 * change.norm() < difference.norm() < 0.3 * change.norm()
    state = ours.learners[0].agent.state_dict()
    assert all(leaf.dtype != torch.bfloat16 for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor))
    assert torch.equal(ours.learners[0].generator.get_state(), exact.learners[0].generator.get_state())


def test_bf16_products_see_the_weights_of_this_moment():
    """The policy learns from critics that have just moved; with a great step size, old ones would give other values."""
    ours, plain = (make_updates("diffusion_ql", "eager", precision=precision, lr=0.1) for precision in ("bf16", "float32"))
    assert ours.run(1)["q_loss"] == pytest.approx(plain.run(1)["q_loss"], rel=0.03)


def test_bf16_learns_the_values_of_a_known_problem():
    """A chain of one state whose every step pays 1: the values tend to 1 / (1 - discount)."""
    values = {}
    for precision in ("float32", "bf16"):
        updates = make_updates("td3_bc", "eager", 0, precision, discount=0.5, tau=0.1, qf_lr=3e-3)
        agent, real, _, _ = updates.learners[0]
        real.storage.reward.fill_(1.0)
        real.storage.terminal.fill_(0.0)
        updates.run(300)
        batch = Transitions(*(field[:80] for field in real.storage))
        with torch.no_grad():
            values[precision] = agent.critics(torch.cat([batch.observation, batch.action], dim=1)).mean().item()
    assert values["float32"] == pytest.approx(2, rel=0.02)
    assert values["bf16"] == pytest.approx(values["float32"], rel=0.02)


def test_several_seeds_together_keep_their_precision():
    figures = {}
    for precision in ("float32", "bf16"):
        together = Updates.together([make_updates("td3_bc", "eager", precision=precision) for _ in range(2)])
        figures[precision] = together.run_all(1)[0]["critic_loss"]
    assert figures["bf16"] != figures["float32"]
    assert figures["bf16"] == pytest.approx(figures["float32"], rel=0.02)


def test_unknown_precision():
    with pytest.raises(DydiffError, match="'half'.*float32, bf16"):
        make_updates("td3_bc", "eager", precision="half")


def test_fast_float32_is_float32_and_leaves_no_trace():
    a, b = torch.randn(2, 200, 300, generator=torch.Generator().manual_seed(0))
    before, setting = a @ b.mT, torch.get_float32_matmul_precision()
    with fast_float32(torch.device("cpu")):
        inside = a @ b.mT
    exact = a.double() @ b.double().mT
    assert (inside - exact).norm() < 1e-6 * exact.norm()
    assert torch.equal(a @ b.mT, before) and torch.get_float32_matmul_precision() == setting


def test_sums_are_float32_where_it_is_asked_for():
    settings = torch.backends.cuda.matmul

    def permitted() -> list[bool]:
        return [settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction]

    before = permitted()
    with pytest.raises(KeyError), sum_in_float32():
        assert permitted() == [False, False]
        raise KeyError
    assert permitted() == before


def test_a_run_has_the_precision_that_its_settings_name(run_stage, dataset, tmp_path):
    values = {}
    for precision in ("float32", "bf16"):
        settings = ["--set=rl_trainer_params.real_ratio=1", f"--set=rl_trainer_params.update_precision={precision}"]
        assert run_stage("td3_bc", dataset, "--device=cpu", *settings, root=tmp_path / precision).status == 0
        (log,) = (tmp_path / precision).glob("*/log.jsonl")
        values[precision] = json.loads(log.read_text().splitlines()[-1])["train/q_mean"]
    assert values["bf16"] != values["float32"]
    assert values["bf16"] == pytest.approx(values["float32"], rel=0.05, abs=0.01)
