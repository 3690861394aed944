"""Calibration: from a head's confidence max q to the probability that the target agrees.

Isotonic regression (scikit-learn) on greedy chains over calibration prompts, checked on evaluation prompts. The
breakpoints go into the head's card, where controllers read them (eesd/control/calibration.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression

from eesd.distill.evaluate import confidences
from eesd.distill.heads import Student
from eesd.distill.record import Trace

BINS = 10


def calibrate(
    student: Student, calibration: Mapping[str, list[Trace]], evaluation: Mapping[str, list[Trace]]
) -> dict[str, Any]:
    """Breakpoints x, y of the piecewise linear map, and how well it does on the evaluation traces.

    ece, ece_raw: expected calibration error (Guo et al. 2017) with and without the map; bins: one record for each
    of ten equally wide bins of the calibrated probability.
    """
    scores, agreed = (part.numpy() for part in confidences(student, [t for ts in calibration.values() for t in ts]))
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, agreed)
    scores, agreed = (part.numpy() for part in confidences(student, [t for ts in evaluation.values() for t in ts]))
    calibrated = fitted.predict(scores)
    return {
        "x": [round(float(x), 6) for x in fitted.X_thresholds_],
        "y": [round(float(y), 6) for y in fitted.y_thresholds_],
        "ece": expected_calibration_error(calibrated, agreed),
        "ece_raw": expected_calibration_error(scores, agreed),
        "bins": reliability(calibrated, agreed),
        "bins_raw": reliability(scores, agreed),
    }


def reliability(predicted: np.ndarray, agreed: np.ndarray) -> list[dict[str, float]]:
    """Mean prediction, share of agreement and count of every bin that has any token."""
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(predicted[bins == b].mean()),
            "observed": float(agreed[bins == b].mean()),
            "tokens": int((bins == b).sum()),
        }
        for b in range(BINS)
        if (bins == b).any()
    ]


def expected_calibration_error(predicted: np.ndarray, agreed: np.ndarray) -> float:
    """Mean distance between prediction and share of agreement, bins weighted by their tokens."""
    bins = reliability(predicted, agreed)
    return sum(b["tokens"] * abs(b["predicted"] - b["observed"]) for b in bins) / max(1, len(predicted))
