"""What a draft probability is worth: P(accept | max q), piecewise linear, as fitted on held-out prompts of a head.

    calibration = calibration_of(card, "results/heads/smollm2-135m/deep4/card.json")
    calibration(0.9)      # 0.81: of the tokens drafted with max q = 0.9 the target accepts 81 %

A trained head's card holds it under `calibration`: {"x": [max q ...], "y": [P(accept) ...]}, an isotonic regression
(Zadrozny & Elkan 2002) given by its breakpoints.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from eesd.errors import EesdError


class Calibration:
    """Linear between breakpoints, constant beyond them; x and y non-decreasing in [0, 1], equal x being a step."""

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        if len(x) != len(y) or not x:
            raise EesdError(f"A calibration needs as many x as y, at least one, not {len(x)} and {len(y)}.")
        if not all(0 <= value <= 1 for value in (*x, *y)):
            raise EesdError(
                "A calibration maps [0, 1] to [0, 1], but has breakpoints outside. Calibrate the head again."
            )
        if any(a > b for values in (x, y) for a, b in pairwise(values)):
            raise EesdError("A calibration needs x and y that never decrease. Calibrate the head again.")
        self.x, self.y = list(map(float, x)), list(map(float, y))

    def __call__(self, confidence: float) -> float:
        """P(accept) of a token drafted with this max q."""
        x, y = self.x, self.y
        i = bisect_right(x, confidence)
        if i == 0 or i == len(x):
            return y[min(i, len(x) - 1)]
        share = (confidence - x[i - 1]) / (x[i] - x[i - 1])
        return y[i - 1] + share * (y[i] - y[i - 1])


def calibration_of(card: Any, where: Path | str) -> Calibration:
    """The calibration in a head's card or in the facts of a trace; EesdError that says `where` if there is none."""
    found = card.get("calibration") if isinstance(card, dict) else None
    if not isinstance(found, dict) or not {"x", "y"} <= found.keys():
        raise EesdError(
            f"{where}: no calibration of this head, which controllers acceptance_product, cali_ts and cost_ts need. "
            "Train the head again, or choose another controller."
        )
    try:
        return Calibration(found["x"], found["y"])
    except EesdError as error:
        raise EesdError(f"{where}: {error}") from error
