"""Time by part: on a CPU, with the events of a GPU that this machine need not have, and without capture."""

from __future__ import annotations

import pytest
import torch

from eesd.decoding import clock as clocks
from eesd.decoding.clock import Clock
from eesd.decoding.generate import generate
from eesd.models.engine import attach_engine
from eesd.models.graphs import GraphEngine
from tests.toys import tiny_target

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeEvent:
    """An event of a device whose time is `now`; reading one before the device got there is a mistake."""

    now = 0.0
    waited = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert FakeEvent.waited
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch):
    """Let time pass on the host and the device alike."""
    FakeEvent.now, FakeEvent.waited = 0.0, False
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(clocks, "perf_counter", lambda: FakeEvent.now)

    def spend(seconds: float) -> None:
        FakeEvent.now += seconds

    return spend


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_parts_and_skips(pass_time, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    clock = Clock(device)
    for part, seconds in (("prefill", 1.0), ("draft", 2.0), ("control", 0.5), ("draft", 3.0)):
        pass_time(seconds)
        clock.lap(part)
    pass_time(10)
    clock.skip()
    pass_time(7)
    monkeypatch.setattr(GraphEngine, "capture_s", GraphEngine.capture_s + 3)
    clock.lap("verify")
    pass_time(0.25)
    assert clock.finish() == {
        "prefill": 1.0,
        "draft": 5.0,
        "control": 0.5,
        "verify": 4.0,
        "other": 0.25,
        "total": 10.75,
    }
    assert FakeEvent.waited == (device is CUDA)


def test_capturing_is_nobodys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from time import sleep

    target = tiny_target()
    engine = attach_engine(target, "graphs")
    original = engine.backend.capture

    def slow(forward):
        sleep(0.2)
        return original(forward)

    monkeypatch.setattr(engine.backend, "capture", slow)
    before = GraphEngine.capture_s
    seconds = generate(target, [1, 2, 3], max_new_tokens=5).seconds
    assert GraphEngine.capture_s - before > 0.4  # the prompt and a token
    assert seconds["total"] < 0.4 and min(seconds.values()) >= 0
