"""Bandits over draft lengths (BanditSpec, arXiv 2505.15141): every round plays one length K of 1..k_max.

They maximise tokens per round, not tokens per second: a draft step costs them nothing.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from eesd.control.base import CONTROLLERS, Learner, Signal, check_range
from eesd.errors import EesdError


@dataclass
class LengthBandit(Learner):
    """Draft up to the chosen length; then learn from the round's tokens Y = accepted + 1 and choose the next one."""

    uses_signal: ClassVar[bool] = False
    k_max: int = 8

    def reset(self, seed: int) -> None:
        """Begin a prompt, with a choice of its own."""
        super().reset(seed)
        self.length = self.choose()

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on until the chosen length."""
        return signal.position < self.length

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Learn, unless nothing was drafted or the end of the output cut the draft short of what was played."""
        if drafted == 0 or (drafted < self.length and stop == "length"):
            return
        # Where the drafter ends sooner, that is what the length played is worth with it, and counts as its own: counted
        # as the shorter one, UCB would for ever owe the length its first round, and EXP3's loss / p_i would be biased.
        self.learn(self.length, accepted + 1)
        self.length = self.choose()

    @abstractmethod
    def choose(self) -> int:
        """The length to play next."""

    @abstractmethod
    def learn(self, length: int, tokens: int) -> None:
        """`tokens` came of a draft of up to this length."""


@CONTROLLERS.register("ucb")
@dataclass
class UCB(LengthBandit):
    """The length with the highest upper confidence bound, after one round with each.

    mu_i + L/2 sqrt((1 + n_i) / n_i^2 (1 + 2 ln(A t^2 sqrt(1 + n_i) / delta))), with A = L = k_max lengths and round t.
    """

    delta: float = 0.05

    def __post_init__(self) -> None:
        check_range("delta of controller ucb", self.delta, open_low=True)
        super().__post_init__()

    def start(self) -> None:
        """Nothing played."""
        self.played, self.total, self.length = [0] * self.k_max, [0] * self.k_max, 1

    def choose(self) -> int:
        """The first length not yet played, else the one with the highest bound (the shortest of equals)."""
        if 0 in self.played:
            return self.played.index(0) + 1
        bounds = [self.bound(n, total) for n, total in zip(self.played, self.total, strict=True)]
        return bounds.index(max(bounds)) + 1

    def bound(self, n: int, total: int) -> float:
        """Upper confidence bound of a length played n times with `total` tokens."""
        rounds = sum(self.played) + 1
        log = math.log(self.k_max * rounds**2 * math.sqrt(1 + n) / self.delta)
        return total / n + self.k_max / 2 * math.sqrt((1 + n) / n**2 * (1 + 2 * log))

    def learn(self, length: int, tokens: int) -> None:
        """Count the round."""
        self.played[length - 1] += 1
        self.total[length - 1] += tokens


@CONTROLLERS.register("exp3")
@dataclass
class EXP3(LengthBandit):
    """Lengths drawn with p_i ~ exp(-eta_t sum of losses), eta_t = sqrt(ln A / (t A)), A = L = k_max lengths.

    The loss (L + 1 - Y) / (L p_i) of the length played is unbiased for that of every length.
    """

    uses_chance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_max < 2:
            raise EesdError("Controller exp3 chooses between lengths 1 to k_max, so k_max must be at least 2.")

    def start(self) -> None:
        """No loss yet."""
        self.losses, self.rounds, self.length = [0.0] * self.k_max, 1, 1
        self.law = [1 / self.k_max] * self.k_max

    def choose(self) -> int:
        """Draw a length."""
        eta, least = math.sqrt(math.log(self.k_max) / (self.rounds * self.k_max)), min(self.losses)
        weights = [math.exp(-eta * (loss - least)) for loss in self.losses]
        self.law = [weight / sum(weights) for weight in weights]
        return self.random.choices(range(1, self.k_max + 1), weights)[0]

    def learn(self, length: int, tokens: int) -> None:
        """Add the estimated loss."""
        self.losses[length - 1] += (self.k_max + 1 - tokens) / (self.k_max * self.law[length - 1])
        self.rounds += 1
