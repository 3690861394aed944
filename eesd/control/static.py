"""The static rule: always draft k tokens (Leviathan et al. 2023, gamma)."""

from __future__ import annotations

from dataclasses import dataclass, field

from eesd.control.base import CONTROLLERS, Controller, Signal
from eesd.errors import EesdError


@CONTROLLERS.register("static")
@dataclass
class Static(Controller):
    """Stop after k drafted tokens."""

    k_max: int = field(default=0, init=False)
    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 1:
            raise EesdError(f"Controller static needs k of at least 1, not {self.k}.")
        self.k_max = self.k

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on until k tokens are drafted."""
        return signal.position < self.k
