"""Figures for a paper, each drawn from the tables alone."""

from eesd.analysis.figures import distill, engine, lossless, methods, replay  # noqa: F401  (registers the figures)
from eesd.analysis.figures.base import FIGURES, figure

__all__ = ["FIGURES", "figure"]
