"""Figures for a paper, each drawn from the tables alone."""

from eesd.analysis.figures import (  # noqa: F401  (registers all)
    distill,
    engine,
    lossless,
    methods,
    prediction,
    replay,
    rounds,
)
from eesd.analysis.figures.base import FIGURES, figure

__all__ = ["FIGURES", "figure"]
