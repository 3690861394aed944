"""The verdict on losslessness: one line when every output is accounted for, a failure naming the outputs otherwise.

    python -m eesd lossless --tables results/tables --out results/lossless.txt

A rule of its own after the tables, so that they are there to look at when it fails.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.errors import EesdError
from eesd.files import write_atomic

MOST_NAMED = 20


def write_verdict(tables_dir: Path | str, out: Path | str) -> None:
    """Check `divergences.csv`, and `sampling.csv` if it is there, and write the counts as sentences."""
    paths = {name: Path(tables_dir) / f"{name}.csv" for name in ("lossless", "divergences")}
    for path in paths.values():
        if not path.is_file():
            raise EesdError(f"{path}: no such file. `eesd tables --out {tables_dir} ROWS...` writes it.")
    tables = {name: pd.read_csv(path) for name, path in paths.items()}
    check_lossless(tables)
    sentence = summary(tables["lossless"], tables["divergences"])
    sampling = Path(tables_dir) / "sampling.csv"
    if sampling.exists():
        table = pd.read_csv(sampling)
        check_sampling(table)
        sentence += " " + sampling_summary(table)
    print(sentence)
    write_atomic(out, sentence + "\n")


def summary(lossless: pd.DataFrame, divergences: pd.DataFrame) -> str:
    """What was compared with vanilla, and how it came out; other libraries in a sentence of their own."""
    greedy = lossless[lossless["decoding"] == "greedy"]
    peer = greedy["peer"].astype(bool)
    ours = ("ties within the rounding of their dtype", "different")
    sentences = [f"{_counts(greedy[~peer], *ours)} (divergences.csv).", *_ties(divergences)]
    if peer.any():  # how they round is not known here, and nothing of theirs is required
        theirs = ("part from it where two tokens are closer than our own rounding", "elsewhere")
        sentences.append(f"Other libraries: {_counts(greedy[peer], *theirs)}.")
    return " ".join(sentences)


def _ties(table: pd.DataFrame) -> list[str]:
    """How wide our own ties are, and whose: a bound alone would hide that most lie far below it."""
    ties = table[(table["class"] == "tie") & ~table["peer"].astype(bool) & table["gap"].notna()]
    if ties.empty:
        return []
    widest = ties.loc[ties["gap"].idxmax()]
    methods = ", ".join(sorted(ties["method"].unique()))
    return [f"The widest tie is {widest['gap']:.2g} logits apart (bound {widest['bound']:.2g}); ties are of {methods}."]


def sampling_summary(table: pd.DataFrame) -> str:
    """What was sampled, how it came out, and which bias would have been found."""
    return (
        f"Sampling: {len(table)} pairs of drafter and controller, {table['samples'].min():,} outputs each, "
        f"{table['rejected'].sum()} laws rejected at 1 % family-wise (smallest corrected p "
        f"{table['p_holm'].min():.3g}); a token's probability off by {table['detectable_bias'].max():.4f} would be "
        "found nine times in ten (sampling.csv)."
    )


def check_sampling(table: pd.DataFrame) -> None:
    """Raise EesdError naming every drafter and controller whose outputs do not follow the target's law."""
    broken = table[table["rejected"].astype(bool)]
    if broken.empty:
        return
    names = ", ".join(f"{row.drafter} with {row.controller} (p {row.p_holm:.2g})" for row in broken.itertuples())
    raise EesdError(f"Sampled outputs do not follow the target's law: {names}. All figures are in sampling.csv.")


def _counts(rows: pd.DataFrame, ties: str, different: str) -> str:
    counts = {name: int(rows[name].sum()) for name in ("identical", "tie", "different")}
    return (
        f"{sum(counts.values())} greedy outputs compared with vanilla token by token: {counts['identical']} identical, "
        f"{counts['tie']} {ties}, {counts['different']} {different}"
    )


def check_lossless(tables: Mapping[str, pd.DataFrame]) -> None:
    """Raise EesdError naming every output of ours that differs from vanilla's though its method is lossless."""
    table = tables["divergences"]
    exempt = table["lossy"].astype(bool) | table["peer"].astype(bool)
    broken = table[(table["class"] == "different") & ~exempt]
    if broken.empty:
        return
    lines = [
        f"  {row.model} / {row.task} / {row.group}: {row.method}, item {row.item}, repeat {row.repeat}, token "
        f"{row.position}: {_known(row.token)} where vanilla has {_known(row.vanilla_token)} "
        f"({_reason(row)})\n    again: {again(row)}"
        for row in broken.head(MOST_NAMED).itertuples()
    ]
    more = [f"  ... and {len(broken) - MOST_NAMED} more, all in divergences.csv"] if len(broken) > MOST_NAMED else []
    raise EesdError(
        f"Not lossless: {len(broken)} outputs differ from vanilla's by more than rounding explains. The tables are "
        "written, but no speedup of these methods counts until the cause is found:\n" + "\n".join(lines + more)
    )


def _reason(row: Any) -> str:
    if pd.notna(row.length_rule):
        return f"length: {row.length_rule}"
    if pd.isna(row.logit):  # rows of an earlier version
        return f"logit gap {_known(row.gap)}, bound {_known(row.bound)}"
    return (
        f"logits {_known(row.token)}: {row.logit:.6g}, {_known(row.vanilla_token)}: {row.vanilla_logit:.6g}, "
        f"gap {_known(row.gap)}, bound {_known(row.bound)}"
    )


def again(row: Any) -> str:
    """The command that decodes one output of the workflow again, with vanilla, and compares them."""
    words = ["eesd", "check", f"results/bench/{row.model}/{row.task}/{row.group}.jsonl"]
    words += ["--model", f"resources/models/{row.model}", "--method", row.method, "--item", str(row.item), "--again"]
    return shlex.join(words)


def _known(value: Any) -> str:
    """A number as it is, a missing one as `nothing`; token ids come back from CSV as floats."""
    if pd.isna(value):
        return "nothing"
    return f"{value:g}"
