"""What a controller is, and how a configuration names one.

A new controller is a class in one file of this folder:

    @CONTROLLERS.register("confidence")
    @dataclass
    class Confidence(Controller):
        tau: float = 0.4

        def keep_drafting(self, signal: Signal) -> bool:
            return signal.confidence >= self.tau

and `controller: {name: confidence, tau: 0.5}` in a method of the configuration. Its fields are its settings.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from eesd.control.calibration import Calibration
from eesd.control.costs import CostTable
from eesd.errors import EesdError, unknown
from eesd.registry import Registry


def check_count(name: str, value: Any) -> None:
    """EesdError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EesdError(f"{name} must be a whole number and at least 1, not {value}.")


def check_range(name: str, value: Any, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> None:
    """EesdError unless `value` is a finite number in [low, high], or in (low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        ends = "(" if open_low else "[", "]" if math.isfinite(high) else ")"
        raise EesdError(f"{name} must be a number in {ends[0]}{low:g}, {high:g}{ends[1]}, not {value}.")


@dataclass(frozen=True)
class Signal:
    """What is known once a token has been drafted; all but `position` NaN for a controller without `uses_signal`."""

    position: int  # tokens drafted so far in this round, this one included
    confidence: float  # max q
    probability: float  # q(x) of the drafted token
    entropy: float  # of q, in nats


@dataclass
class Controller(ABC):
    """Decides after every drafted token whether to draft another; the token just drafted stays in the draft.

    `k_max` caps the tokens of a draft: at the cap the controller is no longer asked.
    """

    k_max: int = 12

    # False for rules that look at the position alone: their draft steps are spared the statistics of q.
    uses_signal: ClassVar[bool] = True
    # What has been measured and a rule needs: whoever builds the controller calls `equip` with it.
    uses_calibration: ClassVar[bool] = False
    uses_costs: ClassVar[bool] = False
    # True for rules that draw random numbers: replay averages them over seeds.
    uses_chance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("k_max", self.k_max)

    def equip(self, calibration: Calibration | None = None, costs: CostTable | None = None) -> None:
        """Take what the rule needs of the head's calibration and the machine's cost table."""

    def reset(self, seed: int) -> None:
        """Begin a prompt; all randomness of the prompt comes from `seed`."""

    @abstractmethod
    def keep_drafting(self, signal: Signal) -> bool:
        """True to draft another token."""

    def start_drafting(self) -> bool:
        """False to draft nothing in this round, which makes it a vanilla step."""
        return True

    def update(self, drafted: int, accepted: int, stop: str = "controller") -> None:
        """Learn from a verified round: `accepted` of `drafted` tokens matched. stop: why drafting ended, as in rows."""


@dataclass
class Learner(Controller):
    """A controller with a memory: `start` sets it to what it is before any observation.

    reset_on: `prompt` starts every prompt afresh; `never` carries the memory over, so results depend on the order of
    the prompts.
    """

    reset_on: str = "prompt"
    random: random.Random = field(default_factory=lambda: random.Random(0), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset_on not in ("prompt", "never"):
            raise EesdError(f"A controller resets on 'prompt' or 'never', not '{self.reset_on}'.")
        self.start()

    def reset(self, seed: int) -> None:
        """Begin a prompt with its own random stream and, unless told otherwise, an empty memory."""
        self.random = random.Random(seed)
        if self.reset_on == "prompt":
            self.start()

    @abstractmethod
    def start(self) -> None:
        """Forget all observations."""


CONTROLLERS: Registry[type[Controller]] = Registry("controller")


def make_controller(settings: Mapping[str, Any]) -> Controller:
    """The controller that `{name: ..., setting: value, ...}` describes; EesdError for what it does not know."""
    values = dict(settings)
    name = values.pop("name", None)
    if name is None:
        raise EesdError(f"A controller needs a name. Known: {', '.join(CONTROLLERS.names())}")
    kind = CONTROLLERS[name]
    known = [field.name for field in fields(kind) if field.init]
    for key in values:
        if key not in known:
            raise unknown(f"setting of controller {name}", key, known)
    return kind(**values)
