"""The agents: one interface for all, and what each of them must learn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch._dynamo  # finds functions by identity from its import on: it must not meet a patched is_compiling
from torch._subclasses.fake_tensor import FakeTensorMode

from dydiff.agents import AGENTS, updates
from dydiff.agents.cql import CQL
from dydiff.agents.td3_bc import TD3BC
from dydiff.data.transitions import Transitions

OBSERVATION_DIM, ACTION_DIM, BATCH = 4, 2, 16

# Every agent, and the options that change an update's path. Moving averages start early enough to be reached.
VARIANTS = {
    "td3_bc": ("td3_bc", {}),
    "diffusion_ql": ("diffusion_ql", {"ema_start": 2, "ema_every": 2}),
    "diffusion_ql-max_q_backup": ("diffusion_ql", {"max_q_backup": True, "beta_schedule": "cosine", "grad_norm": 0.0}),
    "diffusion_ql-lr_decay": ("diffusion_ql", {"lr_decay": True, "num_epochs": 4, "beta_schedule": "linear"}),
    "cql": ("cql", {"num_random": 3}),
}
every_agent = pytest.mark.parametrize("variant", VARIANTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_agent(variant: str, seed: int = 0):
    name, options = VARIANTS[variant]
    return AGENTS[name](OBSERVATION_DIM, ACTION_DIM, [16, 16], generator=generator(seed), **options)


def make_batch(random: torch.Generator, size: int = BATCH) -> Transitions:
    return Transitions(
        torch.randn(size, OBSERVATION_DIM, generator=random),
        torch.rand(size, ACTION_DIM, generator=random) * 2 - 1,
        torch.randn(size, generator=random),
        torch.randn(size, OBSERVATION_DIM, generator=random),
        (torch.rand(size, generator=random) < 0.2).float(),
    )


def train(agent, random: torch.Generator, num_updates: int) -> list[dict]:
    logs = []
    for _ in range(num_updates):
        batch = make_batch(random)
        logs.append(agent.update(batch, agent.draw_noise(BATCH, random)))
    agent.end_epoch()
    return logs


def leaves(tree, path: str = "") -> dict:
    """The values of a nested tree by path, which also shows that it holds nothing but plain values and tensors."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{path}/{i}").items()}
    assert tree is None or isinstance(tree, (torch.Tensor, int, float, str, bool)), f"{path} is a {type(tree)}"
    return {path: tree}


def assert_same(first, second) -> None:
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
        assert same, path


@every_agent
def test_actions_have_shape_and_bounds(variant):
    agent = make_agent(variant)
    observation = 10 * torch.randn(7, OBSERVATION_DIM, generator=generator(1))
    for act in (agent.act, agent.act_for_evaluation):
        action = act(observation, generator(2))
        assert action.shape == (7, ACTION_DIM) and not action.requires_grad
        assert action.abs().max() <= 1
        assert torch.equal(action, act(observation, generator(2)))


@every_agent
def test_update_logs_scalars_and_keeps_storage(variant):
    agent = make_agent(variant)
    before = {path: value.data_ptr() for path, value in leaves(agent.state_dict()).items() if torch.is_tensor(value)}
    logs = train(agent, generator(1), 6)
    for log in logs:
        for name, value in log.items():
            assert value.shape == () and not value.requires_grad and value.isfinite(), name
    after = leaves(agent.state_dict())
    assert all(after[path].data_ptr() == pointer for path, pointer in before.items())
    assert agent.step == 6


@every_agent
def test_update_never_asks_the_device(variant, monkeypatch):
    monkeypatch.setattr(updates, "is_compiling", lambda: True)  # the optimizer's kernel does not know such tensors
    agent = make_agent(variant)
    random = generator(1)
    batch, noise = make_batch(random), agent.draw_noise(BATCH, random)
    variants = {(i % 2 == 0,) * len(agent.variant()) for i in range(2)}
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: reading one raises
        for decisions in variants:
            agent.apply_update(batch, noise, decisions)


@every_agent
def test_equal_seeds_give_equal_runs_without_the_global_generator(variant):
    state = torch.get_rng_state()
    first, second, other = make_agent(variant, 3), make_agent(variant, 3), make_agent(variant, 4)
    for agent in (first, second):
        train(agent, generator(5), 5)
    assert_same(first.state_dict(), second.state_dict())
    train(other, generator(5), 5)
    assert not torch.equal(first.critics.layers[0].weight, other.critics.layers[0].weight)
    assert torch.equal(state, torch.get_rng_state())


