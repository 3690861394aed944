"""How much of the processor other processes take from a measurement: numbers of a busy machine look like any others.

crowding = Crowding(threads=2)
...                                   # decode
crowding.share()                      # 0.0 alone; 0.5 where one of two threads had to share its processor
"""

from __future__ import annotations

import os
from time import perf_counter

import psutil


class Crowding:
    """Measures from its making on; `threads` is how many processors the measured code would use."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.began, self.others = perf_counter(), _others()

    def share(self) -> float:
        """Processors that its threads lacked, for each of them, because others were busy: those left over are free."""
        busy = (_others() - self.others) / max(perf_counter() - self.began, 1e-9)
        return min(1.0, max(0.0, busy + self.threads - (psutil.cpu_count() or 1)) / self.threads)


def _others() -> float:
    """Seconds of processors that went to other processes, or to other machines on this hardware, since the start."""
    times = psutil.cpu_times()
    idle = sum(getattr(times, name, 0.0) for name in ("idle", "iowait"))
    # Guests are counted in user and nice too.
    guests = sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice"))
    own = os.times()
    return sum(times) - idle - guests - own.user - own.system
