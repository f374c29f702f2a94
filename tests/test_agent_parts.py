"""What agents are made of: networks, the density of the policy, and the optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from test_agents import ACTION_DIM, OBSERVATION_DIM, assert_same, generator

from dydiff.agents import updates
from dydiff.agents.td3_bc import TD3BC
from dydiff.agents.updates import Adam
from dydiff.networks.mlp import MLP, mish
from dydiff.networks.policy import TanhGaussianPolicy


def test_policy_log_density_integrates_to_one_and_stays_finite():
    policy = TanhGaussianPolicy(1, 1, [8], generator=generator())
    noise = torch.linspace(-8, 8, 4001)[:, None]
    with torch.no_grad():
        action, log_prob = policy.sample_with_log_prob(torch.zeros(1, 1), noise)
    assert float(torch.trapezoid(log_prob.double().exp(), action[:, 0].double())) == pytest.approx(1, abs=1e-3)
    _, extreme = policy.sample_with_log_prob(torch.zeros(1, 1), torch.tensor([[1e4]]))
    assert extreme.isfinite().all()


def test_ensemble_member_equals_its_mlp():
    critics = TD3BC(OBSERVATION_DIM, ACTION_DIM, [8, 8], generator=generator()).critics
    single = MLP(OBSERVATION_DIM + ACTION_DIM, [8, 8], 1, generator=generator(5))
    critics.load_member_state_dict(1, single.state_dict())
    x = torch.randn(6, OBSERVATION_DIM + ACTION_DIM, generator=generator(6))
    torch.testing.assert_close(critics(x)[1], single(x))
    torch.testing.assert_close(critics(x, critics.gather(torch.tensor([1])))[0], single(x))
    torch.testing.assert_close(critics(x, critics.gather(1)), single(x))
    assert_same(critics.member_state_dict(1), dict(single.state_dict()))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_adam_is_the_known_one(compiling, max_norm, monkeypatch):
    """Kernel and formula against torch.optim.Adam, with the learning rate changed and the state carried over on the way."""
    monkeypatch.setattr(updates, "is_compiling", lambda: compiling)
    ours, theirs = MLP(3, [8], 2, generator=generator()), MLP(3, [8], 2, generator=generator())
    optimizer, reference = Adam(ours.parameters(), 1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    x = torch.randn(6, 3, generator=generator(1))
    for step in range(6):
        norm = optimizer.descend(ours(x).square().sum(), max_norm)
        reference.zero_grad()
        theirs(x).square().sum().backward()
        if max_norm is not None:
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
            torch.testing.assert_close(norm, expected)
        reference.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other)
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Adam(ours.parameters(), 1.0)
            optimizer.load_state_dict(saved)
        if step == 3:
            optimizer.lr.fill_(3e-3)
            reference.param_groups[0]["lr"] = 3e-3


def test_mish_is_the_known_one_for_every_input():
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    torch.testing.assert_close(mish(x).double(), torch.nn.functional.mish(x.double()), rtol=1e-5, atol=1e-12)
    inputs = x.double().requires_grad_()
    ours, theirs = (torch.autograd.grad(function(inputs).sum(), inputs)[0] for function in (mish, torch.nn.functional.mish))
    torch.testing.assert_close(ours, theirs)
