"""When to stop drafting. Controllers are plain numbers, no torch, so the same object runs live and in replay."""

from eesd.control.base import CONTROLLERS, Controller, Signal, make_controller
from eesd.control.calibration import Calibration, calibration_of
from eesd.control.costs import CostTable, read_costs, read_verification
from eesd.registry import import_modules

__all__ = [
    "CONTROLLERS",
    "Calibration",
    "Controller",
    "CostTable",
    "Signal",
    "calibration_of",
    "make_controller",
    "read_costs",
    "read_verification",
]

import_modules(__name__, __path__)
