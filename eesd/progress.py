"""Progress for people: a tqdm bar on a terminal, a plain line every half minute anywhere else (logs, pipes).

with progress("train deep4", total=1200, unit="step") as bar:
    bar.set_postfix(loss=1.23)
    bar.update()
"""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 30.0


class _Lines:
    """Turns tqdm's redrawn line into separate lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(description: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar with rate and time left; `initial` counts what an earlier run already finished."""
    if sys.stderr.isatty():
        return tqdm(desc=description, total=total, unit=unit, initial=initial, dynamic_ncols=True)
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        file=_Lines(sys.stderr),
        ncols=120,
        mininterval=LINE_INTERVAL_S,
        maxinterval=LINE_INTERVAL_S,
    )
