"""The behaviour policies that ship: what their files say is true, and their densities are those of what they draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from dydiff.collecting import behaviour
from dydiff.collecting.behaviour import SHIPPED, UniformPolicy, load_policy, save_policy, shipped_policies
from dydiff.collecting.episodes import Work, record_episodes
from dydiff.data.d4rl import LOCAL_LOCOMOTION
from dydiff.environments import environment_spec
from dydiff.errors import DydiffError

REPOSITORY = Path(__file__).parents[1]
every_environment = pytest.mark.parametrize("environment", LOCAL_LOCOMOTION)


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in SHIPPED.iterdir()]
    assert max(sizes) < 200_000 and sum(sizes) < 4_000_000


@every_environment
def test_each_environment_has_its_policies_in_order(environment):
    (medium,), (expert,) = (shipped_policies(environment, role) for role in ("medium", "expert"))
    replays = shipped_policies(environment, "replay-*")
    assert [policy.facts["name"] for policy in replays] == [f"{environment}-replay-{i}" for i in range(len(replays))]
    steps = [policy.facts["steps"] for policy in (*replays, medium, expert)]
    assert len(replays) >= 3 and steps == sorted(set(steps))
    returns = [policy.facts["return_mean"] for policy in (replays[0], medium, expert)]
    assert returns == sorted(returns) and 0.25 < returns[1] / returns[2] < 0.7
    for policy in (*replays, medium, expert):
        facts = policy.facts
        assert facts["environment"] == environment and facts["measured_episodes"] >= 20
        assert facts["command"].startswith("python exp_specs/behaviour/train_behaviour.py train")
        assert {"return_sd", "length_mean", "measured_on", "backend", "mujoco_version"} <= facts.keys()


def test_the_table_says_what_the_files_say():
    lines = {line.split(" | ")[0]: line for line in (REPOSITORY / "exp_specs/behaviour/policies.md").read_text().splitlines()}
    for path in SHIPPED.iterdir():
        facts = load_policy(path).facts
        assert facts["name"] == path.stem
        assert f"| {facts['return_mean']:.0f} ± {facts['return_sd']:.0f} |" in lines[f"| {path.stem}"]


@every_environment
def test_medium_earns_what_its_file_says(environment):
    spec = environment_spec(environment)
    (policy,) = shipped_policies(environment, "medium")
    episodes = 6
    rows = record_episodes(Work(spec, policy, (7, 0), range(episodes)))
    assert (rows["terminals"] | rows["timeouts"]).sum() == episodes
    error = rows["rewards"].sum() / episodes - policy.facts["return_mean"]
    assert abs(error) < 4 * policy.facts["return_sd"] / episodes**0.5


@every_environment
def test_a_shipped_policy_is_a_tanh_gaussian(environment):
    (policy,) = shipped_policies(environment, "expert")
    spec = environment_spec(environment)
    generator = np.random.default_rng(0)
    observation = generator.standard_normal((5, spec.observation_dim)).astype(np.float32)
    noise = policy.draw_noise(generator, 5)
    action, log_prob = policy.act(observation, noise)
    assert action.dtype == np.float32 and action.shape == noise.shape == (5, spec.action_dim)

    weights = {name: torch.from_numpy(values).double() for name, values in policy.weights.items()}
    x = torch.from_numpy(observation).double()
    for layer in ("fc0", "fc1"):
        x = torch.tanh(torch.nn.functional.linear(x, weights[f"{layer}/weight"], weights[f"{layer}/bias"]))
    mean, log_std = (
        torch.nn.functional.linear(x, weights[f"{head}/weight"], weights[f"{head}/bias"]) for head in ("last_fc", "last_fc_log_std")
    )
    pre_tanh = mean + log_std.exp() * torch.from_numpy(noise)
    density = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=1))
    expected = torch.tanh(pre_tanh)
    np.testing.assert_allclose(action, expected, atol=1e-5)
    transform = density.transforms[0]
    reference = density.base_dist.log_prob(pre_tanh) - transform.log_abs_det_jacobian(pre_tanh, expected).sum(-1)
    np.testing.assert_allclose(log_prob, reference, rtol=1e-3, atol=1e-3)


def test_a_saturated_action_has_a_finite_density():
    (policy,) = shipped_policies("hopper", "medium")
    action, log_prob = policy.act(np.zeros((1, 11), np.float32), np.full((1, 3), 1e4, np.float32))
    np.testing.assert_array_equal(action, 1.0)
    assert np.isfinite(log_prob).all()


def test_uniform_actions_fill_their_bounds_evenly():
    policy = UniformPolicy((-1.0, 0.0), (1.0, 4.0))
    noise = policy.draw_noise(np.random.default_rng(0), 20_000)
    action, log_prob = policy.act(np.zeros((20_000, 3), np.float32), noise)
    np.testing.assert_allclose(np.quantile(action, (0, 0.25, 1), axis=0), [[-1, 0], [-0.5, 1], [1, 4]], atol=0.05)
    np.testing.assert_allclose(log_prob, -np.log(2 * 4), rtol=1e-6)


def test_round_trip(tmp_path):
    (policy,) = shipped_policies("hopper", "medium")
    save_policy(tmp_path / "a.safetensors", policy.weights, policy.facts)
    copy = load_policy(tmp_path / "a.safetensors")
    assert copy.facts == policy.facts and copy.weights.keys() == policy.weights.keys()
    for name, values in policy.weights.items():
        np.testing.assert_array_equal(copy.weights[name], values)


def test_a_package_without_its_policies_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour, "SHIPPED", tmp_path)
    with pytest.raises(DydiffError, match="hopper-medium.*install dydiff anew"):
        shipped_policies("hopper", "medium")
    (tmp_path / "hopper-medium.safetensors").write_bytes(b"cut off")
    with pytest.raises(DydiffError, match="hopper-medium.*install dydiff anew"):
        shipped_policies("hopper", "medium")
