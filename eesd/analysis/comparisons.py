"""Which methods differ, and how they rank: paired intervals, and paired tests corrected for how many there are.

    records = comparison_records(cell)        # of one (model, task, group), a line a row as in `tables.row_frame`
    ranks = ranking_records(cell, records)

Methods decoded the same prompts, so they are compared prompt by prompt, twice. The speedup of one over the other with
its paired bootstrap interval says how far apart they are, and ranks them: a method stands behind those whose speedup
over it is above 1 with the whole interval, and beside all others. Wilcoxon's signed-rank test on the logarithms of
seconds per token, with Holm's correction over all pairs of the cell, is the stricter word on whether they differ.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from eesd.analysis.stats import paired_speedup

LEVEL = 0.05
# With fewer prompts no result of the test is below the level, whatever the seconds are.
FEWEST_ITEMS = 6

Records = list[dict[str, Any]]


def shared_items(cell: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of each method [item: seconds and tokens of all repeats, at even lengths], for the prompts that every method has
    decoded."""
    sums = cell.groupby(["method", "item"], sort=False)[["even_s", "even_tokens"]].sum()
    sums = sums.rename(columns={"even_s": "seconds", "even_tokens": "tokens"})
    methods = {method: sums.loc[method] for method in sums.index.unique("method")}
    shared = sorted(set.intersection(*(set(own.index) for own in methods.values())))
    return {method: own.loc[shared] for method, own in methods.items()}


def comparison_records(cell: pd.DataFrame) -> Records:
    """One record for each pair of methods, the faster one of the pair first."""
    records = []
    for (one, first), (other, second) in combinations(shared_items(cell).items(), 2):
        (fast, own), (slow, base) = sorted(
            ((one, first), (other, second)), key=lambda pair: -_tokens_per_second(pair[1])
        )
        logs = np.log((base["seconds"] / base["tokens"]) / (own["seconds"] / own["tokens"]))
        speedup = paired_speedup(list(own.index), own["tokens"], own["seconds"], base["tokens"], base["seconds"])
        records.append(
            {
                "method": fast,
                "other": slow,
                "n_items": len(logs),
                "speedup": speedup.ratio,
                "ci_low": speedup.low,
                "ci_high": speedup.high,
                "faster_on": float((logs > 0).mean()),
                "p_value": _p_value(logs.to_numpy()),
            }
        )
    corrected = holm([record["p_value"] for record in records])
    return [
        {**record, "p_holm": p, "significant": p < LEVEL if _can_tell(record["n_items"], len(records)) else None}
        for record, p in zip(records, corrected, strict=True)
    ]


def _can_tell(n_items: int, tests: int) -> bool:
    """Whether a pair that is faster on every prompt would be below the level: its p-value is 2^(1 - n) then."""
    return 2.0 ** (1 - n_items) * tests < LEVEL


def ranking_records(cell: pd.DataFrame, comparisons: Records) -> Records:
    """One record a method: its rank is one more than the number of methods that are faster with the whole interval.

    comparisons: those of the same cell.
    """
    items = shared_items(cell)
    behind = dict.fromkeys(items, 0)
    for record in comparisons:
        behind[record["other"]] += record["ci_low"] > 1  # NaN, of a single prompt, ranks nobody
    order = sorted(behind, key=lambda method: (behind[method], -_tokens_per_second(items[method])))
    return [{"method": method, "rank": 1 + behind[method], "n_items": len(items[method])} for method in order]


def _tokens_per_second(own: pd.DataFrame) -> float:
    return float(own["tokens"].sum() / own["seconds"].sum())


def holm(p_values: list[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979); NaN stays NaN and counts for nothing."""
    known = [(p, i) for i, p in enumerate(p_values) if not np.isnan(p)]
    corrected, worst = list(p_values), 0.0
    for place, (p, i) in enumerate(sorted(known)):
        worst = max(worst, min(1.0, p * (len(known) - place)))
        corrected[i] = worst
    return corrected


def _p_value(logs: np.ndarray) -> float:
    """Two-sided; NaN where there are too few prompts to tell."""
    if len(logs) < FEWEST_ITEMS or not logs.any():
        return float("nan")
    return float(stats.wilcoxon(logs).pvalue)
