"""speedup.tex: the speedup table for a paper, one tabular for each model, group and baseline (package booktabs).

Methods are rows, tasks columns; those of rank 1 are bold, intervals are small. Names are those of the figures.
"""

from __future__ import annotations

from itertools import product

import pandas as pd

from eesd.analysis.disturbed import busy_note
from eesd.analysis.markdown import KEYS, baseline_leads, leads
from eesd.analysis.order import method_key, natural
from eesd.analysis.style import method_label, task_label

HEAD = (
    "% Needs \\usepackage{booktabs}. Ratios of totals with 95 % intervals over prompts (Student's t on the\n"
    "% log ratio, with its paired-bootstrap standard error).\n"
)
SPECIAL = str.maketrans({**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "\u2020": "\\dag"})


def speedup_latex(table: pd.DataFrame) -> str:
    """`speedup.csv` as LaTeX."""
    parts = [
        _tabular(part)
        for key in product(*(sorted(table[column].unique(), key=KEYS[column]) for column in KEYS))
        if len(part := table[(table[list(KEYS)] == key).all(axis=1)])
    ]
    lossy = "% \\dag: may change the output by design.\n" if table["lossy"].astype(bool).any() else ""
    return HEAD + lossy + "\n".join(parts)


def _tabular(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    tasks = sorted(part["task"].unique(), key=natural)
    cells = {(row.task, row.method): row for row in part.itertuples()}
    methods = sorted(part["method"].unique(), key=method_key)
    of_task = {task: part[part["task"] == task] for task in tasks}
    heads = [
        f"{task_label(k).translate(SPECIAL)} ($n = {own['n_items'].iloc[0]}${busy_note(own)})"
        for k, own in of_task.items()
    ]
    base = ["\\textbf{1.00}" if baseline_leads(of_task[task]) else "1.00" for task in tasks]
    lines = [
        f"% {first['model']}, {first['group']}, against {first['baseline']} ({first['decoding']}, {first['dtype']})",
        "\\begin{tabular}{l" + "r" * len(tasks) + "}",
        "\\toprule",
        _line("", heads),
        "\\midrule",
        _line(method_label(first["baseline"]), base),
        *(_line(_label(method, part), [_cell(cells.get((task, method))) for task in tasks]) for method in methods),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _label(method: str, part: pd.DataFrame) -> str:
    lossy = part.loc[part["method"] == method, "lossy"].astype(bool).any()
    return method_label(method) + (" \u2020" if lossy else "")


def _line(label: str, cells: list[str]) -> str:
    return " & ".join([label.translate(SPECIAL), *cells]) + " \\\\"


def _cell(row: tuple | None) -> str:
    if row is None:
        return "--"
    value = f"\\textbf{{{row.speedup:.2f}}}" if leads(row) else f"{row.speedup:.2f}"
    return value if pd.isna(row.ci_low) else f"{value} {{\\scriptsize [{row.ci_low:.2f}, {row.ci_high:.2f}]}}"
