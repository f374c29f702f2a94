"""The three spaces: exact edges, round trips, and degenerate columns."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dydiff.data import Limits, Spaces, Transitions, ZScore, dataset_from_arrays, make_transitions
from dydiff.errors import DydiffError

finite = st.floats(-1e6, 1e6, width=32)
columns = hnp.arrays(np.float32, st.tuples(st.integers(2, 8), st.integers(1, 4)), elements=finite)


def make_spaces(low: float = -2.0, high: float = 3.0) -> tuple[Spaces, Transitions]:
    generator = np.random.default_rng(2)
    arrays = {
        "observations": generator.normal(3.0, 5.0, (200, 4)),
        "actions": generator.uniform(low, high, (200, 2)),
        "rewards": generator.standard_normal(200),
        "terminals": generator.random(200) < 0.1,
        "timeouts": np.zeros(200, bool),
    }
    arrays["observations"][:, 3] = 0.25
    dataset = dataset_from_arrays(arrays, "test")
    transitions = make_transitions(dataset)
    return Spaces.from_dataset(dataset, transitions, np.full(2, low), np.full(2, high)), transitions


@settings(max_examples=150, deadline=None)
@given(columns)
def test_limits_round_trip(raw):
    limits = Limits(raw.min(axis=0), raw.max(axis=0))
    model = limits.normalize(torch.from_numpy(raw))
    assert model.isfinite().all() and model.abs().max() <= 1 + 1e-6
    back = limits.unnormalize(model).numpy()
    np.testing.assert_allclose(back, raw, atol=1e-6 * np.abs(raw).max() + 1e-37)
    constant = raw.min(axis=0) == raw.max(axis=0)
    assert (model.numpy()[:, constant] == 0).all()
    np.testing.assert_array_equal(back[:, constant], raw[:, constant])


def test_limits_formula_and_clip():
    limits = Limits(np.array([-1.0, 5.0, 2.0]), np.array([3.0, 9.0, 2.0]))
    raw = torch.tensor([[-1.0, 9.0, 2.0], [1.0, 11.0, 2.0]])
    assert torch.equal(limits.normalize(raw), torch.tensor([[-1.0, 1.0, 0.0], [0.0, 2.0, 0.0]]))
    model = torch.tensor([[-7.0, 1.5, 0.9], [0.0, -1.0, -4.0]])
    assert torch.equal(limits.unnormalize(model), torch.tensor([[-1.0, 9.0, 2.0], [1.0, 5.0, 2.0]]))
    part = limits.part(slice(1, None))
    assert part.dim == 2 and torch.equal(part.normalize(raw[:, 1:]), limits.normalize(raw)[:, 1:])


def test_limits_keep_precision_far_from_zero():
    limits = Limits(np.array([1000.0]), np.array([1000.001], dtype=np.float32))
    model = limits.normalize(torch.stack([limits.minimum, limits.maximum]))
    assert torch.equal(model, torch.tensor([[-1.0], [1.0]]))


@settings(max_examples=150, deadline=None)
@given(columns)
def test_z_score_matches_its_formula(raw):
    transitions = Transitions(raw, raw, raw[:, 0], raw, raw[:, 0] > 0)
    z_score = ZScore.from_transitions(transitions)
    mean, std = raw.mean(axis=0, dtype=np.float64), raw.std(axis=0, dtype=np.float64)
    np.testing.assert_allclose(z_score.mean.numpy(), mean, rtol=1e-6, atol=1e-6 * np.abs(raw).max() + 1e-37)
    np.testing.assert_allclose(z_score.std.numpy(), std, rtol=1e-5, atol=1e-6 * np.abs(raw).max() + 1e-37)
    policy = z_score.normalize(torch.from_numpy(raw))
    assert policy.isfinite().all()
    constant = raw.min(axis=0) == raw.max(axis=0)
    assert (policy.numpy()[:, constant] == 0).all()
    back = z_score.unnormalize(policy).numpy()
    # Only `normalize` adds eps to std, so the way back falls short by |o - mean| eps / (std + eps) < sqrt(N - 1) eps.
    shortfall = np.sqrt(len(raw)) * np.finfo(np.float32).eps
    np.testing.assert_allclose(back, raw, atol=3e-6 * np.abs(raw).max() + shortfall)


def test_z_score_statistics_over_many_chunks():
    raw = np.random.default_rng(0).normal(1000.0, 0.1, (150_000, 2)).astype(np.float32)
    z_score = ZScore.from_transitions(Transitions(raw, raw, raw[:, 0], raw, raw[:, 0] > 0))
    np.testing.assert_allclose(z_score.mean.numpy(), raw.mean(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(z_score.std.numpy(), raw.std(axis=0, dtype=np.float64), rtol=1e-6)


def test_spaces_round_trips_and_shapes():
    spaces, transitions = make_spaces()
    observation = torch.from_numpy(transitions.observation).reshape(-1, 1, 4)
    action = torch.from_numpy(transitions.action).reshape(-1, 1, 2)
    policy = spaces.observation_raw_to_policy(observation)
    model = spaces.observation_policy_to_model(policy)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(spaces.observation_policy_to_raw(policy), observation, **close)
    torch.testing.assert_close(model, spaces.observation_limits.normalize(observation), **close)
    torch.testing.assert_close(spaces.observation_model_to_policy(model), policy, **close)
    assert policy[..., 3].abs().max() == 0 and model[..., 3].abs().max() == 0
    policy = spaces.action_raw_to_policy(action)
    model = spaces.action_policy_to_model(policy)
    assert policy.abs().max() <= 1
    torch.testing.assert_close(spaces.action_policy_to_raw(policy), action, **close)
    torch.testing.assert_close(model, spaces.action_limits.normalize(action), **close)
    torch.testing.assert_close(spaces.action_model_to_policy(model), policy, **close)
    edge = spaces.action_model_to_policy(torch.full((1, 2), 9.0))
    torch.testing.assert_close(edge, spaces.action_raw_to_policy(spaces.action_limits.maximum[None]), **close)


def test_actions_of_unit_range_stay_bit_equal():
    spaces, _ = make_spaces(-1.0, 1.0)
    action = torch.empty(1000, 2).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spaces.action_policy_to_raw(action), action)
    assert torch.equal(spaces.action_raw_to_policy(action), action)


def test_transitions_to_policy():
    spaces, transitions = make_spaces()
    converted = spaces.transitions_to_policy(transitions, "cpu")
    assert all(values.dtype == torch.float32 for values in converted)
    assert torch.equal(
        converted.next_observation, spaces.observation_raw_to_policy(torch.tensor(transitions.next_observation))
    )
    assert torch.equal(converted.action, spaces.action_raw_to_policy(torch.tensor(transitions.action)))
    assert converted.terminal.tolist() == transitions.terminal.tolist()
    converted.reward.zero_()  # a copy: the dataset is not touched
    assert np.abs(transitions.reward).max() > 0


def test_buffers_do_not_share_memory_with_the_caller():
    minimum = np.zeros(1, np.float32)
    limits = Limits(minimum, np.ones(1, np.float32))
    minimum[0] = -5.0
    assert limits.minimum.item() == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limits(np.ones(2), np.zeros(2)), "minimum <= maximum"),
        (lambda: Limits(np.array([np.nan]), np.ones(1)), "no NaN"),
        (lambda: Limits(np.ones(2), np.ones(3)), r"not shapes \(2,\) and \(3,\)"),
        (lambda: ZScore(np.zeros(2), -np.ones(2)), "std >= 0"),
        (lambda: ZScore(np.zeros(2), np.ones(3)), r"not shapes \(2,\) and \(3,\)"),
        (
            lambda: Spaces(Limits(np.zeros(4), np.ones(4)), ZScore(np.zeros(4), np.ones(4)), -np.ones(2), np.ones(2)),
            "limits have 4 columns, but the environment has 4 observation and 2 action columns",
        ),
        (
            lambda: Spaces(Limits(np.zeros(6), np.ones(6)), ZScore(np.zeros(4), np.ones(4)), np.ones(2), np.ones(2)),
            "low < high",
        ),
    ],
)
def test_refuses_what_does_not_fit(make, words):
    with pytest.raises(DydiffError, match=words):
        make()
