"""Calibration: from a head's confidence max q to the probability that the target accepts what it drafts.

Isotonic regression (scikit-learn) on chains over calibration prompts, checked on evaluation prompts; one map for greedy
decoding and one for sampling. The breakpoints go into the head's card, where controllers read them
(eesd/control/calibration.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression

from eesd.distill.evaluate import Verdicts, verdicts
from eesd.distill.heads import Student
from eesd.distill.record import Trace

BINS = 10


def calibrate(
    student: Student, calibration: Mapping[str, list[Trace]], evaluation: Mapping[str, list[Trace]]
) -> dict[str, Any]:
    """Breakpoints x, y of the piecewise linear map, and how well it does on the evaluation traces.

    ece, ece_raw: expected calibration error (Guo et al. 2017) with and without the map; bins: one record for each
    of ten equally wide bins of the calibrated probability. sampled: all but the bins for tokens drawn at temperature 1.
    """
    traces = ([trace for of_task in split.values() for trace in of_task] for split in (calibration, evaluation))
    fitted_on, checked_on = (verdicts(student, of_split) for of_split in traces)
    found = {way: _calibrate(fitted_on[way], checked_on[way]) for way in fitted_on}
    return {**found["greedy"], "sampled": {key: found["sampled"][key] for key in ("x", "y", "ece", "ece_raw")}}


def _calibrate(fitted_on: Verdicts, checked_on: Verdicts) -> dict[str, Any]:
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    fitted.fit(*(x.numpy() for x in (fitted_on.confidence, fitted_on.accepted, fitted_on.reached)))
    scores, accepted, reached = (x.numpy() for x in (checked_on.confidence, checked_on.accepted, checked_on.reached))
    calibrated = fitted.predict(scores)
    return {
        "x": [round(float(x), 6) for x in fitted.X_thresholds_],
        "y": [round(float(y), 6) for y in fitted.y_thresholds_],
        "ece": expected_calibration_error(calibrated, accepted, reached),
        "ece_raw": expected_calibration_error(scores, accepted, reached),
        "bins": reliability(calibrated, accepted, reached),
        "bins_raw": reliability(scores, accepted, reached),
    }


def reliability(predicted: np.ndarray, accepted: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    """Mean prediction, share of accepted tokens and their weight (tokens) of every bin that has any."""
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(np.average(predicted[own], weights=weight[own])),
            "observed": float(np.average(accepted[own], weights=weight[own])),
            "tokens": int(total) if (total := float(weight[own].sum())).is_integer() else total,
        }
        for own in (bins == b for b in range(BINS))
        if weight[own].any()
    ]


def expected_calibration_error(predicted: np.ndarray, accepted: np.ndarray, weight: np.ndarray) -> float:
    """Mean distance between prediction and share of accepted tokens, bins weighted by their tokens."""
    bins = reliability(predicted, accepted, weight)
    errors = [abs(b["predicted"] - b["observed"]) for b in bins]
    return float(np.average(errors, weights=[b["tokens"] for b in bins]))
