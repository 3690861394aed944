"""Seconds by part of the decode loop, without making the loop slower.

    clock = Clock(device)
    ...                       # queue the draft on the device
    clock.lap("draft")        # all since the last lap was drafting
    clock.finish()            # {"prefill": 0.0, "draft": 0.001, ..., "other": 0.0, "total": 0.001}

On a CPU a lap reads the time. On a CUDA device it queues an event behind the part's work, and all events are read at
the end: the host never waits for a lap. A part then pays from the moment the device was through with the part before,
be it with its own work or with waiting for the host.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import torch

from eesd.models.graphs import GraphEngine
from eesd.words import PARTS


class Mark(NamedTuple):
    """A moment: seconds on a CPU, an event on a CUDA device; and how long graphs had been captured by then."""

    moment: float | torch.cuda.Event
    captured_s: float


class Clock:
    """Started when made. Capturing graphs, which a longer run would not notice, is left out of all counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks = [self._mark()]
        self.parts: list[str | None] = []  # what lies between two marks; None: nothing that counts

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return Mark(perf_counter(), GraphEngine.capture_s)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return Mark(event, GraphEngine.capture_s)

    def lap(self, part: str) -> None:
        """Book the time since the last lap on `part`."""
        self.marks.append(self._mark())
        self.parts.append(part)

    def skip(self) -> None:
        """Leave the time since the last lap out of all counts."""
        self.marks.append(self._mark())
        self.parts.append(None)

    def finish(self) -> dict[str, float]:
        """Seconds of all parts, the rest being `other` (bookkeeping after them), and `total`."""
        self.lap("other")
        if self.device.type == "cuda":
            self.marks[-1].moment.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, (begin, end) in zip(self.parts, pairwise(self.marks), strict=True):
            if part is not None:
                seconds[part] += _between(begin.moment, end.moment) - (end.captured_s - begin.captured_s)
        return {**seconds, "total": sum(seconds.values())}


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
