"""Rules of thumb: the length of the last round, the confidence or entropy of the draft, thresholds that adapt.

Every test is made after a token has been drawn, and the token that triggers a stop stays in the draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Controller, Learner, Signal, check_count, check_range
from eesd.control.calibration import Calibration
from eesd.control.costs import CostTable


@CONTROLLERS.register("hf_heuristic")
@dataclass
class HFHeuristic(Learner):
    """Draft K tokens; K grows by 2 when all were accepted, else shrinks by 1 (Hugging Face's schedule).

    k: K of the first round. reset_on `prompt` is their `heuristic_transient`, `never` their `heuristic`.
    """

    uses_signal: ClassVar[bool] = False
    k_max: int = 20
    k: int = 5

    def __post_init__(self) -> None:
        check_count("k of controller hf_heuristic", self.k)
        super().__post_init__()

    def start(self) -> None:
        """The length of the first round."""
        self.length = min(self.k, self.k_max)

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on until K tokens are drafted."""
        return signal.position < self.length

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Two more after a full success, one fewer after any other round that drafted."""
        if drafted:
            self.length = min(self.length + 2, self.k_max) if accepted == drafted else max(1, self.length - 1)


@CONTROLLERS.register("confidence")
@dataclass
class Confidence(Controller):
    """Stop once max q < tau (Kangaroo, arXiv 2404.18911, with 0.6 and 6 steps; Hugging Face with q(x) and 0.4)."""

    k_max: int = 20
    tau: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tau of controller confidence", self.tau)

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on while the draft is confident."""
        return signal.confidence >= self.tau


@CONTROLLERS.register("svip")
@dataclass
class Svip(Controller):
    """Stop once 1 - sqrt(c H) < lam, a bound on the acceptance probability by q's entropy H (arXiv 2411.18462)."""

    c: float = 0.15
    lam: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("c of controller svip", self.c, high=math.inf)
        check_range("lam of controller svip", self.lam)

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on while the bound is high."""
        return 1 - math.sqrt(self.c * signal.entropy) >= self.lam


@dataclass
class AdaptiveThreshold(Learner):
    """A threshold that keeps the running acceptance rate near `target` (Draft & Verify, arXiv 2309.08168, section 3.3).

    AR = b1 AR + (1 - b1) accepted / drafted; then the threshold moves, damped by b2, by `step`: up if AR < target,
    else down, except after a round that was as long as it can be.
    """

    threshold: float = 0.6
    target: float = 0.9
    step: float = 0.01
    b1: float = 0.5
    b2: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "target", "step", "b1", "b2"):
            check_range(f"{name} of a controller with an adaptive threshold", getattr(self, name))

    def start(self) -> None:
        """The first threshold; like the authors' code, the acceptance rate starts at 0."""
        self.now, self.rate = self.threshold, 0.0

    def holds(self, drafted: int, accepted: int) -> bool:
        """True when the round does not ask for a lower threshold."""
        return drafted == self.k_max

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Move the threshold; a round without a draft says nothing."""
        if not drafted:
            return
        self.rate = self.b1 * self.rate + (1 - self.b1) * accepted / drafted
        moved = self.now
        if self.rate < self.target:
            moved += self.step
        elif not self.holds(drafted, accepted):
            moved -= self.step
        self.now = self.b2 * self.now + (1 - self.b2) * moved


@CONTROLLERS.register("draft_verify")
@dataclass
class DraftVerify(AdaptiveThreshold):
    """Self-speculative decoding's rule: stop once max q < the adaptive threshold."""

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on while the draft is confident."""
        return signal.confidence >= self.now


@CONTROLLERS.register("adaedl")
@dataclass
class AdaEDL(AdaptiveThreshold):
    """The entropy bound of svip against an adaptive threshold (arXiv 2410.18351).

    Its first threshold is not published; 0.7 is that of svip.
    """

    threshold: float = 0.7
    c: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("c of controller adaedl", self.c, high=math.inf)

    def holds(self, drafted: int, accepted: int) -> bool:
        """Held after a draft of full length that was accepted as a whole."""
        return accepted == self.k_max

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on while the bound is high."""
        return 1 - math.sqrt(self.c * signal.entropy) >= self.now


@CONTROLLERS.register("acceptance_product")
@dataclass
class AcceptanceProduct(Controller):
    """Stop once 1 - prod a_i > h, the probability that the draft holds a rejected token (SpecDec++, arXiv 2405.19715).

    a_i is the calibrated P(accept | max q) in place of their trained head.
    """

    uses_calibration: ClassVar[bool] = True
    k_max: int = 20
    h: float = 0.3
    calibration: Callable[[float], float] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("h of controller acceptance_product", self.h)
        self.product = 1.0

    def equip(self, calibration: Calibration | None = None, costs: CostTable | None = None) -> None:
        """Take the head's calibration."""
        self.calibration = calibration

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on while the whole draft is likely to be accepted."""
        so_far = 1.0 if signal.position == 1 else self.product
        self.product = so_far * self.calibration(signal.confidence)
        return 1 - self.product <= self.h
