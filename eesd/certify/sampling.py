"""The sampling certificate: exact laws of a toy's outputs against many samples of the real decode loop.

    python -m eesd certify --out results/tables/sampling.csv

Every drafter of chains (exit heads with and without deep context, and with the prompt's tokens to draft; early exit,
Medusa, Self-SD, lookup, an assistant) with every controller: a G-test of 200,000 outputs of 4 tokens of vocabulary 8
against their exact law, p-values corrected by Holm's method over all pairs, and how large a bias it would have found.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2, power_divergence

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.comparisons import holm
from eesd.analysis.verdict import sampling_summary
from eesd.certify.chance import sampled, spread
from eesd.certify.toy import PROMPT, TOY_DRAFTERS, exact_law, toy_controller, toy_target
from eesd.control import CONTROLLERS
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.errors import EesdError
from eesd.progress import progress

SAMPLES = 200_000
LENGTH = 4
SAMPLING = Sampling(0.5)
LEVEL = 0.01  # chance of a false alarm, of all pairs together
POWER = 0.9
SEEDS = 3  # of controllers that draw random numbers
# Outputs expected less often than this are one cell of the test together.
LEAST_EXPECTED = 5.0


def pairs() -> Iterator[tuple[str, str]]:
    """Every (drafter, controller)."""
    return product(TOY_DRAFTERS, CONTROLLERS.names())


def sample_outputs(drafter: str, controller: str, samples: int, seed: int = 0) -> dict[tuple[int, ...], float]:
    """Counts of the toy's outputs under this drafter and controller."""
    target = toy_target()
    built, rule = TOY_DRAFTERS[drafter](target), toy_controller(controller)
    cache = target.new_cache(len(PROMPT) + LENGTH)
    seeds = SEEDS if rule.uses_chance else 1
    counts: dict[tuple[int, ...], float] = defaultdict(float)
    for own in range(seeds):

        def run(own: int = own) -> tuple[int, ...]:
            return tuple(
                generate(
                    target,
                    PROMPT,
                    drafter=built,
                    controller=rule,
                    sampling=SAMPLING,
                    max_new_tokens=LENGTH,
                    seed=own,
                    cache=cache,
                ).tokens
            )

        share = samples // seeds + (own < samples % seeds)
        for tokens, count in spread(run, share, sampled(seed * SEEDS + own)).items():
            counts[tokens] += count
    return counts


def g_test(counts: Mapping[Any, float], law: Mapping[Any, float]) -> dict[str, float]:
    """G-test of counts against a law; rare outcomes are pooled. An outcome of probability 0 makes p exactly 0.

    cohen_w: effect size, square root of the sum of (observed - expected)^2 / expected over shares. detectable_w: the
    smallest that is found with probability POWER at level LEVEL. total_variation: half the summed absolute deviation.
    """
    samples, outcomes = sum(counts.values()), [*law, *(counts.keys() - law.keys())]
    p = np.array([law.get(outcome, 0.0) for outcome in outcomes])
    observed = np.array([counts.get(outcome, 0.0) for outcome in outcomes])
    p = p / p.sum()
    common = p * samples >= LEAST_EXPECTED
    expected = np.append(p[common], p[~common].sum()) * samples
    cells = np.append(observed[common], observed[~common].sum())
    if expected[-1] == 0 and cells[-1] == 0:
        expected, cells = expected[:-1], cells[:-1]
    if observed[p == 0].any():
        g, p_value = np.inf, 0.0
    else:
        g, p_value = power_divergence(cells, expected, lambda_="log-likelihood")
    share = (cells - expected) / samples
    return {
        "samples": int(samples),
        "cells": len(cells),
        "g": float(g),
        "p_value": float(p_value),
        "cohen_w": float(np.sqrt((share[expected > 0] ** 2 / (expected[expected > 0] / samples)).sum())),
        "total_variation": float(np.abs(share).sum() / 2),
    }


def detectable_w(samples: int, cells: int, tests: int) -> float:
    """Smallest effect size found with probability POWER in one of `tests` tests at the family-wise LEVEL."""
    df = cells - 1
    critical = chi2.isf(LEVEL / tests, df)
    return float(np.sqrt(brentq(lambda nc: ncx2.sf(critical, df, nc) - POWER, 1e-6, 100 * critical) / samples))


def certify(samples: int = SAMPLES) -> pd.DataFrame:
    """One row a drafter and controller, as `sampling.csv`."""
    law = exact_law(toy_target(), PROMPT, LENGTH, SAMPLING)
    first = max(sum(p for tokens, p in law.items() if tokens[1] == token) for token in range(8))
    chosen, records = list(pairs()), []
    with progress("sampling certificate", len(chosen), "pair") as bar:
        for drafter, controller in chosen:
            began = time.perf_counter()
            found = g_test(sample_outputs(drafter, controller, samples), law)
            w = detectable_w(samples, found["cells"], len(chosen))
            records.append(
                {
                    "drafter": drafter,
                    "controller": controller,
                    **found,
                    "detectable_w": w,
                    # A shift of w between one outcome of probability p and all others moves p by this much.
                    "detectable_bias": w * float(np.sqrt(first * (1 - first))),
                    "seconds": time.perf_counter() - began,
                }
            )
            bar.update()
    corrected = holm([record["p_value"] for record in records])
    for record, p_value in zip(records, corrected, strict=True):
        record |= {"p_holm": p_value, "rejected": p_value < LEVEL}
    return pd.DataFrame(records, columns=list(COLUMNS["sampling"]))


def write_certificate(out: Path, samples: int = SAMPLES) -> pd.DataFrame:
    """Test, print a sentence and write the table, also when a law is rejected."""
    if samples < 1000:
        raise EesdError(f"The sampling certificate needs at least 1000 samples, not {samples}.")
    table = certify(samples)
    write_csv(table, out)
    print(sampling_summary(table))
    return table
