"""Thompson Sampling controllers of EESD (arXiv 2406.03853).

After each drafted token: draw theta from the posterior of the acceptance probability, then chi ~ Bernoulli(theta),
and stop drafting when chi = 0. That the draw happens per token is the paper's; how the posteriors are updated is our
reconstruction: every accepted token is a success, the first rejected one a failure, and what follows it was never
observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Learner, Signal, check_count, check_range
from eesd.control.calibration import Calibration
from eesd.control.costs import CostTable
from eesd.errors import EesdError

# A posterior needs both parameters above zero, also where the calibration is sure.
SURE = 1e-3


@CONTROLLERS.register("beta_ts")
@dataclass
class BetaTS(Learner):
    """theta ~ Beta(alpha, beta); alpha += accepted, beta += 1 if a rejection was seen.

    prior: (alpha, beta) before any observation, both > 0.
    forget: factor in (0, 1] on past observations at every update; 1 forgets nothing.
    failures: `first` counts one failure a round, `all` every drafted token that was not accepted.
    """

    uses_signal: ClassVar[bool] = False
    uses_chance: ClassVar[bool] = True
    prior: tuple[float, float] = (1.0, 1.0)
    forget: float = 1.0
    failures: str = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.prior) != 2 or not all(0 < value < math.inf for value in self.prior):
            raise EesdError(f"Controller beta_ts needs a prior of two numbers > 0, not {list(self.prior)}.")
        check_range("forget of controller beta_ts", self.forget, open_low=True)
        if self.failures not in ("first", "all"):
            raise EesdError(f"Controller beta_ts counts 'first' or 'all' failures, not '{self.failures}'.")

    def start(self) -> None:
        """Nothing observed."""
        self.successes_seen = self.failures_seen = 0.0

    def keep_drafting(self, signal: Signal) -> bool:
        """theta ~ Beta(prior + observations), then chi ~ Bernoulli(theta): go on iff chi = 1."""
        theta = self.random.betavariate(self.prior[0] + self.successes_seen, self.prior[1] + self.failures_seen)
        return self.random.random() < theta

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Add the round's successes and failures to the discounted past."""
        missed = drafted - accepted
        self.successes_seen = self.forget * self.successes_seen + accepted
        self.failures_seen = self.forget * self.failures_seen + (missed if self.failures == "all" else min(missed, 1))


@CONTROLLERS.register("cali_ts")
@dataclass
class CaliTS(Learner):
    """theta ~ Beta(kappa c + s_b, kappa (1 - c) + f_b): the calibrated probability c is the prior, worth kappa tokens.

    kappa: weight of the prior, > 0. bins: equal parts of [0, 1]; s_b and f_b count tokens with c in the same part b.
    """

    uses_calibration: ClassVar[bool] = True
    uses_chance: ClassVar[bool] = True
    kappa: float = 4.0
    bins: int = 10
    calibration: Callable[[float], float] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("kappa of a controller", self.kappa, high=math.inf, open_low=True)
        check_count("bins of a controller", self.bins)

    def equip(self, calibration: Calibration | None = None, costs: CostTable | None = None) -> None:
        """Take the head's calibration."""
        self.calibration = calibration

    def reset(self, seed: int) -> None:
        """Begin a prompt: what an interrupted round left is no observation."""
        super().reset(seed)
        self.round_cs, self.round_bins = [], []

    def start(self) -> None:
        """Nothing observed."""
        self.accepted_seen, self.rejected_seen = [0] * self.bins, [0] * self.bins
        self.round_cs: list[float] = []
        self.round_bins: list[int] = []

    def keep_drafting(self, signal: Signal) -> bool:
        """As Beta-TS, with the posterior of the token just drafted."""
        return self.random.random() < self.draw(signal)

    def draw(self, signal: Signal) -> float:
        """theta of the token just drafted, whose c and bin are noted for `update`."""
        c = min(max(self.calibration(signal.confidence), SURE), 1 - SURE)
        part, prior = min(int(c * self.bins), self.bins - 1), self.prior(c)
        self.round_cs.append(c)
        self.round_bins.append(part)
        return self.random.betavariate(
            self.kappa * prior + self.accepted_seen[part], self.kappa * (1 - prior) + self.rejected_seen[part]
        )

    def prior(self, c: float) -> float:
        """Mean of the prior of theta at calibrated probability c."""
        return c

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Count the accepted tokens and the first rejected one; a token at the cap was shown to nobody."""
        for part in self.round_bins[:accepted]:
            self.accepted_seen[part] += 1
        if accepted < len(self.round_bins):
            self.rejected_seen[self.round_bins[accepted]] += 1
        self.round_cs, self.round_bins = [], []
