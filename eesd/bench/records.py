"""Row files: one JSON line for each generation, written unit by unit, resumed after an interruption.

A unit is one item and repeat: all methods of the group, run back to back. Rows of a unit are written together once it
is complete, because methods measured in different processes are not paired. Until the last unit the file is
`<out>.part`.
"""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eesd.errors import EesdError

SCHEMA = 1
Row = dict[str, Any]
Unit = tuple[str, int]


class RowFile:
    """The growing file of one (model, task, group). `hashes`: settings hash that each method's rows must carry."""

    def __init__(self, out: Path, hashes: Mapping[str, str]) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".part")
        self.hashes = dict(hashes)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._resume()

    def _resume(self) -> set[Unit]:
        """Keep the complete units of an earlier run with the same settings; put anything else aside."""
        if not self.part.exists():
            return set()
        units: dict[Unit, dict[str, Row]] = defaultdict(dict)
        foreign = False
        for row in _readable_rows(self.part):
            foreign |= row.get("settings_hash") != self.hashes.get(row.get("method"))
            units[row["item"], row["repeat"]][row["method"]] = row
        if foreign:
            aside = self.part.with_suffix(".part.old")
            os.replace(self.part, aside)
            print(f"{self.part.name} holds rows of other settings: moved to {aside}; starting anew.")
            return set()
        complete = {unit: rows for unit, rows in units.items() if set(rows) == set(self.hashes)}
        text = "".join(_line(row) for rows in complete.values() for row in rows.values())
        self.part.write_text(text)
        return set(complete)

    def append(self, rows: Sequence[Row]) -> None:
        """Write one complete unit through to the disk; EesdError when the disk is full, with nothing lost."""
        try:
            with open(self.part, "a", encoding="utf-8") as stream:
                stream.write("".join(_line(row) for row in rows))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EesdError(
                f"{self.part}: the disk is full. Free some space and run the same command again; "
                f"the {len(self.done)} finished units are kept."
            ) from error
        self.done.add((rows[0]["item"], rows[0]["repeat"]))

    def finish(self) -> None:
        """Give the complete file its final name."""
        os.replace(self.part, self.out)


def _line(row: Row) -> str:
    # NaN is not JSON; refusing it here keeps every later reader honest.
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _readable_rows(path: Path) -> list[Row]:
    """Rows up to the first torn line; a torn line can only be the one a crash interrupted."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if isinstance(row, dict) and {"item", "repeat", "method"} <= set(row)]
