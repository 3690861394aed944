from __future__ import annotations

from collections.abc import Callable

import pytest

from eesd.models import transformer


@pytest.fixture
def engine_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, no layer may run in plain torch."""

    def refuse(*_: object) -> None:
        raise AssertionError("left to torch")

    return lambda: monkeypatch.setattr(transformer, "run_plain", refuse)
