"""Rounds and time: modelled seconds of a replay, and the least that any choice of draft lengths can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eesd.control import CONTROLLERS, Controller, CostTable
from eesd.errors import EesdError
from eesd.ngrams import LOOKED_UP, is_looked_up
from eesd.replay.lookup import Lookup
from eesd.replay.loop import Rounds
from eesd.replay.trace import Trace, TracedItem

Array = NDArray[np.float64]


class Clock:
    """Seconds of rounds, tabulated once for a trace.

    seconds [contexts, k_max + 1]: of a round by its drafted tokens. again [contexts, k_max + 1]: what its accepted
    tokens add to the next draft. copied, unseen: the same of rounds that copy, None if the cost table knows none.
    signal [contexts]: of what a controller looks at. plain [contexts]: of a token of vanilla decoding.
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
        self.plain = along(costs.vanilla_s for costs in table.costs)
        self.copied = self.unseen = None
        if all(len(costs.verify_s) > k_max for costs in table.costs):
            self.copied = np.stack([along(costs.copied_s(k) for costs in table.costs) for k in lengths], 1)
            self.unseen = np.stack([along(costs.unseen_s(1 + k) for costs in table.costs) for k in lengths], 1)

    def check_copies(self) -> None:
        """EesdError unless the cost table knows what copied drafts cost."""
        if self.copied is None:
            raise EesdError(
                f"The cost table of {self.table.hardware} has no verification of so many tokens by all layers, which "
                "copied drafts need. Measure again with `eesd hardware`."
            )

    def vanilla_items(self) -> list[float]:
        """Seconds of every output token by token; the prefill is left out everywhere."""
        return [self.vanilla_item(item) for item in self.trace.items]

    def vanilla_item(self, item: TracedItem) -> float:
        """The same of one item."""
        return float(self.plain[_contexts(item)].sum())

    def items(self, rounds: Sequence[Rounds], controller: Controller | None = None) -> list[float]:
        """Seconds of a replay of every item; the controller's signals and decisions count, if one is given."""
        pairs = zip(self.trace.items, rounds, strict=True)
        return [self.item(item, made, controller) for item, made in pairs]

    def item(self, item: TracedItem, rounds: Rounds, controller: Controller | None = None) -> float:
        """Seconds of the rounds of one item."""
        if not rounds:
            return 0.0
        drafted, accepted = np.array([one[:2] for one in rounds]).T
        began = item.prompt_tokens + np.concatenate(([0], np.cumsum(accepted + 1)[:-1]))
        looked_up = np.array([is_looked_up(one) for one in rounds])
        seconds, more = self.seconds[began, drafted], self.again[began, accepted]
        if looked_up.any():
            self.check_copies()
            seconds = np.where(looked_up, self.copied[began, drafted], seconds)
            more = np.where(looked_up, self.unseen[began, accepted], more)
        # A round without a draft leaves its token to the next draft, in one step with others.
        total = seconds.sum() + np.where(drafted > 0, more, 0.0).sum()
        if controller:
            # At the limit of a draft nobody is asked; copies cost their controller next to nothing.
            asked = np.where(looked_up, 0, drafted - np.array([one[2] in ("k_max", "length") for one in rounds]))
            signal = self.signal[began] if controller.uses_signal else 0.0
            total += (asked * (signal + self.table.decision_s(controller_name(controller)))).sum()
        return float(total)


def controller_name(controller: Controller) -> str:
    """The name that a controller is registered under."""
    return next(name for name in CONTROLLERS.names() if CONTROLLERS[name] is type(controller))


def _contexts(item: TracedItem) -> NDArray[np.int64]:
    """Tokens in the cache before each pending token of an output."""
    return item.prompt_tokens + np.arange(len(item.output) - 1)


def oracle(clock: Clock, k_max: int, lookup: Lookup | None = None) -> list[Rounds]:
    """The rounds of least time: dynamic programming backwards over the positions of each output.

    least[t] = min over k of seconds(k, a) + least[t + a + 1], a = min(k, match), of all k in 0..k_max that there is
    room for; with `lookup` also of all that can be copied.
    """
    if lookup:
        clock.check_copies()
    return [_least_rounds(clock, item, k_max, lookup) for item in clock.trace.items]


def _least_rounds(clock: Clock, item: TracedItem, k_max: int, lookup: Lookup | None) -> Rounds:
    last, chains = len(item.output) - 1, item.chains
    least, choice = np.zeros(last + 1), [(0, 0, "controller")] * last
    copies = lookup.copies(item) if lookup else None
    for t in range(last - 1, -1, -1):
        context, room = item.prompt_tokens + t, min(k_max, item.max_new_tokens - t - 2)
        longest = min(room, chains.lengths[t])
        best = _best(
            clock.seconds[context], clock.again[context], least[t + 1 :], range(longest + 1), chains.matches[t]
        )
        choice[t] = (best.drafted, best.accepted, "controller")
        if copies and min(room, copies.lengths[t]) > 0:
            lengths = range(1, min(room, copies.lengths[t]) + 1)
            copied = _best(clock.copied[context], clock.unseen[context], least[t + 1 :], lengths, copies.matches[t])
            if copied.seconds < best.seconds:
                best, choice[t] = copied, (copied.drafted, copied.accepted, "controller", LOOKED_UP)
        least[t] = best.seconds
    rounds, t = [], 0
    while t < last:
        rounds.append(choice[t])
        t += choice[t][1] + 1
    return rounds


class _Best(NamedTuple):
    seconds: float
    drafted: int
    accepted: int


def _best(seconds: Array, more: Array, rest: Array, lengths: range, match: int) -> _Best:
    """Of drafts of these lengths the one that ends soonest. seconds, more: of a round by what is drafted and accepted;
    rest: least time from 1, 2 .. tokens further on."""
    drafted = np.array(lengths)
    accepted = np.minimum(drafted, match)
    total = seconds[drafted] + more[accepted] + rest[np.minimum(accepted, len(rest) - 1)]
    i = int(total.argmin())
    return _Best(float(total[i]), int(drafted[i]), int(accepted[i]))
