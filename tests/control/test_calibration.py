"""Calibration from a head's card, and what is refused."""

from __future__ import annotations

import pytest

from eesd.control import Calibration, calibration_of
from eesd.errors import EesdError


def test_linear_between_breakpoints_and_constant_beyond():
    calibration = Calibration([0.2, 0.6, 1.0], [0.1, 0.5, 0.9])
    found = [calibration(q) for q in (0.0, 0.2, 0.4, 0.6, 0.7, 1.0)]
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.6, 0.9])
    assert Calibration([0.5], [0.3])(0.9) == 0.3
    step = Calibration([0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.6, 1.0])
    assert [step(q) for q in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.1, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([], [], "as many x as y"),
        ([0.1, 0.2], [0.3], "as many x as y"),
        ([0.1, 1.2], [0.3, 0.4], r"\[0, 1\]"),
        ([0.1, float("nan")], [0.3, 0.4], r"\[0, 1\]"),
        ([0.2, 0.1], [0.3, 0.4], "never decrease"),
        ([0.1, 0.2], [0.4, 0.3], "never decrease"),
    ],
)
def test_bad_breakpoints_are_refused(x, y, message):
    with pytest.raises(EesdError, match=message):
        Calibration(x, y)
    with pytest.raises(EesdError, match=r"card\.json: "):
        calibration_of({"calibration": {"x": x, "y": y}}, "card.json")


@pytest.mark.parametrize("card", [{}, None, {"calibration": None}, {"calibration": {"x": [0.5]}}])
def test_a_card_without_calibration_says_what_to_do(card):
    with pytest.raises(EesdError, match=r"card\.json: no calibration of this head.*Train the head again"):
        calibration_of(card, "card.json")
