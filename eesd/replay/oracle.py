"""Rounds and time: modelled seconds of a replay, and the least that any choice of draft lengths can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from eesd.control import CONTROLLERS, Controller, CostTable
from eesd.replay.loop import Rounds
from eesd.replay.trace import Trace, TracedItem


class Clock:
    """Seconds of rounds, tabulated once for a trace.

    seconds [contexts, k_max + 1]: of a round by its drafted tokens. again [contexts, k_max + 1]: what its accepted
    tokens add to the next draft. signal [contexts]: of what a controller looks at.
    """

    def __init__(self, trace: Trace, table: CostTable, k_max: int) -> None:
        for costs in table.costs:
            costs.check_k(k_max, f"The cost table of {table.hardware}")
        contexts = np.arange(1 + max(item.prompt_tokens + len(item.output) for item in trace.items))

        def along(values: Iterable[float]) -> NDArray[np.float64]:
            return np.interp(contexts, table.contexts, list(values))

        lengths = range(k_max + 1)
        self.trace, self.table = trace, table
        self.seconds = np.stack([along(costs.round_s(k) for costs in table.costs) for k in lengths], 1)
        self.again = np.stack([along(costs.accepted_s(k) for costs in table.costs) for k in lengths], 1)
        self.signal = along(costs.signal_s for costs in table.costs)

    def vanilla(self) -> float:
        """Seconds of all outputs token by token; the prefill is left out everywhere."""
        return float(sum(self.vanilla_items()))

    def vanilla_items(self) -> list[float]:
        """The same by item."""
        return [float(self.seconds[_contexts(item), 0].sum()) for item in self.trace.items]

    def time(self, rounds: Sequence[Rounds], controller: Controller | None = None) -> float:
        """Seconds of a replay of the trace; the controller's signals and decisions count, if one is given."""
        return float(sum(self.items(rounds, controller)))

    def items(self, rounds: Sequence[Rounds], controller: Controller | None = None) -> list[float]:
        """The same by item."""
        pairs = zip(self.trace.items, rounds, strict=True)
        return [self.item(item, made, controller) for item, made in pairs]

    def item(self, item: TracedItem, rounds: Rounds, controller: Controller | None = None) -> float:
        """Seconds of the rounds of one item."""
        if not rounds:
            return 0.0
        drafted, accepted = np.array([one[:2] for one in rounds]).T
        began = item.prompt_tokens + np.concatenate(([0], np.cumsum(accepted + 1)[:-1]))
        total = self.seconds[began, drafted].sum()
        # A round without a draft leaves its token to the next draft, in one step with others.
        total += np.where(drafted > 0, self.again[began, accepted], 0.0).sum()
        if controller:
            # At the limit of a draft nobody is asked.
            asked = drafted - np.array([stop in ("k_max", "length") for _, _, stop in rounds])
            signal = self.signal[began] if controller.uses_signal else 0.0
            decision = self.table.decisions_s.get(controller_name(controller), 0.0)
            total += (asked * (signal + decision)).sum()
        return float(total)


def controller_name(controller: Controller) -> str:
    """The name that a controller is registered under."""
    return next(name for name in CONTROLLERS.names() if CONTROLLERS[name] is type(controller))


def _contexts(item: TracedItem) -> NDArray[np.int64]:
    """Tokens in the cache before each pending token of an output."""
    return item.prompt_tokens + np.arange(len(item.output) - 1)


def oracle(clock: Clock, k_max: int) -> list[Rounds]:
    """The rounds of least time: dynamic programming backwards over the positions of each output.

    least[t] = min over k of seconds(k, a) + least[t + a + 1], a = min(k, match), of all k in 0..k_max that there is
    room for.
    """
    return [_least_rounds(clock, item, k_max) for item in clock.trace.items]


def _least_rounds(clock: Clock, item: TracedItem, k_max: int) -> Rounds:
    last, match = len(item.output) - 1, item.chains.matches
    least, choice = np.zeros(last + 1), [0] * last
    lengths = np.arange(k_max + 1)
    for t in range(last - 1, -1, -1):
        room = min(k_max, item.max_new_tokens - t - 2, item.chains.lengths[t])
        kept, context = np.minimum(lengths[: room + 1], match[t]), item.prompt_tokens + t
        time = clock.seconds[context, : room + 1] + clock.again[context, kept] + least[np.minimum(t + 1 + kept, last)]
        choice[t] = int(time.argmin())
        least[t] = time[choice[t]]
    rounds, t = [], 0
    while t < last:
        accepted = min(choice[t], match[t])
        rounds.append((choice[t], accepted, "controller"))
        t += accepted + 1
    return rounds
