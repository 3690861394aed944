"""Figures for a paper, each drawn from the tables alone."""

from eesd.analysis.figures.base import FIGURES, figure
from eesd.registry import import_modules

__all__ = ["FIGURES", "figure"]

import_modules(__name__, __path__)
