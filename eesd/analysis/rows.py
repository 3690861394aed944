"""Rows: what one generation left behind, read back with every field checked.

A wrong row must stop the tables with its file and line; it must never become a plausible bar in a figure. This module
checks one row at a time, `checks.py` then checks the rows against each other.

    rows = read_rows([Path("results/bench/smollm2-135m/asdiv/main.jsonl")])
    rows[0]["method"], rows[0]["where"]        # 'eesd', 'results/bench/smollm2-135m/asdiv/main.jsonl:1'
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from eesd.analysis.checks import check_rows
from eesd.bench.records import SCHEMA
from eesd.errors import EesdError, unknown
from eesd.files import read_jsonl
from eesd.ngrams import LOOKED_UP, is_looked_up
from eesd.words import BASELINE, PARTS

Row = dict[str, Any]

CLASSES = ("baseline", "identical", "tie", "different", "not_compared")
DECODINGS = ("greedy", "sampled")
# Parts and total are read from the same clock, but rounded and subtracted by the writer.
PARTS_TOLERANCE = 0.01
AGAIN = "Delete the file and run its bench again."

_TEXT, _COUNT, _NUMBER, _LIST, _OBJECT, _FLAG = "text", "whole number >= 0", "number", "list", "object", "true or false"
FIELDS = {
    "model": _TEXT,
    "task": _TEXT,
    "dataset": _TEXT,
    "group": _TEXT,
    "method": _TEXT,
    "item": _TEXT,
    "repeat": _COUNT,
    "decoding": _TEXT,
    "temperature": _NUMBER,
    "dtype": _TEXT,
    "device": _TEXT,
    "device_name": _TEXT,
    "engine": _TEXT,
    "threads": _COUNT,
    "settings": _OBJECT,
    "settings_hash": _TEXT,
    "prompt_tokens": _LIST,
    "output_tokens": _LIST,
    "rounds": _LIST,
    "seconds": _OBJECT,
    "lossy": _FLAG,
    "scores": _OBJECT,
    "comparison": _OBJECT,
    "versions": _OBJECT,
    "time": _TEXT,
}


def read_rows(paths: Iterable[Path | str]) -> list[Row]:
    """All rows of all files, checked one by one and against each other; `row["where"]` is its file and line."""
    paths = list(paths)
    if not paths:
        raise EesdError("No row files given. Expected results/bench/MODEL/TASK/GROUP.jsonl, which `eesd bench` writes.")
    rows = [row for path in paths for row in _read_file(Path(path))]
    check_rows(rows)
    return rows


def is_peer(row: Row) -> bool:
    """True for a method that is timed from outside, so only its total time is known (Hugging Face `generate`)."""
    return row["seconds"]["verify"] is None


def settled(row: Row) -> int:
    """Output tokens that come from rounds: all but the prefill's."""
    # A peer may verify a draft in the pass of its prefill, so not one token but several can come from there.
    return accepted(row) + len(row["rounds"]) if is_peer(row) else len(row["output_tokens"]) - 1


def drafted(row: Row) -> int:
    """Tokens drafted over all rounds."""
    return sum(one[0] for one in row["rounds"])


def accepted(row: Row) -> int:
    """Drafted tokens that the target accepted, the bonus token not counted."""
    return sum(one[1] for one in row["rounds"])


def looked_up(row: Row) -> int:
    """Rounds that prompt lookup drafted beside another drafter."""
    return sum(map(is_looked_up, row["rounds"]))


def _read_file(path: Path) -> list[Row]:
    rows = read_jsonl(path)
    for number, row in zip(_line_numbers(path), rows, strict=True):
        row["where"] = f"{path}:{number}"
        check_row(row)
    return rows


