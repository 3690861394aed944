"""The results that the README shows, written from published tables, so that they cannot drift from them.

    python -m eesd readme --published published --readme README.md

A test compares README.md with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from eesd.analysis.figures.distill import points, read_study, seeds
from eesd.analysis.markdown import sections
from eesd.analysis.order import method_key, natural
from eesd.analysis.provenance import machine_line, read_provenance
from eesd.analysis.style import method_label, task_label
from eesd.errors import EesdError
from eesd.files import write_atomic
from eesd.words import BASELINE, INITS

BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
# Folder below published/, what a reader runs to get it, the groups that are shown (the first with its acceptance), and
# against which baselines; a run that is not there is left out.
RUNS = (
    ("default", "make reproduce", ("main", "sampled"), (BASELINE, "hf_generate")),
    ("best", "config/best.yaml config/gsm8k.yaml", ("best", "rivals"), (BASELINE,)),
)
STUDIES = "studies"


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
    studies = sorted(Path(published).glob(f"{STUDIES}/studies/*/*"))
    return "\n".join([*parts, _studies(studies)] if studies else parts)


def _run(folder: Path, command: str, groups: tuple[str, ...], baselines: tuple[str, ...]) -> str:
    tables = {name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("speedup", "acceptance", "heads")}
    speedup = tables["speedup"]
    speedup = speedup[speedup["group"].isin(groups) & speedup["baseline"].isin(baselines)]
    machine = machine_line(read_provenance(folder / "tables" / "provenance.csv"))
    first, *others = (section.lstrip().replace("## ", "### ", 1) for section in sections(speedup))
    return "\n".join(
        [
            f"## Results of `{command}`\n",
            f"Measured on: {machine}. Prompts: {_datasets(speedup)}.\n",
            f"![Speedup by task and method]({folder.as_posix()}/figures/speedup.svg)\n",
            first,
            f"Losslessness: {(folder / 'lossless.txt').read_text().strip()}\n",
            _fold("Other baselines and groups, tokens per round, heads", *others, *_details(tables, groups[0])),
        ]
    )


def _fold(summary: str, *blocks: str) -> str:
    """Markdown that a reader unfolds; blank lines make it Markdown again inside HTML."""
    return "\n".join([f"<details><summary>{summary}</summary>\n", *blocks, "</details>\n"])


def _datasets(speedup: pd.DataFrame) -> str:
    """True names of the data sets, for a task may take them from several."""
    by_task = speedup.groupby("task")["dataset"].first()
    return ", ".join(by_task[task] for task in sorted(by_task.index, key=natural))


def _details(tables: dict[str, pd.DataFrame], group: str) -> tuple[str, str]:
    return _rounds(tables["acceptance"], tables["speedup"], group) + "\n", _agreement(tables["heads"]) + "\n"


def _rounds(acceptance: pd.DataFrame, speedup: pd.DataFrame, group: str) -> str:
    """What a round yields and how fast decoding alone is, of every drafting method, a column a task."""
    own = acceptance[(acceptance["group"] == group) & (acceptance["method"] != BASELINE)]
    over = speedup[(speedup["group"] == group) & (speedup["baseline"] == BASELINE)].set_index(["method", "task"])
    tasks = sorted(own["task"].unique(), key=natural)
    lines = [
        f"Group {group}: tokens per round with the target's own token (acceptance rate of drafted tokens), and speedup "
        "of decoding alone over vanilla, prefill left out:\n",
        "| method | " + " | ".join(map(task_label, tasks)) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for method in sorted(own["method"].unique(), key=method_key):
        rows = own[own["method"] == method].set_index("task")
        cells = [
            f"{rows.tokens_per_round[task]:.2f} ({rows.acceptance_rate[task]:.2f}), "
            f"{over.decode_speedup[method, task]:.2f}"
            for task in tasks
        ]
        lines.append(f"| {method_label(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _agreement(table: pd.DataFrame) -> str:
    """One sentence a head: held-out top-1 agreement by task."""
    sentences = []
    for head, rows in table[table["position"] == 1].groupby("head"):
        found = ", ".join(f"{task_label(row.task)} {row.top1_agreement:.2f}" for row in rows.itertuples())
        first = rows.iloc[0]
        where = f"layer {first.exit_layer}" if first.exit_layer else first.kind
        own = "" if first.vocabulary == "frequent" else ", the prompt's among them"
        where += f", drafts {first.vocab_rows:,} tokens{own}"
        prompts = first.train_labels - first.train_tokens
        learnt = f"{first.train_tokens:,} training tokens" + (f" and {prompts:,} of prompts" if prompts else "")
        if first.kind == "exit_layer" and first.init not in INITS:
            learnt += f" after those of `{first.init}`"
        sentences.append(f"Held-out top-1 agreement of head `{head}` ({where}, {learnt}) with the target: {found}.")
    return "\n".join(sentences)


def _studies(folders: list[Path]) -> str:
    """The learning curve, and under a fold a line for every variation of every study."""
    tables = [read_study(folder) for folder in folders]
    tasks = sorted({task for table in tables for task in table["task"]}, key=natural)
    lines = [
        "## What choices in a head are worth\n",
        "Heads of `config/studies.yaml`: held-out top-1 agreement of the first drafted token (mean accepted chain), "
        f"with its 95 % Student-t interval over seeds ({', '.join(sorted({seeds(table) for table in tables}))}).\n",
        *(
            f"![Agreement against training tokens]({curve.as_posix()})\n"
            for curve in sorted(folders[0].parents[2].glob("figures/*/studies/learning_curve.svg"))
        ),
        _fold(
            "Every study",
            "| study | setting | " + " | ".join(map(task_label, tasks)) + " |",
            "|---|---|" + "---|" * len(tasks),
            *(line for table in tables for line in _study_lines(table, tasks)),
            "",
        ),
    ]
    return "\n".join(lines)


def _study_lines(table: pd.DataFrame, tasks: list[str]) -> list[str]:
    """One line for each variation: agreement, its interval and the mean chain, a column a task."""
    study, key = table["study"].iloc[0], table.attrs["key"]
    lines = []
    for (value, series), own in table.groupby(["value", "series"], sort=False):
        setting = ", ".join(filter(None, (f"{value}" if key == study else f"{key} {value}", series)))
        cells = []
        for task in tasks:
            part = own[own["task"] == task]
            if part.empty:
                cells.append("")
                continue
            top1 = points(part.assign(shown=part["top1_agreement"])).iloc[0]
            spread = "" if pd.isna(top1["high"]) else f" ± {top1['high'] - top1['mean']:.3f}"
            chain = part["chain_length"].mean()
            cells.append(f"{top1['mean']:.3f}{spread}" + ("" if pd.isna(chain) else f" ({chain:.2f})"))
        lines.append(f"| {study} | {setting} | " + " | ".join(cells) + " |")
    return lines
