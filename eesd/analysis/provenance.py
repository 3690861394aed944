"""Provenance: on what machine, with what code and settings, and when the rows were measured.

table = write_provenance(["results/bench/smollm2-135m/asdiv/main.jsonl"], "results/tables/provenance.csv")
machine_line(table)      # 'AMD EPYC (cpu, 2 threads), float32, engine cpp-avx2, torch 2.13.0, ...'
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.order import method_key, natural, sort_frame
from eesd.analysis.rows import Row, read_rows
from eesd.errors import EesdError

VERSIONS = ("python", "torch", "transformers", "eesd")
MANY = "; "  # between several values in one cell: nothing that varied is hidden


def write_provenance(row_paths: Iterable[Path | str], out: Path | str) -> pd.DataFrame:
    """Write provenance.csv, one row for each (model, task, group), and return it."""
    table = provenance(read_rows(row_paths))
    write_csv(table, out)
    return table


def provenance(rows: list[Row]) -> pd.DataFrame:
    """One row for each (model, task, group) of checked rows."""
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["task"], row["group"]), []).append(row)
    table = pd.DataFrame([_record(cell) for cell in cells.values()], columns=list(COLUMNS["provenance"]))
    return sort_frame(table, ["model", "task", "group"])


def machine_line(table: pd.DataFrame) -> str:
    """One sentence without its full stop: machine, number formats, engine, versions, commit, when."""
    one = {field: _distinct(table[field]) for field in ("device_name", "device", "threads", "engine", "commit")}
    engines = one["engine"].split(MANY)
    engine = f"engine{'s' if len(engines) > 1 else ''} {' and '.join(engines)}"
    libraries = ", ".join(f"{name} {_distinct(table[name])}" for name in ("torch", "transformers"))
    minutes = table["decoding_s"].sum() / 60
    spent = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.0f} minutes" if minutes >= 1 else "a minute"
    first, last = min(table["first_time"], key=_instant)[:10], max(table["last_time"], key=_instant)[:10]
    return (
        f"{one['device_name']} ({one['device']}, {one['threads']} thread{'' if one['threads'] == '1' else 's'}), "
        f"{_distinct(table['dtype'], ' and ')}, {engine}, {libraries}, commit {one['commit']}; "
        f"{'less than ' if minutes < 1 else ''}{spent} of timed decoding on "
        f"{first if first == last else f'{first} to {last}'}"
    )


def read_provenance(path: Path | str) -> pd.DataFrame:
    """provenance.csv as `machine_line` takes it; text columns stay text."""
    if not Path(path).is_file():
        raise EesdError(f"{path}: no such file. `eesd provenance --rows ROWS... --out {path}` writes it.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(table.columns) != list(COLUMNS["provenance"]) or table.empty:
        raise EesdError(f"{path}: not a provenance table of this version. Write it again with `eesd provenance`.")
    return table.astype({"decoding_s": float})


def _record(cell: list[Row]) -> dict[str, Any]:
    first = cell[0]
    times = sorted((row["time"] for row in cell), key=_instant)
    methods = sorted({row["method"] for row in cell}, key=method_key)
    settings = {row["method"]: row["settings"] for row in cell}
    same = ("model", "task", "group", "dataset", "decoding", "temperature", "dtype", "device", "device_name", "threads")
    return {
        **{field: first[field] for field in same},
        "methods": MANY.join(methods),
        "n_items": len({row["item"] for row in cell}),
        "n_units": len({(row["item"], row["repeat"]) for row in cell}),
        "n_rows": len(cell),
        "output_tokens": sum(len(row["output_tokens"]) for row in cell),
        "engine": _distinct(row["engine"] for row in cell),
        **{name: first["versions"].get(name, "not recorded") for name in VERSIONS},
        "commit": _distinct(row.get("commit") or "not in git" for row in cell),
        "decoding_s": sum(row["seconds"]["total"] for row in cell),
        "first_time": times[0],
        "last_time": times[-1],
        "settings": json.dumps({method: settings[method] for method in methods}, sort_keys=True),
    }


def _distinct(values: Iterable[Any], between: str = MANY) -> str:
    # A cell may itself hold several values, joined by an earlier call.
    found = {part for value in values for part in str(value).split(MANY)}
    return between.join(sorted(found, key=natural))


def _instant(time: str) -> datetime:
    moment = datetime.fromisoformat(time)
    # Times with and without a zone cannot be compared; rows without one are taken as UTC.
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
