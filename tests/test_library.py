"""The library in the hands of people: what is given wrongly is refused by its name, and policies are rolled out as they are."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from host_reads import NoHostReads
from test_pretend_gpu import SECOND, cards  # noqa: F401
from torch import Tensor

from dydiff.agents import AGENTS, Agent
from dydiff.capture import GraphedFunction
from dydiff.checkpoint import save_checkpoint
from dydiff.data import Limits, Spaces, ZScore
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.models import DIFFUSION, POLICY, DiffusionModel, Policy, build_denoiser, load_diffusion_model, load_policy, store_spaces
from dydiff.rollout import RolloutEngine, score

OBSERVATION_DIM, ACTION_DIM, HORIZON = 3, 2, 4
WIDTH = OBSERVATION_DIM + ACTION_DIM
MLP = {"kind": "MLP_RL", "data_dim": WIDTH, "horizon": HORIZON, "dim": 8}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_spaces(observation_dim: int = OBSERVATION_DIM) -> Spaces:
    limits = Limits(torch.full((observation_dim + ACTION_DIM,), -4.0), torch.full((observation_dim + ACTION_DIM,), 4.0))
    z_score = ZScore(torch.linspace(-1, 1, observation_dim), torch.linspace(1, 2, observation_dim))
    return Spaces(limits, z_score, torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 4.0]))


def make_denoiser(**changes: object) -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(MLP | changes, OBSERVATION_DIM)


def make_engine(*denoisers: object, spaces: Spaces | None = None, device: str = "cpu", **settings: object) -> RolloutEngine:
    sizes = {"hidden_dims": [8], "num_nets": 3, "num_elites": 2, "weight_decay": [0, 0]}
    dynamics = DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM, **sizes, generator=generator()).to(device)
    settings = {"horizon": HORIZON, "backend": "reference", "sampler": {"num_steps": 2}} | settings
    spaces = (spaces or make_spaces()).to(device)
    return RolloutEngine(denoisers or [make_denoiser().to(device)], dynamics, spaces, **settings)


def save_diffusion(folder, **changes: object) -> DiffusionModel:
    """A diffusion model that was saved, with another manifest, and loaded again."""
    limits = {"minimum": torch.full((WIDTH,), -4.0), "maximum": torch.full((WIDTH,), 4.0)}
    network = MLP | changes.pop("network", {})
    trained = {"include_action": True, "use_cond": True, "cond_on_action": True}
    manifest = {"network": network, "observation_dim": OBSERVATION_DIM, **trained, **changes}
    tree = {"weights": build_denoiser(network, OBSERVATION_DIM).network.state_dict(), "limits": limits}
    save_checkpoint(folder / "model.safetensors", DIFFUSION, tree, manifest)
    return load_diffusion_model(folder / "model.safetensors")


def make_agent(name: str, device: str = "cpu") -> Agent:
    return AGENTS[name](OBSERVATION_DIM, ACTION_DIM, hidden_dims=[8], device=device, generator=generator(1))


def save_policy(folder, name: str) -> Policy:
    tree = {"agent": make_agent(name).state_dict(), "spaces": store_spaces(make_spaces())}
    model = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "hidden_dims": [8]}
    save_checkpoint(folder / "agent.safetensors", POLICY, tree, {"algorithm": name, "model": model})
    return load_policy(folder / "agent.safetensors")


def starts(count: int = 5) -> Tensor:
    return torch.randn(count, OBSERVATION_DIM, generator=generator(2))


def act(observation: Tensor) -> Tensor:
    return torch.tanh(observation[:, :ACTION_DIM])


# What roll_out is given


@pytest.mark.parametrize(
    "policy, given",
    [
        (lambda o: act(o)[:, :1], "[5, 1] on cpu"),
        (lambda o: act(o)[:1], "[1, 2] on cpu"),
        (lambda o: act(o)[0], "[2] on cpu"),
        (lambda o: act(o).numpy(), "an object of type numpy.ndarray"),
        (lambda o: None, "None"),
    ],
)
def test_actions_that_do_not_fit_are_not_broadcast(policy, given):
    message = refusal(make_engine().roll_out, policy, starts(), generator())
    assert message.startswith("What the policy returns must be a torch tensor [5, 2] on cpu, not") and f"{given}. " in message


@pytest.mark.parametrize(
    "start, given",
    [
        (starts()[:, :1], "one [5, 1] on cpu"),
        (starts()[0], "one [3] on cpu"),
        (torch.zeros(()), "one [] on cpu"),
        (starts()[None], "one [1, 5, 3] on cpu"),
        (starts().numpy(), "an object of type numpy.ndarray"),
        (starts().to("meta"), "one [5, 3] on meta"),
    ],
)
def test_starts_that_do_not_fit_are_not_broadcast(start, given):
    message = refusal(make_engine().roll_out, act, start, generator())
    assert message.startswith(f"start must be a torch tensor [B, 3] on cpu, not {given}. ")
    assert "spaces.observation_raw_to_policy" in message


def test_float64_is_taken_as_float32():
    engine = make_engine()
    plain = engine.roll_out(act, starts(), generator())
    for policy, start in ((act, starts().double()), (lambda o: act(o).double(), starts())):
        trajectory = engine.roll_out(policy, start, generator())
        assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(trajectory, plain, strict=True))
    assert engine.roll_out(act, starts(0), generator()).observation.shape == (0, HORIZON, OBSERVATION_DIM)


def test_other_arguments_of_roll_out_are_named():
    engine = make_engine()
    assert "generator must be a torch.Generator on cpu, not None" in refusal(engine.roll_out, act, starts(), None)
    assert "generator must be a torch.Generator on cpu, not 3" in refusal(engine.roll_out, act, starts(), 3)
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    assert "generator must be a torch.Generator on cpu, not an" in refusal(engine.roll_out, act, starts(), elsewhere)
    assert "policy must be a function" in refusal(engine.roll_out, "agent.safetensors", starts(), generator())
    assert "iterations must be a whole number of at least 0, not -1" in refusal(
        engine.roll_out, act, starts(), generator(), None, -1
    )


# What an engine is made of


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"iterations": -1}, ["iterations", "at least 0, not -1"]),
        ({"iterations": 1.5}, ["iterations", "at least 0, not 1.5"]),
        ({"horizon": None}, ["horizon", "at least 1, not None"]),
        ({"fast": True}, ["fast must be None or a dydiff.FastMode", "FastMode()", "not True"]),
        ({"sampler": {"S_churn": 0}}, ["sampler has no setting 'S_churn': did you mean 's_churn'?"]),
        ({"sampler": {"backend": "reference"}}, ["sampler has no setting 'backend'"]),
        ({"sampler": {"zzz": 0}}, ["choose one of num_steps, sigma_min", "inpaint_churn."]),
        ({"sampler": {"num_steps": 1}}, ["sampler's num_steps", "at least 2, not 1"]),
        ({"sampler": 34}, ["sampler must be a dictionary", "not 34"]),
        ({"spaces": make_spaces(4)}, ["spaces.observation_dim is 4", "made for 3"]),
        ({"spaces": make_spaces().to("meta")}, ["spaces.device is meta", "made for cpu"]),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_settings_that_cannot_be(settings, parts):
    settings = dict(settings)
    message = refusal(
        lambda: RolloutEngine([make_denoiser()], None, settings.pop("spaces", make_spaces()), **{"horizon": HORIZON} | settings)
    )
    for part in parts:
        assert part in message


def test_every_setting_of_the_sampler_may_be_given():
    sampler = {"num_steps": 2, "sigma_min": 0.01, "sigma_max": 50.0, "rho": 6.0, "s_churn": 0, "s_min": 0.1, "s_max": 9.0}
    engine = make_engine(sampler=sampler | {"s_noise": 1.0, "inpaint_churn": True}, fast=None)
    assert engine.roll_out(act, starts(), generator()).action.isfinite().all()
    assert make_engine(fast=FastMode()).roll_out(act, starts(), generator()).action.isfinite().all()


@pytest.mark.parametrize("option", ["include_action", "use_cond", "cond_on_action"])
def test_models_that_were_not_shown_what_is_injected(option, tmp_path):
    model = save_diffusion(tmp_path, **{option: False})
    for given in (model, model.denoiser):
        assert f"Train one with --{option}=True" in refusal(make_engine, given)


def test_spaces_of_another_dataset_are_noticed(tmp_path):
    model = save_diffusion(tmp_path)
    other = copy.deepcopy(make_spaces())
    other.observation_limits.maximum += 0.5
    assert "spaces has other limits than the diffusion model" in refusal(RolloutEngine, [model], None, other, HORIZON)
    policy, engine = save_policy(tmp_path, "td3_bc"), make_engine(model)
    policy.spaces.z_score.mean += 0.1
    assert "The policy was trained in other spaces than the engine's" in refusal(engine.roll_out, policy, starts(), generator())
    assert engine.roll_out(policy.agent, starts(), generator()).action.isfinite().all()
    assert "dynamics must be what load_dynamics gives" in refusal(RolloutEngine, [model], None, make_spaces(), HORIZON)
    assert "spaces must be Spaces" in refusal(RolloutEngine, [model], None, SimpleNamespace(), HORIZON)


def test_other_things_than_a_dataset_or_a_rollout_are_named(tmp_path):
    save_diffusion(tmp_path)
    assert isinstance(load_diffusion_model(tmp_path), DiffusionModel), "a run's folder will do"
    if not torch.cuda.is_available():
        assert "PyTorch finds no CUDA GPU" in refusal(load_diffusion_model, tmp_path, None, "cuda")
    assert "dataset must be what load_dataset gives" in refusal(load_diffusion_model, tmp_path, make_spaces())
    trajectory = make_engine().roll_out(act, starts(), generator())
    assert "trajectory must be what RolloutEngine.roll_out gives" in refusal(score, act, tuple(trajectory))
    for wrong in (trajectory, DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM)):
        assert "reward_model must be what load_reward gives" in refusal(score, wrong, trajectory)


def test_the_home_folder_in_paths_of_models(monkeypatch, tmp_path):
    save_diffusion(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(load_diffusion_model("~/model.safetensors"), DiffusionModel)


def test_models_of_another_horizon(tmp_path):
    unet = {"kind": "UNet_RL", "dim_mults": [1, 2]}
    for given in (make_denoiser(**unet, horizon=8), save_diffusion(tmp_path, network={"horizon": 8}).denoiser):
        message = refusal(make_engine, make_denoiser(), given)
        assert message == "horizon is 4, but the diffusion model was made for 8: let both be the same."
    assert make_engine(make_denoiser(**unet)).roll_out(act, starts(), generator()).action.isfinite().all()


def test_a_loaded_model_is_as_good_as_its_denoiser(tmp_path):
    model = save_diffusion(tmp_path)
    results = [make_engine(each).roll_out(act, starts(), generator()) for each in (model, model.denoiser)]
    assert torch.equal(*(trajectory.observation for trajectory in results))
    assert "put brackets around one" in refusal(RolloutEngine, model, None, make_spaces(), HORIZON)
    assert "not 'model.safetensors'" in refusal(make_engine, "model.safetensors")


# Policies that draw their actions


@pytest.mark.parametrize("name", AGENTS)
def test_agents_and_loaded_policies_are_rolled_out_as_they_are(name, tmp_path):
    engine, policy = make_engine(), save_policy(tmp_path, name)
    source = generator()
    expected = engine.roll_out(lambda o: policy.agent.act(o, source), starts(), source)
    for given in (policy, policy.agent):
        trajectory = engine.roll_out(given, starts(), generator())
        with NoHostReads():  # what is captured on a GPU
            engine._chunk_function(given, generator(), None, engine.iterations, len(starts()))(starts())
        assert torch.equal(trajectory.action, expected.action) and torch.equal(trajectory.observation, expected.observation)


def test_an_agents_act_alone_is_told_what_it_lacks():
    message = refusal(make_engine().roll_out, make_agent("diffusion_ql").act, starts(), generator())
    assert "RolloutEngine.roll_out takes the agent or the loaded policy itself" in message


def test_graphs_belong_to_the_agent_or_policy_that_is_given(tmp_path):
    """The choice among them alone, with a generator that only says that it is on a GPU."""
    engine, policy = make_engine(), save_policy(tmp_path, "diffusion_ql")
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda")})()
    for given, other in ((policy, save_policy(tmp_path, "diffusion_ql")), (policy.agent, make_agent("diffusion_ql"))):
        first, again, others = (engine._chunk_function(each, on_gpu, None, 1, 8) for each in (given, given, other))
        assert isinstance(first, GraphedFunction) and again is first and others is not first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
@pytest.mark.parametrize("name", AGENTS)
def test_captured_rollouts_of_an_agent_are_the_plain_ones(cards, name):  # noqa: F811
    results = []
    for capture in (False, True):
        engine, agent = make_engine(device=SECOND, capture=capture), make_agent(name, SECOND)
        source = torch.Generator(SECOND).manual_seed(3)
        results.append([engine.roll_out(agent, starts().to(SECOND), source) for _ in range(4)])
        assert len(engine._captured) == int(capture)
    for plain, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured.action.cpu(), plain.action.cpu(), rtol=1e-4, atol=1e-4)


# Policies in raw space


@pytest.mark.parametrize("name", AGENTS)
def test_a_loaded_policy_acts_without_a_generator(name, tmp_path):
    raw = starts(6).numpy()
    policy, again = (save_policy(tmp_path, name) for _ in range(2))
    actions = [policy(raw), policy(raw)]
    assert all(action.shape == (6, ACTION_DIM) and np.isfinite(action).all() for action in actions)
    assert np.array_equal(actions[0], actions[1]) == (name != "diffusion_ql"), "each call draws anew"
    np.testing.assert_array_equal(actions, [again(raw), again(raw)])
    np.testing.assert_array_equal(policy(raw, generator(7)), policy(raw.astype(np.float64), generator(7)))


def test_observations_of_another_width_are_not_broadcast(tmp_path):
    policy, raw = save_policy(tmp_path, "td3_bc"), starts().numpy()
    for wrong, given in ((raw[:, :1], "[5, 1]"), (raw[0], "[3]")):
        assert f"observation must be an array of numbers [n, 3], one observation a row, not one {given}" in refusal(policy, wrong)
    assert "one observation a row, not None" in refusal(policy, None)
    assert "generator must be a torch.Generator, or None for the policy's own, not 3" in refusal(policy, raw, 3)
    policy.agent.act_for_evaluation = lambda observation, generator: observation[:, :1]
    with pytest.raises(DydiffError, match=r"What the policy returns must be a torch tensor \[5, 2\]"):
        policy(raw)
