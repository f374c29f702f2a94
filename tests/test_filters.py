"""Which rollouts are kept: properties for any finite scores, and frequencies against the probabilities."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydiff.errors import DydiffError
from dydiff.filters import FLOOR, hardmax_mask, keep_mask, softmax_mask, softmax_probability

finite = st.floats(-1e308, 1e308, allow_nan=False)
scores = st.lists(finite, min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float64))
ordinary_scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40).map(torch.tensor)
thresholds = st.floats(1e-3, 1)
temperatures = st.sampled_from([0.05, 1.0, 30.0, 0.0, -1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(scores, temperatures)
def test_probabilities_are_finite_sum_to_one_and_rise_with_the_score(score, temperature):
    probability = softmax_probability(score, temperature)
    assert probability.dtype == torch.float64 and probability.isfinite().all()
    assert math.isclose(float(probability.sum()), 1, rel_tol=1e-12)
    assert (probability >= FLOOR / len(score) * (1 - 1e-12)).all(), "every rollout can be drawn"
    assert (probability[score.argsort()].diff() >= 0).all()


def test_probabilities_by_hand():
    score = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for temperature in (0.5, -1.0):
        mean = score.mean()
        z = (score - mean) / ((score - mean).square().mean().sqrt() + 1e-6)
        weight = torch.exp(z / temperature) if temperature > 0 else torch.exp(score - mean)
        expected = weight / weight.sum() * (1 - 1e-6) + 1e-6 / 3
        torch.testing.assert_close(softmax_probability(score, temperature), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("centre", "spread"), [(1e6, 1e-6), (1e5, 1e-5), (-1e9, 1.0)])
def test_close_scores_far_from_zero_keep_their_differences(centre, spread):
    score = centre + spread * torch.randn(40, dtype=torch.float64, generator=generator())
    exact = [Fraction(value) for value in score.tolist()]  # doubles hold the scores; only the arithmetic may round
    mean = sum(exact) / len(exact)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in exact) / len(exact)) + 1e-6
    expected = torch.softmax(torch.tensor([float(value - mean) for value in exact], dtype=torch.float64) / deviation / 0.05, 0)
    torch.testing.assert_close(softmax_probability(score, 0.05), expected * (1 - FLOOR) + FLOOR / 40, rtol=1e-6, atol=0)


def test_equal_scores_are_equally_likely():
    for value in (0.0, -3.0, 1e-300, 1e308):
        probability = softmax_probability(torch.full((7,), value, dtype=torch.float64), 0.05)
        torch.testing.assert_close(probability, torch.full((7,), 1 / 7, dtype=torch.float64))


@given(scores, thresholds, temperatures, st.integers(0, 100))
def test_softmax_draws_the_stated_number(score, threshold, temperature, seed):
    mask = softmax_mask(score, threshold, temperature, generator(seed))
    assert mask.dtype == torch.bool and mask.shape == score.shape
    assert int(mask.sum()) == int(threshold * len(score))


@given(scores, thresholds)
def test_hardmax_keeps_the_best_and_at_least_the_fraction(score, threshold):
    mask = hardmax_mask(score, threshold)
    assert int(mask.sum()) >= int(threshold * len(score))
    if not mask.all():
        assert score[~mask].max() < score[mask].min()


@given(ordinary_scores, thresholds)
def test_hardmax_is_the_quantile_rule(score, threshold):
    double = score.double()
    assert torch.equal(hardmax_mask(score, threshold), double >= torch.quantile(double, 1 - threshold))


def test_hardmax_keeps_ties():
    assert hardmax_mask(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.5).tolist() == [False, True, True, True]


def test_gumbel_top_k_draws_without_replacement_in_proportion():
    """First and second draw of 2 out of 4: pairs against p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    score = torch.tensor([0.0, 0.5, 1.0, 1.2])
    probability = softmax_probability(score, softmax_temp=1.0).tolist()
    draws = 4000
    source = generator(7)
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(draws):
        counts[tuple(softmax_mask(score, 0.5, 1.0, source).nonzero().flatten().tolist())] += 1
    chi_square = 0.0
    for (i, j), count in counts.items():
        p, q = probability[i], probability[j]
        expected = draws * (p * q / (1 - p) + q * p / (1 - q))
        chi_square += (count - expected) ** 2 / expected
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded by chance once in a thousand seeds


def test_equal_seeds_keep_equal_rollouts_and_others_do_not():
    score = torch.randn(50, generator=generator())
    masks = [keep_mask(score, "softmax", 0.5, 1.0, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_a_low_temperature_keeps_the_best():
    score = torch.arange(10.0)
    mask = keep_mask(score, "softmax", 0.3, 1e-3, generator())
    assert mask[-1]  # the runners-up share the floor, and are drawn alike


def test_keep_mask_names_what_is_wrong():
    score = torch.zeros(4)
    for threshold in (0, -0.1, 1.1, math.nan):
        with pytest.raises(DydiffError, match="threshold must be in"):
            keep_mask(score, "hardmax", threshold, 1, generator())
    with pytest.raises(DydiffError, match="'hard' is unknown; choose softmax or hardmax"):
        keep_mask(score, "hard", 0.5, 1, generator())
    assert keep_mask(score, "hardmax", 1, 1, generator()).all()
