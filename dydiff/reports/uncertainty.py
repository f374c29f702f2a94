"""How sure a mean over few values is."""

from __future__ import annotations

import numpy as np

RESAMPLES, INTERVAL = 2000, (0.025, 0.975)


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of values [n], or None where a single one does not tell."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def mean_with_error(values: np.ndarray) -> dict[str, float | None]:
    """Mean of values [n] and its standard error, as far as they are known."""
    return {"mean": float(values.mean()) if len(values) else None, "standard_error": standard_error(values)}


def bootstrap_interval(values: np.ndarray) -> np.ndarray | None:
    """95 % percentile bootstrap interval of the mean over the first axis: values [n, ...] give [2, ...], low and high.

    None for a single value. The same values give the same interval. With few values it is too narrow: three have but ten
    different resamples. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(values[drawn].mean(axis=1), INTERVAL, axis=0)


def bootstrap_difference(values: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """The same for the difference of two means, values [n] less others [m], resampled independently: [2]."""
    if min(len(values), len(others)) < 2:
        return None
    generator = np.random.default_rng(0)
    means = [each[generator.integers(len(each), size=(RESAMPLES, len(each)))].mean(axis=1) for each in (values, others)]
    return np.quantile(means[0] - means[1], INTERVAL)
