"""What whole rounds cost in the decode loop, its Python and the state of the caches included.

    rounds, vanilla = time_rounds(target, head, exit_layer, context=512, count=4, longest=15, rng=random.Random(0))
    rounds[4]                                                               # seconds of each that drafted four tokens
    decision_times()["cost_ts"]                                                       # seconds of one decision

Pieces timed alone leave out what lies between them. Here the loop itself decodes, its draft lengths in random order, so
that drifts of the machine's speed fall on all lengths alike. Vanilla decoding, which has no drafter to keep informed,
is timed between.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, ClassVar

from eesd.control import CONTROLLERS, Calibration, Controller, CostTable, Signal, make_controller
from eesd.control.costs import Costs
from eesd.decoding.generate import Round, generate
from eesd.drafting.exit_head import ExitHead, ExitHeadDrafter
from eesd.models.graphs import GraphEngine
from eesd.models.transformer import Transformer


@dataclass
class Shuffled(Controller):
    """Drafts every length from 0 to k_max equally often, in random order."""

    uses_signal: ClassVar[bool] = False
    length: int = 0
    order: list[int] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def start_drafting(self) -> bool:
        """Take the next length."""
        self.order = self.order or self.random.sample(range(self.k_max + 1), self.k_max + 1)
        self.length = self.order.pop()
        return self.length > 0

    def keep_drafting(self, signal: Signal) -> bool:
        """Go on until that length."""
        return signal.position < self.length


def time_rounds(
    target: Transformer,
    head: ExitHead,
    exit_layer: int,
    context: int,
    count: int,
    longest: int,
    rng: random.Random,
) -> tuple[list[list[float]], list[float]]:
    """Seconds of rounds that draft 0, 1 .. `longest` tokens, at least `count` of each, around a context length; and of
    as many tokens of vanilla decoding there.

    The target decodes from a prompt that is shorter than `context` by half of what it is going to write.
    """
    drafter, controller = ExitHeadDrafter(head, exit_layer), Shuffled(k_max=longest, random=rng)
    # The end of an output cuts drafts short, so it is put off by one more draft.
    new, prompt = _around(context, count * (longest + 1) + longest + 2, target)
    plain = _around(context, count + 1, target)
    found: dict[int, list[float]] = defaultdict(list)
    vanilla: list[float] = []
    while min(len(found[k]) for k in range(longest + 1)) < count:
        for one, seconds in _timed(target, new, prompt, drafter=drafter, controller=controller):
            found[one.drafted].append(seconds)
        vanilla += [seconds for _, seconds in _timed(target, *plain)]
    return [found[k] for k in range(longest + 1)], vanilla


def _around(context: int, new: int, target: Transformer) -> tuple[int, list[int]]:
    """Tokens to write, as many as fit, and a prompt that puts their middle at a context length."""
    limit = target.config.max_positions
    new = min(new, limit - 1)
    return new, [1] * max(1, min(context - new // 2, limit - new))


def _timed(target: Transformer, new: int, prompt: Sequence[int], **method: Any) -> list[tuple[Round, float]]:
    """Rounds of a generation with the seconds of each."""
    ends: list[float] = []

    def settled(tokens: Sequence[int], kind: str) -> None:
        if kind == "target":  # the last that is told of a round, and all that is told of the prefill
            ends.append(perf_counter() - GraphEngine.capture_s)

    made = generate(target, prompt, max_new_tokens=new, on_tokens=settled, **method)
    return [(one, ended - began) for one, (began, ended) in zip(made.rounds, pairwise(ends), strict=False)]


def decision_times(rounds: int = 300) -> dict[str, float]:
    """Seconds of one decision of every controller; what it does once a round is shared among the round's decisions."""
    table = CostTable("", (1,), (Costs(tuple(1.0 + 0.25 * k for k in range(64))),))
    found = {}
    for name in CONTROLLERS.names():
        controller = make_controller({"name": name})
        controller.equip(Calibration([0.0, 1.0], [0.0, 1.0]), table)
        controller.reset(0)
        signals, decisions = [Signal(i, 0.9, 0.9, 0.1) for i in range(1, controller.k_max + 1)], 0
        began = perf_counter()
        for _ in range(rounds):
            drafted = int(controller.start_drafting())
            while 0 < drafted < controller.k_max:
                decisions += 1
                if not controller.keep_drafting(signals[drafted - 1]):
                    break
                drafted += 1
            controller.update(drafted, drafted // 2)
        found[name] = (perf_counter() - began) / max(rounds, decisions)
    return found
