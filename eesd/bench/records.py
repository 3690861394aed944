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
from itertools import count
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.files import write_atomic

SCHEMA = 1
Row = dict[str, Any]
Unit = tuple[str, int]


class RowFile:
    """The growing file of one (model, task, group).

    hashes: settings hash that each method's rows must carry. prompts: token ids of every planned item. repeats: how
    often each is decoded.
    """

    def __init__(self, out: Path, hashes: Mapping[str, str], prompts: Mapping[str, list[int]], repeats: int) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".part")
        self.hashes, self.prompts, self.repeats = dict(hashes), dict(prompts), repeats
        out.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._resume()

    def _resume(self) -> set[Unit]:
        """Keep the complete units of an earlier run of the same plan; rows of any other are put aside, not mixed in."""
        if not self.part.exists():
            return set()
        text = self.part.read_text(encoding="utf-8", errors="replace")
        rows = _readable_rows(text)
        if any(self._foreign(row) for row in rows):
            self.start_anew("was begun with other settings, code or data")
            return set()
        units: dict[Unit, dict[str, Row]] = defaultdict(dict)
        for row in rows:
            units[row["item"], row["repeat"]][row["method"]] = row
        # Units that are no longer asked for are left out, so that the file holds what is configured.
        complete = {
            unit: found
            for unit, found in units.items()
            if set(found) == set(self.hashes) and unit[0] in self.prompts and unit[1] < self.repeats
        }
        kept = "".join(_line(row) for found in complete.values() for row in found.values())
        if kept != text:
            write_atomic(self.part, kept)
        return set(complete)

    def start_anew(self, why: str) -> None:
        """Put the rows so far aside."""
        aside = _unused(self.part.with_suffix(".part.old"))
        os.replace(self.part, aside)
        self.done = set()
        print(f"{self.part.name} {why}: moved to {aside}; starting anew.")

    def _foreign(self, row: Row) -> bool:
        same_settings = row.get("settings_hash") == self.hashes.get(row["method"])
        planned = self.prompts.get(row["item"], row.get("prompt_tokens"))
        return not same_settings or row.get("prompt_tokens") != planned

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


def _readable_rows(text: str) -> list[Row]:
    """Rows up to the first torn line; a torn line can only be the one a crash interrupted."""
    rows = []
    # Not splitlines(): generated text may hold line separators of other alphabets.
    for line in text.split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if isinstance(row, dict) and {"item", "repeat", "method"} <= set(row)]


def _unused(path: Path) -> Path:
    """`path`, or the first of `path`.1, .2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{n}") for n in count(1))
    return path if not path.exists() else next(name for name in names if not name.exists())