def _line_numbers(path: Path) -> list[int]:
    """Numbers of the lines that hold a row: blank ones are skipped by `read_jsonl`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [number for number, line in enumerate(lines, 1) if line.strip()]


def check_row(row: Row) -> None:
    """Raise EesdError with file and line unless every field of this row is what the contract says."""
    where = row["where"]
    if row.get("schema") != SCHEMA:
        raise EesdError(
            f"{where}: row schema {row.get('schema')!r}, expected {SCHEMA}. "
            "The row was written by another version of eesd: run its bench again, or read it with that version."
        )
    for field, kind in FIELDS.items():
        if field not in row:
            raise EesdError(
                f"{where}: no field '{field}'. Expected a {kind}. The file is not an eesd row file, or cut."
            )
        if not _is(row[field], kind):
            raise EesdError(f"{where}: field '{field}' is {_short(row[field])}, expected a {kind}.")
    if row["decoding"] not in DECODINGS:
        raise _located(where, unknown("decoding", row["decoding"], DECODINGS))
    _check_tokens(row)
    _check_seconds(row)
    _check_rounds(row)
    _check_comparison(row)
    _check_scores(row)
    _check_time(row)


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        _TEXT: isinstance(value, str) and value != "",
        _COUNT: number and isinstance(value, int) and value >= 0,
        _NUMBER: number and math.isfinite(value),
        _LIST: isinstance(value, list),
        _OBJECT: isinstance(value, dict),
        _FLAG: isinstance(value, bool),
    }[kind]


def _check_tokens(row: Row) -> None:
    for field in ("prompt_tokens", "output_tokens"):
        tokens = row[field]
        if not tokens or not all(_is(token, _COUNT) for token in tokens):
            raise EesdError(f"{row['where']}: '{field}' is {_short(tokens)}, expected a non-empty list of token ids.")


def _check_seconds(row: Row) -> None:
    where, seconds = row["where"], row["seconds"]
    missing = [part for part in (*PARTS, "total") if part not in seconds]
    if missing:
        raise EesdError(f"{where}: 'seconds' lacks {', '.join(missing)}. Expected {', '.join(PARTS)} and total.")
    crowding = row.get("crowding", 0.0)  # rows from before it was recorded have none
    if not _is(crowding, _NUMBER) or not 0 <= crowding <= 1:
        raise EesdError(f"{where}: 'crowding' is {crowding!r}, expected a share from 0 to 1. {AGAIN}")
    total = seconds["total"]
    if not _is(total, _NUMBER) or total <= 0:
        raise EesdError(f"{where}: seconds.total is {total!r}, expected a finite time above zero. {AGAIN}")
    parts = [seconds[part] for part in PARTS]
    if all(part is None for part in parts):
        return
    for name, value in zip(PARTS, parts, strict=True):
        # `other` may be a difference of clocks, so it can miss zero by rounding, and by no more.
        if not _is(value, _NUMBER) or value < -1e-9:
            raise EesdError(f"{where}: seconds.{name} is {value!r}, expected a finite time >= 0. {AGAIN}")
    if abs(sum(parts) - total) > PARTS_TOLERANCE * total:
        raise EesdError(
            f"{where}: the parts of 'seconds' add up to {sum(parts):.6g}, but seconds.total is {total:.6g}."
        )


def _check_rounds(row: Row) -> None:
    where, n_output = row["where"], len(row["output_tokens"])
    for one in row["rounds"]:
        shape = isinstance(one, list) and (len(one) == 3 or is_looked_up(one))
        if not (shape and all(_is(count, _COUNT) for count in one[:2])):
            raise EesdError(
                f'{where}: round {_short(one)}, expected [drafted, accepted, "stop reason"], and "{LOOKED_UP}" behind '
                "them where lookup drafted it."
            )
        if one[1] > one[0]:
            raise EesdError(f"{where}: round {one} accepted more tokens than it drafted.")
    if is_peer(row):
        if settled(row) >= n_output:
            raise EesdError(f"{where}: {n_output} output tokens, but its rounds alone account for {settled(row)}.")
        return
    # The first token comes from the prefill; only the last round may be cut, by the end of text or of the budget.
    most = 1 + accepted(row) + len(row["rounds"])
    least = most - (row["rounds"][-1][1] if row["rounds"] else 0)
    if not least <= n_output <= most:
        raise EesdError(f"{where}: {n_output} output tokens, but its rounds account for {least} to {most}.")


def _check_comparison(row: Row) -> None:
    where, comparison = row["where"], row["comparison"]
    name = comparison.get("class")
    if name not in CLASSES:
        raise _located(where, unknown("comparison class", name, CLASSES))
    if (name == "baseline" and row["method"] != BASELINE) or (
        name in ("identical", "tie", "different") and row["method"] == BASELINE
    ):
        raise EesdError(f"{where}: method '{row['method']}' is classed '{name}', but vanilla alone is the baseline.")
    if name in ("tie", "different") and not _is(comparison.get("position"), _COUNT):
        raise EesdError(f"{where}: classed '{name}' without the position where it leaves vanilla.")
    if name == "tie":
        gap, bound = comparison.get("gap"), comparison.get("bound")
        if not (_is(gap, _NUMBER) and _is(bound, _NUMBER) and abs(gap) <= bound):
            raise EesdError(
                f"{where}: classed 'tie' with logit gap {gap!r} and bound {bound!r}: a tie needs gap <= bound."
            )


def _check_scores(row: Row) -> None:
    for metric, value in row["scores"].items():
        if not _is(value, _NUMBER):
            raise EesdError(f"{row['where']}: score '{metric}' is {value!r}, expected a finite number.")


def _check_time(row: Row) -> None:
    try:
        datetime.fromisoformat(row["time"])
    except ValueError:
        raise EesdError(
            f"{row['where']}: time {row['time']!r}, expected a date such as 2026-01-31T12:00:00Z."
        ) from None


def _located(where: str, error: EesdError) -> EesdError:
    return EesdError(f"{where}: {error}")


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
