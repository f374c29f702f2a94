"""Which rollouts are kept: by score, hard or sampled (SPEC section 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.errors import DydiffError

FLOOR = 1e-6  # probability mass spread evenly, so that every rollout can be drawn


def hardmax_mask(score: Tensor, threshold: float) -> Tensor:
    """Mark the best fraction `threshold` of the scores: score [B] -> bool [B]; ties at the quantile are kept."""
    score = score.double() / 2  # keeps the differences of the largest doubles finite
    return score >= torch.quantile(score, 1 - threshold)


def softmax_probability(score: Tensor, softmax_temp: float) -> Tensor:
    """Probability of each rollout to be drawn, score [B] -> float64 [B]; does not overflow for any finite scores.

    Scores are standardised (population deviation + 1e-6) and divided by the temperature; a temperature of 0 or below takes
    exp(score - mean) instead.
    """
    score = score.double()
    if softmax_temp > 0:
        # Keeps the deviation of the largest doubles finite; a power of two, so that close scores stay exactly as far apart.
        largest = score.abs().max().clamp_min(1)
        scale = largest / (2 * torch.frexp(largest).mantissa)
        unit = score / scale
        logit = (unit - unit.mean()) / (unit.std(unbiased=False) + 1e-6 / scale) / softmax_temp
    else:
        logit = score  # the softmax is the same with and without the mean
    return torch.softmax(logit, dim=0) * (1 - FLOOR) + FLOOR / len(score)


def softmax_mask(score: Tensor, threshold: float, softmax_temp: float, generator: torch.Generator) -> Tensor:
    """Draw int(threshold B) rollouts without replacement by `softmax_probability`: score [B] -> bool [B].

    Gumbel top-k draws exactly this without a loop (arXiv 1903.06059).
    """
    probability = softmax_probability(score, softmax_temp)
    uniform = torch.rand(len(score), dtype=torch.float64, generator=generator, device=score.device)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    chosen = torch.topk(probability.log() + gumbel, int(threshold * len(score))).indices
    return torch.zeros(len(score), dtype=torch.bool, device=score.device).index_fill_(0, chosen, True)


def keep_mask(score: Tensor, filter_type: str, threshold: float, softmax_temp: float, generator: torch.Generator) -> Tensor:
    """Apply the filter by its name: score [B] -> bool [B].

    Raises:
        DydiffError: unknown filter, or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise DydiffError(f"keep_condition.threshold must be in (0, 1]; {threshold} is not.")
    if filter_type == "hardmax":
        return hardmax_mask(score, threshold)
    if filter_type == "softmax":
        return softmax_mask(score, threshold, softmax_temp, generator)
    raise DydiffError(f"keep_condition.filter_type '{filter_type}' is unknown; choose softmax or hardmax.")
