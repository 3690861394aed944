"""Figures for a paper, each drawn from the tables alone."""

from eesd.analysis.figures import distill, engine, lossless, methods, prediction, replay  # noqa: F401  (registers all)
from eesd.analysis.figures.base import FIGURES, figure

__all__ = ["FIGURES", "figure"]