@every_agent
def test_state_dict_continues_bit_exactly(variant):
    random = generator(1)
    agent = make_agent(variant, seed=0)
    train(agent, random, 5)
    saved, saved_random = copy.deepcopy(agent.state_dict()), random.get_state()
    train(agent, random, 5)

    resumed = make_agent(variant, seed=9)
    train(resumed, generator(7), 2)  # whatever it was before must not matter
    resumed.load_state_dict(saved)
    random.set_state(saved_random)
    train(resumed, random, 5)
    assert_same(agent.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "name, options, updates",
    [
        ("td3_bc", {"alpha": 2.5, "policy_lr": 3e-3, "qf_lr": 3e-3, "policy_freq": 1}, 250),
        ("diffusion_ql", {"eta": 10.0, "lr": 3e-3, "ema_start": 0}, 200),
        ("cql", {"policy_lr": 3e-3, "qf_lr": 3e-3, "min_q_weight": 0.1, "num_random": 4}, 250),
    ],
)
def test_finds_the_better_action_of_a_bandit(name, options, updates):
    """Actions are uniform in the data; the reward peaks at +0.6, so cloning alone would stay at a mean of 0."""
    random = generator(0)
    agent = AGENTS[name](1, 1, [32, 32], generator=random, **options)
    for _ in range(updates):
        observation = torch.randn(64, 1, generator=random)
        action = torch.rand(64, 1, generator=random) * 2 - 1
        reward = 1 - (action[:, 0] - 0.6).square()
        batch = Transitions(observation, action, reward, observation, torch.ones(64))
        agent.update(batch, agent.draw_noise(64, random))
    chosen = agent.act_for_evaluation(torch.randn(64, 1, generator=random), random)
    assert (chosen - 0.6).abs().mean() < 0.25


def test_td3_bc_with_little_weight_on_q_clones_a_linear_policy():
    random = generator(0)
    gain = torch.tensor([[0.5, -0.3], [0.1, 0.4]])
    agent = TD3BC(2, 2, [64], alpha=1e-6, policy_lr=3e-3, policy_freq=1, generator=random)
    for _ in range(600):
        observation = torch.rand(128, 2, generator=random) * 2 - 1
        batch = Transitions(observation, observation @ gain, torch.zeros(128), observation, torch.ones(128))
        agent.update(batch, agent.draw_noise(128, random))
    observation = torch.rand(200, 2, generator=random) * 2 - 1
    assert (agent.act(observation) - observation @ gain).abs().mean() < 0.03


def test_td3_bc_moves_policy_and_targets_by_tau_every_second_update():
    agent = TD3BC(OBSERVATION_DIM, ACTION_DIM, [16], tau=0.25, generator=generator(0))
    start = copy.deepcopy(agent.state_dict())
    random = generator(1)
    log = train(agent, random, 1)[0]
    for name in ("policy", "target_policy", "target_critics"):
        assert_same(agent.state_dict()[name], start[name])
    assert "policy_loss" not in log
    log = train(agent, random, 1)[0]
    assert "policy_loss" in log
    for source, target in (("policy", "target_policy"), ("critics", "target_critics")):
        for key, moved in agent.state_dict()[target].items():
            expected = 0.75 * start[target][key] + 0.25 * agent.state_dict()[source][key]
            torch.testing.assert_close(moved, expected)
            assert not torch.equal(moved, start[target][key])


def test_cql_soft_maximum_of_a_constant_is_its_integral():
    """If Q = c everywhere, the integral of exp Q over [-1, 1]^A is 2^A e^c."""
    agent = CQL(OBSERVATION_DIM, ACTION_DIM, [16], num_random=4000, generator=generator())
    with torch.no_grad():
        agent.critics.layers[-1].weight.zero_()
        agent.critics.layers[-1].bias.fill_(1.5)
        agent.policy.network.layers[-1].bias[ACTION_DIM:] = -0.2  # near uniform after the tanh: small variance
    batch = make_batch(generator(1), 4)
    value = agent._soft_maximum(batch, agent.draw_noise(4, generator(2)))
    torch.testing.assert_close(value, torch.full((2, 4), 1.5 + ACTION_DIM * math.log(2)), rtol=0, atol=0.1)
