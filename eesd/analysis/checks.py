"""Checks of rows against each other: a speedup is only a speedup if both of its rows measured the same thing.

Called by `rows.read_rows`; each failure is an EesdError that names the file and line of the offending row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from eesd.errors import EesdError
from eesd.words import BASELINE, first_divergence

Row = dict[str, Any]

CELL = ("model", "task", "group")
# One figure compares rows inside a cell, so these may not change there.
SAME_IN_CELL = ("dataset", "decoding", "temperature", "dtype", "device", "device_name", "threads", "versions")
# And titles say these of a whole group.
SAME_IN_GROUP = ("decoding", "temperature", "dtype", "device", "device_name", "threads")
SAME_IN_METHOD = ("settings_hash", "engine", "lossy")


def check_rows(rows: list[Row]) -> None:
    """Raise EesdError unless rows are unique, of one setting per method, and complete in every unit."""
    _check_unique(rows)
    for group in _by(rows, ("model", "group")).values():
        _check_same(group, SAME_IN_GROUP, "")
    for cell in _by(rows, CELL).values():
        _check_same(cell, SAME_IN_CELL, "")
        for method, own in _by(cell, ("method",)).items():
            _check_same(own, SAME_IN_METHOD, f" of method '{method[0]}'")
        _check_units(cell)


def _by(rows: Iterable[Row], fields: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in fields)].append(row)
    return groups


def _check_unique(rows: list[Row]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = tuple(row[field] for field in (*CELL, "item", "method", "repeat"))
        if key in seen:
            raise EesdError(
                f"{row['where']}: a second row for {' / '.join(map(str, key))}; the first is {seen[key]}. "
                "Delete one of them, or pass each file once."
            )
        seen[key] = row["where"]


def _check_same(rows: list[Row], fields: tuple[str, ...], whose: str) -> None:
    first = rows[0]
    for row in rows[1:]:
        for field in fields:
            if row[field] != first[field]:
                raise EesdError(
                    f"{row['where']}: {field}{whose} is {row[field]!r}, but {first[field]!r} in {first['where']}. "
                    "Rows of different settings cannot share a table: delete the file and run its bench again."
                )


def _check_units(cell: list[Row]) -> None:
    methods = {row["method"] for row in cell}
    metrics = {metric for row in cell for metric in row["scores"]}
    for (item, repeat), unit in _by(cell, ("item", "repeat")).items():
        rows = {row["method"]: row for row in unit}
        where, name = unit[0]["where"], f"item '{item}', repeat {repeat}"
        if BASELINE not in rows:
            raise EesdError(
                f"{where}: method '{unit[0]['method']}' of {name} has no vanilla row in its unit, so no baseline. "
                "Add vanilla to the methods of the group and run its bench again."
            )
        missing = sorted(methods - rows.keys())
        if missing:
            raise EesdError(f"{where}: {name} lacks {', '.join(missing)}. Run the bench again: it completes its units.")
        vanilla = rows[BASELINE]
        for row in unit:
            if row["prompt_tokens"] != vanilla["prompt_tokens"]:
                raise EesdError(f"{row['where']}: {name} has another prompt than its vanilla row {vanilla['where']}.")
            if metrics - row["scores"].keys():
                lacking = ", ".join(sorted(metrics - row["scores"].keys()))
                raise EesdError(f"{row['where']}: no score '{lacking}', which other rows of its group have.")
            _check_claim(row, vanilla)


def _check_claim(row: Row, vanilla: Row) -> None:
    """The class in the row must agree with the tokens in the rows: evidence is checked, not believed."""
    claim, position = row["comparison"]["class"], row["comparison"].get("position")
    if claim == "not_compared" and row["decoding"] == "greedy":
        raise EesdError(f"{row['where']}: a greedy output that was not compared with vanilla. Run its bench again.")
    if claim not in ("identical", "tie", "different"):
        return
    found = first_divergence(row["output_tokens"], vanilla["output_tokens"])
    if found != (None if claim == "identical" else position):
        at = "nowhere" if found is None else f"at output token {found}"
        said = "identical" if claim == "identical" else f"{claim} at output token {position}"
        raise EesdError(
            f"{row['where']}: classed {said}, but it leaves its vanilla row {vanilla['where']} {at}. "
            "One of the two rows was edited or mixed up: delete the file and run its bench again."
        )
