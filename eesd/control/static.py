"""The static rule: always draft k tokens (Leviathan et al. 2023, gamma)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Controller, Signal, check_count


@CONTROLLERS.register("static")
@dataclass
class Static(Controller):
    """Stop after k drafted tokens; its cap is k itself."""

    uses_signal: ClassVar[bool] = False
    k_max: int = field(default=0, init=False)
    k: int = 4

    def __post_init__(self) -> None:
        check_count("k of controller static", self.k)
        self.k_max = self.k

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on until k tokens are drafted."""
        return signal.position < self.k
