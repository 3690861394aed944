"""speedup.md: the speedup table for reading, one section for each model, group and baseline.

One row a method, tasks as columns, the best of each task in bold, intervals in brackets.
"""

from __future__ import annotations

from itertools import product

import pandas as pd

from eesd.analysis.disturbed import busy_note
from eesd.analysis.order import group_key, method_key, natural

KEYS = {"model": natural, "group": group_key, "baseline": method_key}
HEAD = (
    "# Speedup\n\nOutput tokens per second over those of the baseline, totals over all prompts, with the 95 % paired "
    "bootstrap interval over prompts. The best of each task is bold.\n"
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
    # The baseline competes too: if nothing is faster, its 1.00 is what is bold.
    best = {task: max(1.0, *(cells[task, m].speedup for m in methods if (task, m) in cells)) for task in tasks}
    lines = [
        f"\n## {first['model']}, {first['group']}: against {first['baseline']} ({how})\n",
        "| method | " + " | ".join(_task_head(part, task) for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
        f"| {first.baseline} | " + " | ".join(_baseline_cell(part, task, best[task]) for task in tasks) + " |",
    ]
    for method in methods:
        found = [_cell(cells.get((task, method)), best[task]) for task in tasks]
        mark = " †" if any(cells[key].lossy for key in cells if key[1] == method) else ""
        lines.append(f"| {method}{mark} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def _task_head(part: pd.DataFrame, task: str) -> str:
    own = part[part["task"] == task]
    return f"{task} (n = {own['n_items'].iloc[0]}{busy_note(own)})"


def _baseline_cell(part: pd.DataFrame, task: str, best: float) -> str:
    rate = part.loc[part["task"] == task, "baseline_tokens_per_s"].iloc[0]
    return f"{'**1.00**' if best == 1.0 else '1.00'} ({rate:.1f} tokens/s)"


def _cell(row: tuple | None, best: float) -> str:
    if row is None:
        return "not run"
    value = f"**{row.speedup:.2f}**" if row.speedup == best else f"{row.speedup:.2f}"
    return value + (" (one prompt, no interval)" if pd.isna(row.ci_low) else f" [{row.ci_low:.2f}, {row.ci_high:.2f}]")
