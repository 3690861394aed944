"""The bootstrap: exact ratios, honest intervals, and coverage close to what is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eesd.analysis.stats import paired_speedup


def test_hand_computed_ratio() -> None:
    # (30 + 10) tokens in 4 s over 40 tokens in 10 s = 10 / 4; inside units: (10 / 3.75) and (10 / 5).
    found = paired_speedup(["a", "b"], [30, 10], [3, 1], [30, 10], [8, 2])
    assert found.ratio == pytest.approx(2.5)
    assert found.mean_of_ratios == pytest.approx((10 / 3.75 + 10 / 5) / 2)
    assert (found.n_items, found.n_units) == (2, 2)
    # Symmetric on the logarithmic scale, and with two items (t of one degree of freedom is 12.7) hardly informative.
    assert math.sqrt(found.low * found.high) == pytest.approx(2.5)
    assert found.low < 2.0 < 10 / 3.75 < found.high


def test_lengths_may_differ() -> None:
    # Sampled outputs: 20 tokens in 1 s over 10 tokens in 1 s.
    assert paired_speedup(["a"], [20], [1], [10], [1]).ratio == pytest.approx(2.0)


def test_one_item_has_no_interval() -> None:
    found = paired_speedup(["a", "a", "a"], [5, 5, 5], [1.0, 1.1, 0.9], [5, 5, 5], [2, 2, 2])
    assert (found.n_items, found.n_units) == (1, 3)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_repeats_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    tokens, seconds = np.full(10, 50.0), rng.uniform(1, 2, 10)
    once = paired_speedup(range(10), tokens, seconds, tokens, np.full(10, 3.0))
    names = list(range(10)) * 4
    often = paired_speedup(names, np.tile(tokens, 4), np.tile(seconds, 4), np.tile(tokens, 4), np.full(40, 3.0))
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_pairing_cancels_what_both_methods_share() -> None:
    tokens = np.full(20, 50.0)
    seconds = np.random.default_rng(0).uniform(1, 5, 20)  # long and short items, the same ratio in each
    found = paired_speedup(range(20), tokens, seconds, tokens, 1.5 * seconds)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(3)
    data = [rng.uniform(1, 2, 12) for _ in range(4)]
    assert paired_speedup(range(12), *data) == paired_speedup(range(12), *data)


@pytest.mark.parametrize("n_items", [2, 3, 4, 6, 10, 20, 40])
def test_interval_covers_the_true_speedup(n_items: int) -> None:
    """2,000 simulated runs with items of random length and speedup: how often a 95 % interval holds the truth."""
    truth = 1 / np.mean(_seconds(np.random.default_rng(1), 1_000_000, 1.0))
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(2000):
        tokens = rng.integers(20, 129, n_items).astype(float)
        found = paired_speedup(range(n_items), tokens, _seconds(rng, n_items, tokens), tokens, tokens, n_resamples=999)
        hits += found.low <= truth <= found.high
    # 0.930 to 0.970, with two standard errors of this simulation.
    assert 0.92 <= hits / 2000 <= 0.98


def _seconds(rng: np.random.Generator, n_items: int, tokens: np.ndarray | float) -> np.ndarray:
    # Speedups of about 1.4 that vary by a quarter from item to item; the baseline takes 1 s a token.
    return tokens / (1.4 * np.exp(rng.normal(0, 0.25, n_items)))
