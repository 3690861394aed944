"""Thompson Sampling controllers of EESD (arXiv 2406.03853).

After each drafted token: draw theta from the posterior of the acceptance probability, then chi ~ Bernoulli(theta),
and stop drafting when chi = 0. That the draw happens per token is the paper's; how the posterior is updated is our
reconstruction: every accepted token is a success, the first rejected one a failure, and what follows it was never
observed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Controller, Signal
from eesd.errors import EesdError


@CONTROLLERS.register("beta_ts")
@dataclass
class BetaTS(Controller):
    """theta ~ Beta(alpha, beta); alpha += accepted, beta += 1 if a rejection was seen.

    prior: (alpha, beta) before any observation, both > 0.
    reset_on: `prompt` starts every prompt from the prior, `never` carries the posterior over.
    forget: factor in (0, 1] on past observations at every update; 1 forgets nothing.
    failures: `first` counts one failure a round, `all` every drafted token that was not accepted.
    """

    uses_signal: ClassVar[bool] = False
    prior: tuple[float, float] = (1.0, 1.0)
    reset_on: str = "prompt"
    forget: float = 1.0
    failures: str = "first"
    successes_seen: float = field(default=0.0, init=False)
    failures_seen: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.prior) != 2 or min(self.prior) <= 0:
            raise EesdError(f"Controller beta_ts needs a prior of two numbers > 0, not {list(self.prior)}.")
        if not 0 < self.forget <= 1:
            raise EesdError(f"Controller beta_ts needs forget in (0, 1], not {self.forget}.")
        if self.reset_on not in ("prompt", "never"):
            raise EesdError(f"Controller beta_ts resets on 'prompt' or 'never', not '{self.reset_on}'.")
        if self.failures not in ("first", "all"):
            raise EesdError(f"Controller beta_ts counts 'first' or 'all' failures, not '{self.failures}'.")
        self.random = random.Random(0)

    def reset(self, seed: int) -> None:
        """Begin a prompt with its own random stream and, unless told otherwise, the prior."""
        self.random = random.Random(seed)
        if self.reset_on == "prompt":
            self.successes_seen = self.failures_seen = 0.0

    def keep_drafting(self, signal: Signal) -> bool:
        """theta ~ Beta(prior + observations), then chi ~ Bernoulli(theta): go on iff chi = 1."""
        theta = self.random.betavariate(self.prior[0] + self.successes_seen, self.prior[1] + self.failures_seen)
        return self.random.random() < theta

    def update(self, drafted: int, accepted: int) -> None:
        """Add the round's successes and failures to the discounted past."""
        missed = drafted - accepted
        self.successes_seen = self.forget * self.successes_seen + accepted
        self.failures_seen = self.forget * self.failures_seen + (missed if self.failures == "all" else min(missed, 1))
