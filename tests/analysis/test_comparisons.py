"""Paired tests between methods, ranks with ties, and the LaTeX table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from eesd.analysis.comparisons import comparison_records, holm, ranking_records
from eesd.analysis.latex import speedup_latex
from eesd.analysis.tables import build_tables
from tests.analysis.factory import realistic_rows


def cell(n_items: int = 20, seed: int = 0) -> pd.DataFrame:
    """`fast` takes two thirds of `slow` on every prompt; `same` is `slow` with noise."""
    rng = np.random.default_rng(seed)
    lines = []
    for item in range(n_items):
        base = rng.uniform(1, 3)
        for method, factor in (("slow", 1.0), ("fast", 0.67), ("same", rng.normal(1, 0.02))):
            lines.append({"item": str(item), "method": method, "even_s": base * factor, "even_tokens": 100})
    return pd.DataFrame(lines)


def ranks(frame: pd.DataFrame) -> list[dict]:
    return ranking_records(frame, comparison_records(frame))


def test_what_differs_on_every_prompt_is_significant_and_noise_is_not():
    records = {(r["method"], r["other"]): r for r in comparison_records(cell())}
    fast = records["fast", "slow"]
    assert fast["significant"] and fast["faster_on"] == 1.0 and fast["speedup"] == pytest.approx(1 / 0.67)
    (noise,) = [r for pair, r in records.items() if set(pair) == {"same", "slow"}]
    assert not noise["significant"] and noise["p_holm"] >= noise["p_value"]


def test_ranks_have_ties():
    assert {r["method"]: r["rank"] for r in ranks(cell())} == {"fast": 1, "slow": 2, "same": 2}


def test_few_prompts_are_ranked_by_intervals_alone():
    assert all(np.isnan(r["p_value"]) and r["significant"] is None for r in comparison_records(cell(5)))
    assert {r["method"]: r["rank"] for r in ranks(cell(5))} == {"fast": 1, "slow": 2, "same": 2}


def test_what_no_outcome_could_show_is_left_open():
    assert {r["significant"] for r in comparison_records(cell(6))} == {None}
    assert True in {r["significant"] for r in comparison_records(cell(8))}


def test_one_prompt_ranks_nobody():
    assert {r["rank"] for r in ranks(cell(1))} == {1}


def test_only_prompts_that_all_decoded_count():
    some = cell(8)
    some = some[~((some["method"] == "same") & (some["item"] == "3"))]
    assert {r["n_items"] for r in comparison_records(some)} == {7}


def test_holm_by_hand():
    assert holm([0.01, 0.04, float("nan"), 0.03]) == pytest.approx([0.03, 0.06, float("nan"), 0.06], nan_ok=True)


def test_the_family_of_a_true_null_is_rarely_rejected():
    """Three methods that are the same: some pair is called different in about 5 % of the experiments."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        base = rng.uniform(1, 3, 12)
        lines = [
            {"item": str(i), "method": method, "even_s": seconds * rng.normal(1, 0.05), "even_tokens": 100}
            for i, seconds in enumerate(base)
            for method in ("a", "b", "c")
        ]
        wrong += any(r["significant"] for r in comparison_records(pd.DataFrame(lines)))
    assert wrong <= 20


def test_the_latex_table_balances():
    assert "my\\_task ($n = 2$)" in speedup_latex(build_tables(realistic_rows(("my_task",), n_items=2))["speedup"])
    text = speedup_latex(build_tables(realistic_rows())["speedup"])
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") > 0
    assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\midrule")
    assert "\\textbf{" in text and "\\scriptsize [" in text
    assert text.count("{") == text.count("}")
    widths = {line.count("&") for line in text.splitlines() if line.endswith("\\\\")}
    assert len(widths) == 1
