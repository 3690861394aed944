"""How much of the processor others take: read from the system's counters, which the tests set."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from eesd.bench import load
from eesd.bench.load import Crowding


class Times(NamedTuple):
    """Seconds as psutil gives them on Linux: a guest's are in user too."""

    user: float = 0.0
    system: float = 0.0
    idle: float = 0.0
    iowait: float = 0.0
    steal: float = 0.0
    guest: float = 0.0


@pytest.mark.parametrize(
    ("after", "own", "processors", "threads", "share"),
    [
        (Times(user=19.0, system=1.0, idle=0.5), 20.0, 2, 2, 0.0),  # alone
        (Times(user=19.0, system=1.0, idle=1.0), 10.0, 2, 2, 0.5),  # one of two threads shares its processor
        (Times(user=15.0, steal=5.0), 15.0, 2, 2, 0.25),  # other machines on the same hardware
        (Times(user=25.0, idle=15.0), 20.0, 4, 2, 0.0),  # others found free processors
        (Times(user=35.0, idle=5.0), 20.0, 4, 3, 1 / 6),  # half of one too many
        (Times(user=20.0, guest=10.0), 10.0, 2, 2, 0.5),
        (Times(user=40.0), 1.0, 2, 1, 1.0),
    ],
)
def test_what_others_take(
    monkeypatch: pytest.MonkeyPatch, after: Times, own: float, processors: int, threads: int, share: float
) -> None:
    """Ten seconds in which the counters go from nothing to `after`, of which `own` are the process's."""
    clock, times = iter([0.0, 10.0]), iter([Times(), after])
    mine = iter([SimpleNamespace(user=0.0, system=0.0), SimpleNamespace(user=own, system=0.0)])
    monkeypatch.setattr(load, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    monkeypatch.setattr(psutil, "cpu_count", lambda: processors)
    monkeypatch.setattr(os, "times", lambda: next(mine))
    assert Crowding(threads).share() == pytest.approx(share)


def test_on_this_machine_it_is_a_share() -> None:
    assert 0.0 <= Crowding(2).share() <= 1.0
