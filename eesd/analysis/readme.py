"""The results that the README shows, written from published tables, so that they cannot drift from them.

    python -m eesd readme --published published --readme README.md

A test compares README.md with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from eesd.analysis.markdown import sections
from eesd.analysis.order import method_key, natural
from eesd.analysis.provenance import machine_line, read_provenance
from eesd.analysis.style import method_label, task_label
from eesd.errors import EesdError
from eesd.files import write_atomic

BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
# Folder below published/, what a reader runs to get it, the groups that are shown (the first with its acceptance), and
# against which baselines; a run that is not there is left out.
RUNS = (
    ("default", "make reproduce", ("main",), ("vanilla", "hf_generate")),
    ("best", "config/best.yaml", ("best", "rivals"), ("vanilla",)),
)


def update_readme(published: Path | str, readme: Path | str) -> None:
    """Replace what stands between the two marks of the README."""
    readme = Path(readme)
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise EesdError(
            f"{readme}: the marks {BEGIN.strip()} and {END} are missing. Put them where the results belong."
        )
    before, rest = text.split(BEGIN, 1)
    write_atomic(readme, before + BEGIN + results_block(published) + END + rest.split(END, 1)[1])


def results_block(published: Path | str) -> str:
    """Figure, speedups, acceptance and verdict of every published run, with its machine."""
    parts = [_run(Path(published) / name, *shown) for name, *shown in RUNS if (Path(published) / name).is_dir()]
    if not parts:
        raise EesdError(f"{published}: no published results here. `snakemake publish` writes them.")
    return "\n".join(parts)


def _run(folder: Path, command: str, groups: tuple[str, ...], baselines: tuple[str, ...]) -> str:
    tables = {name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("speedup", "acceptance", "heads")}
    speedup = tables["speedup"]
    speedup = speedup[speedup["group"].isin(groups) & speedup["baseline"].isin(baselines)]
    machine = machine_line(read_provenance(folder / "tables" / "provenance.csv"))
    return "\n".join(
        [
            f"## Results of `{command}`\n",
            f"Measured on: {machine}.\n",
            f"![Speedup by task and method]({folder.as_posix()}/figures/speedup.svg)",
            *(section.replace("\n## ", "\n### ") for section in sections(speedup)),
            f"\n{_acceptance(tables['acceptance'], groups[0])}",
            f"\n{_agreement(tables['heads'])}",
            f"\nLosslessness: {(folder / 'lossless.txt').read_text().strip()}\n",
        ]
    )


def _acceptance(table: pd.DataFrame, group: str) -> str:
    """Tokens per round and acceptance rate of every drafting method, a column a task."""
    own = table[(table["group"] == group) & (table["method"] != "vanilla")]
    tasks = sorted(own["task"].unique(), key=natural)
    lines = [
        "Tokens per round with the target's own token (acceptance rate of drafted tokens):\n",
        "| method | " + " | ".join(map(task_label, tasks)) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for method in sorted(own["method"].unique(), key=method_key):
        rows = own[own["method"] == method].set_index("task")
        cells = [f"{rows.tokens_per_round[task]:.2f} ({rows.acceptance_rate[task]:.2f})" for task in tasks]
        lines.append(f"| {method_label(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _agreement(table: pd.DataFrame) -> str:
    """One sentence a head: held-out top-1 agreement by task."""
    sentences = []
    for head, rows in table[table["position"] == 1].groupby("head"):
        found = ", ".join(f"{task_label(row.task)} {row.top1_agreement:.2f}" for row in rows.itertuples())
        first = rows.iloc[0]
        where = f"layer {first.exit_layer}" if first.exit_layer else first.kind
        sentences.append(
            f"Held-out top-1 agreement of head `{head}` ({where}, {first.train_tokens:,} training "
            f"tokens) with the target: {found}."
        )
    return "\n".join(sentences)
