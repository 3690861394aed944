"""speedup.md: the speedup table for reading, one section for each model, group and baseline.

One row a method, tasks as columns, intervals in brackets. Bold are the methods of rank 1, which no other is ahead of
with its whole interval.
"""

from __future__ import annotations

from itertools import product

import pandas as pd

from eesd.analysis.disturbed import busy_note
from eesd.analysis.order import group_key, method_key, natural

KEYS = {"model": natural, "group": group_key, "baseline": method_key}
HEAD = (
    "# Speedup\n\nOutput tokens per second over those of the baseline, prefill included, totals over all prompts, with "
    "the 95 % interval over prompts (Student's t on the log ratio, with its paired-bootstrap standard error). Bold: no "
    "other is ahead with its whole interval.\n"
)


def speedup_markdown(table: pd.DataFrame) -> str:
    """`speedup.csv` as a Markdown document."""
    lossy = "\n† may change the output by design.\n" if table["lossy"].astype(bool).any() else ""
    return HEAD + "".join(sections(table)) + lossy


def sections(table: pd.DataFrame) -> list[str]:
    """One Markdown section for each model, group and baseline."""
    return [
        _section(part)
        for key in product(*(sorted(table[column].unique(), key=KEYS[column]) for column in KEYS))
        if len(part := table[(table[list(KEYS)] == key).all(axis=1)])
    ]


def _section(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    how = f"{first['decoding']}, {first['dtype']}"
    tasks = sorted(part["task"].unique(), key=natural)
    methods = sorted(part["method"].unique(), key=method_key)
    cells = {(row.task, row.method): row for row in part.itertuples()}
    lines = [
        f"\n## {first['model']}, {first['group']}: against {first['baseline']} ({how})\n",
        "| method | " + " | ".join(_task_head(part, task) for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
        f"| {first.baseline} | " + " | ".join(_baseline_cell(part[part["task"] == task]) for task in tasks) + " |",
    ]
    for method in methods:
        found = [_cell(cells.get((task, method))) for task in tasks]
        mark = " †" if any(cells[key].lossy for key in cells if key[1] == method) else ""
        lines.append(f"| {method}{mark} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def _task_head(part: pd.DataFrame, task: str) -> str:
    own = part[part["task"] == task]
    return f"{task} (n = {own['n_items'].iloc[0]}{busy_note(own)})"


def baseline_leads(own: pd.DataFrame) -> bool:
    """Whether nothing of a task is ahead of its baseline, which competes too, with the whole interval."""
    return own["ci_low"].notna().any() and not (own["ci_low"] > 1).any()


def leads(row: tuple) -> bool:
    """Whether a method of `speedup.csv` is of rank 1; a single prompt, which gives no interval, ranks nobody."""
    return row.rank == 1 and pd.notna(row.ci_low)


def _baseline_cell(own: pd.DataFrame) -> str:
    rate = own["baseline_tokens_per_s"].iloc[0]
    return f"{'**1.00**' if baseline_leads(own) else '1.00'} ({rate:.1f} tokens/s)"


def _cell(row: tuple | None) -> str:
    if row is None:
        return "not run"
    value = f"**{row.speedup:.2f}**" if leads(row) else f"{row.speedup:.2f}"
    return value + (" (one prompt, no interval)" if pd.isna(row.ci_low) else f" [{row.ci_low:.2f}, {row.ci_high:.2f}]")
