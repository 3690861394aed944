"""When to stop drafting. Controllers are plain numbers, no torch, so the same object runs live and in replay."""

from eesd.control import static, thompson  # noqa: F401  (registers the controllers)
from eesd.control.base import CONTROLLERS, Controller, Signal, make_controller

__all__ = ["CONTROLLERS", "Controller", "Signal", "make_controller"]
