"""Which methods differ, and how they rank: paired tests over prompts, corrected for how many there are.

    records = comparison_records(cell)        # of one (model, task, group), a line a row as in `tables.row_frame`
    records = ranking_records(cell)

Methods decoded the same prompts, so their seconds per token are compared prompt by prompt: Wilcoxon's signed-rank test
on the logarithms of the ratios, with Holm's correction over all pairs of the cell. Ranks have ties: a method stands
behind those that are faster beyond chance, and beside all others.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.05
# With fewer prompts no result of the test is below the level, whatever the seconds are.
FEWEST_ITEMS = 6

Records = list[dict[str, Any]]


def seconds_per_token(cell: pd.DataFrame) -> pd.DataFrame:
    """[item, method]: seconds of all repeats over their tokens; prompts that every method has decoded."""
    sums = cell.groupby(["item", "method"], sort=False)[["total", "tokens"]].sum()
    return (sums["total"] / sums["tokens"]).unstack("method").dropna()


def comparison_records(cell: pd.DataFrame) -> Records:
    """One record for each pair of methods, the faster one of the pair first."""
    speeds = seconds_per_token(cell)
    records = []
    for one, other in combinations(speeds.columns, 2):
        ratio = float(speeds[other].sum() / speeds[one].sum())
        fast, slow = (one, other) if ratio >= 1 else (other, one)
        logs = np.log(speeds[slow] / speeds[fast])
        records.append(
            {
                "method": fast,
                "other": slow,
                "n_items": len(logs),
                "mean_ratio": float(np.exp(logs.mean())),
                "faster_on": float((logs > 0).mean()),
                "p_value": _p_value(logs.to_numpy()),
            }
        )
    corrected = holm([record["p_value"] for record in records])
    return [
        {**record, "p_holm": p, "separated": p < LEVEL}  # NaN separates nothing
        for record, p in zip(records, corrected, strict=True)
    ]


def ranking_records(cell: pd.DataFrame) -> Records:
    """One record a method: its rank is one more than the number of methods that are faster beyond chance."""
    speeds = seconds_per_token(cell)
    behind = dict.fromkeys(speeds.columns, 0)
    for record in comparison_records(cell):
        behind[record["other"]] += record["separated"]
    order = sorted(behind, key=lambda method: (behind[method], speeds[method].mean()))
    return [{"method": method, "rank": 1 + behind[method], "n_items": len(speeds)} for method in order]


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
