"""Speedups with intervals: a paired bootstrap over items.

A unit is (item, repeat): both methods decoded the same prompt back to back. Items are what varies (easy and hard
prompts), repeats of one item are not independent, so items are drawn, each with all its repeats and both methods.

    paired_speedup(items, tokens, seconds, base_tokens, base_seconds)
    # Speedup(ratio=1.31, low=1.22, high=1.40, mean_of_ratios=1.33, n_items=20, n_units=20)

The ratio is one of totals: (tokens / seconds) of the method over (tokens / seconds) of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
N_RESAMPLES = 9999
SEED = 0


@dataclass(frozen=True)
class Speedup:
    """A ratio of totals with its interval (NaN for a single item: one prompt says nothing of the next)."""

    ratio: float
    low: float
    high: float
    mean_of_ratios: float
    n_items: int
    n_units: int


def paired_speedup(
    items: Sequence[str],
    tokens: Sequence[float],
    seconds: Sequence[float],
    base_tokens: Sequence[float],
    base_seconds: Sequence[float],
    n_resamples: int = N_RESAMPLES,
) -> Speedup:
    """Tokens per second of a method over those of its baseline; all arguments are aligned, one entry a unit."""
    samples = [np.asarray(one, dtype=float) for one in (tokens, seconds, base_tokens, base_seconds)]
    names, index = np.unique(np.asarray(items), return_inverse=True)
    # [unit] -> [item]: totals of each item over its repeats, the unit of resampling.
    per_item = [np.bincount(index, weights=one, minlength=len(names)) for one in samples]
    low, high = _interval(per_item, n_resamples)
    return Speedup(
        ratio=float(ratio_of_totals(*per_item)),
        low=low,
        high=high,
        mean_of_ratios=float(np.mean(samples[0] / samples[1] / (samples[2] / samples[3]))),
        n_items=len(names),
        n_units=len(index),
    )


def ratio_of_totals(
    tokens: np.ndarray, seconds: np.ndarray, base_tokens: np.ndarray, base_seconds: np.ndarray, axis: int = -1
) -> np.ndarray:
    """(sum tokens / sum seconds) / (sum base_tokens / sum base_seconds), over `axis`."""
    own = tokens.sum(axis) / seconds.sum(axis)
    return own / (base_tokens.sum(axis) / base_seconds.sum(axis))


def _interval(per_item: list[np.ndarray], n_resamples: int) -> tuple[float, float]:
    """Ends of the interval: log ratio +- Student's t with n - 1 degrees of freedom x its bootstrap standard error.

    Percentile intervals hold the truth too rarely where items are few: they spread by the plug-in variance (n instead
    of n - 1) and have normal tails. With the standard error corrected and t in place of normal quantiles (the
    bootstrap t-table interval of Hesterberg 2015), on the logarithm because ratios are skewed, a nominal 95 % covers
    93 to 95 % from 4 to 40 items (docs/decisions.md); percentiles at a widened level, 87 to 95 %.
    """
    n_items = len(per_item[0])
    if n_items < 2:
        return math.nan, math.nan
    result = stats.bootstrap(
        per_item,
        _log_ratio,
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        method="percentile",  # the interval itself is not used
        rng=np.random.default_rng(SEED),
    )
    t = stats.t.ppf((1 + CONFIDENCE) / 2, n_items - 1)
    half = float(t * result.standard_error * math.sqrt(n_items / (n_items - 1)))
    centre = float(_log_ratio(*per_item))
    return float(np.exp(centre - half)), float(np.exp(centre + half))


def _log_ratio(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.log(ratio_of_totals(*samples, axis=axis))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % Student-t interval, for few values such as seeds; no ends for a single one, nor
    a mean for none."""
    found = np.asarray(values, dtype=float)
    mean = float(found.mean()) if len(found) else math.nan
    if len(found) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found))
    return mean, mean - half, mean + half
