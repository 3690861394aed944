"""Rounds and time: modelled seconds of a replay, and the least that any choice of draft lengths can take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eesd.control import CostTable
from eesd.replay.loop import Rounds
from eesd.replay.trace import Trace, TracedItem


class Clock:
    """Seconds of rounds by context and draft length, tabulated once for a trace. seconds [contexts, k_max + 1]."""

    def __init__(self, trace: Trace, table: CostTable, k_max: int) -> None:
        for costs in table.costs:
            costs.check_k(k_max, f"The cost table of {table.hardware}")
        contexts = 1 + max(item.prompt_tokens + len(item.output) for item in trace.items)
        at = [[costs.round_s(drafted) for costs in table.costs] for drafted in range(k_max + 1)]
        grid = [np.interp(np.arange(contexts), table.contexts, seconds) for seconds in at]
        self.trace, self.seconds = trace, np.stack(grid, 1)

    def vanilla(self) -> float:
        """Seconds of all outputs token by token; the prefill is left out everywhere."""
        return sum(float(self.seconds[_contexts(item), 0].sum()) for item in self.trace.items)

    def time(self, rounds: Sequence[Rounds]) -> float:
        """Seconds of a replay of the trace."""
        total = 0.0
        for item, made in zip(self.trace.items, rounds, strict=True):
            if made:
                drafted, accepted = np.array([one[:2] for one in made]).T
                began = item.prompt_tokens + np.concatenate(([0], np.cumsum(accepted + 1)[:-1]))
                total += float(self.seconds[began, drafted].sum())
        return total


def _contexts(item: TracedItem) -> NDArray[np.int64]:
    """Tokens in the cache before each pending token of an output."""
    return item.prompt_tokens + np.arange(len(item.output) - 1)


def oracle(clock: Clock, k_max: int) -> list[Rounds]:
    """The rounds of least time: dynamic programming backwards over the positions of each output.

    least[t] = min over k of seconds(k) + least[t + min(k, match) + 1], of all k in 0..k_max for which there is room.
    """
    return [_least_rounds(clock.seconds, item, k_max) for item in clock.trace.items]


def _least_rounds(seconds: NDArray[np.float64], item: TracedItem, k_max: int) -> Rounds:
    last, match = len(item.output) - 1, item.chains.matches
    least, choice = np.zeros(last + 1), [0] * last
    lengths = np.arange(k_max + 1)
    for t in range(last - 1, -1, -1):
        room = min(k_max, item.max_new_tokens - t - 2, item.chains.lengths[t])
        reached = np.minimum(t + 1 + np.minimum(lengths[: room + 1], match[t]), last)
        time = seconds[item.prompt_tokens + t, : room + 1] + least[reached]
        choice[t] = int(time.argmin())
        least[t] = time[choice[t]]
    rounds, t = [], 0
    while t < last:
        accepted = min(choice[t], match[t])
        rounds.append((choice[t], accepted, "controller"))
        t += accepted + 1
    return rounds
