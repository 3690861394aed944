"""The verdict on losslessness: one line when every output is accounted for, a failure naming the outputs otherwise.

    python -m eesd lossless --tables results/tables --out results/lossless.txt

A rule of its own after the tables, so that they are there to look at when it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.errors import EesdError
from eesd.files import write_atomic

MOST_NAMED = 20


def write_verdict(tables_dir: Path | str, out: Path | str) -> None:
    """Check `divergences.csv` and write the counts of `lossless.csv` as a sentence."""
    tables = {name: pd.read_csv(Path(tables_dir) / f"{name}.csv") for name in ("lossless", "divergences")}
    check_lossless(tables)
    sentence = summary(tables["lossless"])
    print(sentence)
    write_atomic(out, sentence + "\n")


def summary(table: pd.DataFrame) -> str:
    """What was compared with vanilla, and how it came out; other libraries in a sentence of their own."""
    greedy = table[table["decoding"] == "greedy"]
    peer = greedy["peer"].astype(bool)
    sentences = [f"{_counts(greedy[~peer])} (divergences.csv)."]
    if peer.any():
        sentences.append(f"Other libraries: {_counts(greedy[peer])}.")
    return " ".join(sentences)


def _counts(rows: pd.DataFrame) -> str:
    counts = {name: int(rows[name].sum()) for name in ("identical", "tie", "different")}
    return (
        f"{sum(counts.values())} greedy outputs compared with vanilla token by token: {counts['identical']} identical, "
        f"{counts['tie']} ties within the rounding of their dtype, {counts['different']} different"
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
        f"(logit gap {_known(row.gap)}, bound {_known(row.bound)})"
        for row in broken.head(MOST_NAMED).itertuples()
    ]
    more = [f"  ... and {len(broken) - MOST_NAMED} more, all in divergences.csv"] if len(broken) > MOST_NAMED else []
    raise EesdError(
        f"Not lossless: {len(broken)} outputs differ from vanilla's by more than rounding explains. The tables are "
        "written, but no speedup of these methods counts until the cause is found:\n" + "\n".join(lines + more)
    )


def _known(value: Any) -> str:
    """A number as it is, a missing one as `nothing`; token ids come back from CSV as floats."""
    if pd.isna(value):
        return "nothing"
    return f"{value:g}"
