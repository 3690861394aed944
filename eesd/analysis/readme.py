"""The results that README.md and docs/results.md show, written from published tables, so that none can drift.

    python -m eesd readme --published published --project .

A test compares both pages with what this writes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pandas as pd

from eesd.analysis.figures.distill import points, read_study, seeds
from eesd.analysis.markdown import sections
from eesd.analysis.order import method_key, natural
from eesd.analysis.provenance import machine_line, read_provenance
from eesd.analysis.style import task_label
from eesd.errors import EesdError
from eesd.files import write_atomic
from eesd.words import BASELINE, HF_BASELINE, INITS

BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
# Folder below published/, what a reader runs to get it, the groups that are shown (the first with its acceptance), and
# against which baselines; a run that is not there is left out.
RUNS = (
    ("default", "make reproduce", ("main", "sampled"), (BASELINE, HF_BASELINE)),
    ("best", "config/best.yaml config/gsm8k.yaml", ("best", "rivals"), (BASELINE,)),
)
STUDIES = "studies"


def update_pages(published: Path | str, project: Path | str) -> None:
    """Replace what stands between the two marks of README.md and of docs/results.md.

    Raises EesdError, and writes neither, if a page lacks its marks or nothing is published.
    """
    texts = {}
    for name, block in (("README.md", readme_block), ("docs/results.md", results_block)):
        page = Path(project) / name
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if BEGIN not in text or END not in text:
            raise EesdError(
                f"{page}: the marks {BEGIN.strip()} and {END} are missing. Put them where the results belong."
            )
        before, rest = text.split(BEGIN, 1)
        texts[page] = before + BEGIN + block(published, page) + END + rest.split(END, 1)[1]
    for page, text in texts.items():
        write_atomic(page, text)


def readme_block(published: Path | str, page: Path) -> str:
    """The first published run in brief: machine, figure, speedups over vanilla, verdict."""
    return "\n".join(_run(*_published_runs(published)[0], page)[0])


def results_block(published: Path | str, page: Path) -> str:
    """Every published run, with acceptance, other groups and heads, and all studies."""
    parts = [line for run in _published_runs(published) for lines in _run(*run, page) for line in lines]
    studies = sorted(Path(published).glob(f"{STUDIES}/studies/*/*"))
    return "\n".join([*parts, _studies(studies, page)] if studies else parts)


def _published_runs(published: Path | str) -> list[tuple]:
    """`RUNS`, of those that are there, with their whole path."""
    runs = [(Path(published) / name, *shown) for name, *shown in RUNS if (Path(published) / name).is_dir()]
    if not runs:
        raise EesdError(f"{published}: no published results here. `snakemake publish` writes them.")
    return runs


def _run(
    folder: Path, command: str, groups: tuple[str, ...], baselines: tuple[str, ...], page: Path
) -> tuple[list[str], list[str]]:
    """Blocks of Markdown: what matters most of a run, and the rest."""
    tables = {name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("speedup", "acceptance", "heads")}
    speedup = tables["speedup"]
    speedup = speedup[speedup["group"].isin(groups) & speedup["baseline"].isin(baselines)]
    machine = machine_line(read_provenance(folder / "tables" / "provenance.csv"))
    first, *others = (section.lstrip().replace("## ", "### ", 1) for section in sections(speedup))
    brief = [
        f"## Results of `{command}`\n",
        f"Measured on: {machine}. Prompts: {_datasets(speedup)}.\n",
        f"![Speedup by task and method]({_link(folder / 'figures' / 'speedup.svg', page)})\n",
        first,
        "Losslessness:\n",
        _verdict((folder / "lossless.txt").read_text()),
    ]
    rounds = [
        _rounds(own, tables["speedup"][tables["speedup"]["model"] == model], groups[0])
        for model, own in tables["acceptance"].groupby("model")
    ]
    return brief, [*others, *rounds, _agreement(tables["heads"])]


def _verdict(text: str) -> str:
    """`lossless.txt` as a list: our own outputs, other libraries', sampling."""
    return "\n".join(f"- {part}" for part in re.split(r" (?=Other libraries:|Sampling:)", text.strip())) + "\n"


def _link(file: Path, page: Path) -> str:
    """A file as a page links to it."""
    return Path(os.path.relpath(file, page.parent)).as_posix()


def _datasets(speedup: pd.DataFrame) -> str:
    """True names of the data sets, for a task may take them from several."""
    by_task = speedup.groupby("task")["dataset"].first()
    return ", ".join(by_task[task] for task in sorted(by_task.index, key=natural))


def _rounds(acceptance: pd.DataFrame, speedup: pd.DataFrame, group: str) -> str:
    """What a round yields and how fast decoding alone is, of every drafting method, a column a task."""
    own = acceptance[(acceptance["group"] == group) & (acceptance["method"] != BASELINE)]
    over = speedup[(speedup["group"] == group) & (speedup["baseline"] == BASELINE)].set_index(["method", "task"])
    tasks = sorted(own["task"].unique(), key=natural)
    lines = [
        f"{own['model'].iloc[0]}, group {group}: tokens per round with the target's own token (acceptance rate of "
        "drafted tokens), and speedup of decoding alone over vanilla, prefill left out:\n",
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
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _agreement(table: pd.DataFrame) -> str:
    """One sentence a head: held-out top-1 agreement by task."""
    sentences = []
    for (model, head), rows in table[table["position"] == 1].groupby(["model", "head"]):
        found = ", ".join(f"{task_label(row.task)} {row.top1_agreement:.2f}" for row in rows.itertuples())
        first = rows.iloc[0]
        where = f"layer {first.exit_layer}" if first.exit_layer else first.kind
        own = "" if first.vocabulary == "frequent" else ", the prompt's among them"
        where += f", a draft vocabulary of {first.vocab_rows:,} tokens{own}"
        prompts = first.train_labels - first.train_tokens
        learnt = f"{first.train_tokens:,} training tokens" + (f" and {prompts:,} of prompts" if prompts else "")
        if first.kind == "exit_layer" and first.init not in INITS:
            learnt += f" after those of `{first.init}`"
        sentences.append(f"Held-out top-1 agreement of head `{head}` ({where}, {learnt}) with {model}: {found}.")
    return "\n".join(sentences) + "\n"


def _studies(folders: list[Path], page: Path) -> str:
    """The learning curve, and a line for every variation of every study."""
    tables = [read_study(folder) for folder in folders]
    tasks = sorted({task for table in tables for task in table["task"]}, key=natural)
    lines = [
        "## What choices in a head are worth\n",
        "Heads of `config/studies.yaml`: held-out top-1 agreement of the first drafted token (mean accepted chain), "
        f"with its 95 % Student-t interval over seeds ({', '.join(sorted({seeds(table) for table in tables}))}).\n",
        *(
            f"![Agreement against training tokens]({_link(curve, page)})\n"
            for curve in sorted(folders[0].parents[2].glob("figures/*/studies/learning_curve.svg"))
        ),
        "| study | setting | " + " | ".join(map(task_label, tasks)) + " |",
        "|---|---|" + "---|" * len(tasks),
        *(line for table in tables for line in _study_lines(table, tasks)),
        "",
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
