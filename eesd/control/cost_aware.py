"""Drafting for tokens per second: one token more if what it may bring is worth its time.

With rho tokens per second earned on average, a round is worth its tokens minus rho times its seconds (renewal reward;
Ross 1970). One more draft token brings S theta tokens, S the probability that all before it are accepted and theta its
own, and costs a draft step and a longer verification.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Signal, check_count, check_range
from eesd.control.calibration import Calibration
from eesd.control.costs import CostTable
from eesd.control.thompson import SURE, CaliTS

# Tokens that the rate over all positions must outweigh, and accepted tokens that the factor on the calibration must.
SHRUNK = 4
TRUSTED = 8


@CONTROLLERS.register("cost_ts")
@dataclass
class CostTS(CaliTS):
    """Go on iff S theta > rho (seconds of one token more), with S and theta drawn from posteriors, so that it explores.

    S is the product of Cali-TS draws for the tokens drafted so far, with one factor on all calibrated probabilities c:
    a calibration pools tasks, and a prompt is too short to unlearn it bin by bin. The factor is accepted tokens over
    the sum of c of the tokens judged, shrunk to 1 while they are few.

    The next token's confidence is not known yet: theta ~ Beta(kappa m + s, kappa (1 - m) + f), where s and f count what
    came after tokens of the same bin as the last one, or at the start of drafts, and m is the rate over all of them,
    shrunk to 1/2 while they are few: after a bad start it must not stop drafting, and so learning. It may draft
    nothing at all.

    kappa: weight of both priors, c of Cali-TS and m. memory: weight in [0, 1] of past rounds in rho, the running tokens
    over the running seconds, which start as a round without a draft; with 1 they stay there, and rho is that speed for
    good. context: tokens in the cache at which costs are read.
    """

    uses_costs: ClassVar[bool] = True
    kappa: float = 64.0
    memory: float = 0.95
    context: int = 256
    seconds: list[float] = field(default_factory=lambda: [1.0], init=False, repr=False, compare=False)
    again: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("memory of controller cost_ts", self.memory)
        check_count("context of controller cost_ts", self.context)
        super().__post_init__()

    def equip(self, calibration: Calibration | None = None, costs: CostTable | None = None) -> None:
        """Take the head's calibration, and the seconds of rounds at `context`."""
        super().equip(calibration)
        found = costs.at(self.context)
        found.check_k(self.k_max)
        # Every drafted token costs a signal, but for one at the cap.
        asked = [min(drafted, self.k_max - 1) for drafted in range(self.k_max + 1)]
        self.seconds = [found.round_s(drafted, signals=signals) for drafted, signals in enumerate(asked)]
        self.again = [found.accepted_s(accepted) for accepted in range(self.k_max + 1)]
        self.start()

    def start(self) -> None:
        """Nothing observed: the speed is that of rounds without a draft."""
        super().start()
        self.tokens, self.time, self.hits, self.misses = 1.0, self.seconds[0], 0, 0
        self.promised = self.kept = 0.0
        # What followed tokens of each bin; the last entry stands for the start of a draft.
        self.next_hits, self.next_misses = [0] * (self.bins + 1), [0] * (self.bins + 1)

    def worth(self, drafted: int, so_far: float) -> bool:
        """Whether one token more than `drafted` pays, the ones before being accepted with probability `so_far`."""
        after = self.round_bins[-1] if drafted else self.bins
        rate = (SHRUNK / 2 + self.hits) / (SHRUNK + self.hits + self.misses)
        theta = self.random.betavariate(
            self.kappa * rate + self.next_hits[after], self.kappa * (1 - rate) + self.next_misses[after]
        )
        return so_far * theta * self.time > self.tokens * (self.seconds[drafted + 1] - self.seconds[drafted])

    def prior(self, c: float) -> float:
        """c times what calibrated probabilities have proved worth on this prompt."""
        return min(c * (TRUSTED + self.kept) / (TRUSTED + self.promised), 1 - SURE)

    def start_drafting(self) -> bool:
        """The test before the first token."""
        return self.worth(0, 1.0)

    def keep_drafting(self, signal: Signal) -> bool:
        """The test after a token."""
        self.product = (1.0 if signal.position == 1 else self.product) * self.draw(signal)
        return self.worth(signal.position, self.product)

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Learn acceptance as Cali-TS does, and the speed from the modelled time of the round."""
        judged = self.round_cs[: accepted + 1]
        self.promised += sum(judged)
        self.kept += min(accepted, len(judged))
        before = [self.bins, *self.round_bins]
        for after in before[:accepted]:
            self.next_hits[after] += 1
        if accepted < drafted:
            self.next_misses[before[accepted]] += 1
        super().update(drafted, accepted, stop)
        self.hits += accepted
        self.misses += accepted < drafted
        self.tokens = self.memory * self.tokens + (1 - self.memory) * (accepted + 1)
        self.time = self.memory * self.time + (1 - self.memory) * (self.seconds[drafted] + self.again[accepted])
