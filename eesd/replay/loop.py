"""The rounds that a controller makes of a trace: the decode loop without a model.

    rounds = replay(make_controller({"name": "beta_ts"}), trace)
    rounds[0]        # of the first item: [(drafted, accepted, stop), ...], as live decoding with the same seed

Follows `eesd.decoding.generate` and `chain` step by step: the first token is the prefill's, a draft leaves room for
the target's own token, the last round may be cut by the end of text.
"""

from __future__ import annotations

from math import nan
from typing import NamedTuple

from eesd.control import Calibration, Controller, CostTable, Signal, calibration_of
from eesd.errors import EesdError
from eesd.ngrams import LOOKED_UP
from eesd.replay.lookup import Lookup
from eesd.replay.trace import Trace, TracedItem

# Of every round: drafted tokens, accepted ones, why drafting ended; and LOOKED_UP where `lookup` drafted it.
Rounds = list[tuple[int, int, str] | tuple[int, int, str, str]]


def replay(controller: Controller, trace: Trace, shift: int = 0, lookup: Lookup | None = None) -> list[Rounds]:
    """Rounds of every item in order, so that what a controller carries over prompts is carried over here.

    shift: added to the seeds; 0 is live decoding. lookup: goes before the trace's drafter. Raises EesdError when drafts
    may be longer than the trace's.
    """
    for one in (controller, lookup.controller) if lookup else (controller,):
        if one.k_max > trace.facts.k_max:
            raise EesdError(
                f"The controller may draft {one.k_max} tokens, but the trace of {trace.facts.task} holds "
                f"{trace.facts.k_max} a position. Lower k or k_max, or record a longer trace."
            )
    return [replay_item(controller, item, shift, lookup) for item in trace.items]


def equip_for(controller: Controller, trace: Trace, costs: CostTable | None) -> None:
    """Hand a controller the calibration of the trace's head and a cost table."""
    calibration: Calibration | None = None
    if controller.uses_calibration:
        where = f"Trace of {trace.facts.model}, {trace.facts.task}, {trace.facts.drafter}"
        calibration = calibration_of({"calibration": trace.facts.calibration}, where)
    controller.equip(calibration, costs)


def replay_item(controller: Controller, item: TracedItem, shift: int = 0, lookup: Lookup | None = None) -> Rounds:
    """Rounds of one prompt."""
    chains = item.chains
    signals = chains.signals if controller.uses_signal else [_row(controller, nan, nan)] * len(chains.lengths)
    own = copied = _Source(controller, chains.lengths, chains.matches, signals)
    if lookup:
        copies, certain = lookup.copies(item), _row(lookup.controller, 1.0, 0.0)
        copied = _Source(lookup.controller, copies.lengths, copies.matches, [certain] * len(copies.lengths))
        lookup.controller.reset(item.seed + shift)
    controller.reset(item.seed + shift)
    rounds: Rounds = []
    t, last = 0, len(item.output) - 1
    while t < last:
        looked_up = lookup is not None and copied.lengths[t] > 0
        rule, lengths, matches, rows = copied if looked_up else own
        # t + 1 tokens are settled, and the target's own token needs room.
        room = item.max_new_tokens - t - 2
        drafted, stop = (room, "length") if room < rule.k_max else (rule.k_max, "k_max")
        if not drafted:
            stop = "none"
        elif not rule.start_drafting():
            drafted, stop = 0, "controller"
        else:
            # At its limit a draft asks nobody; a drafter may have less to propose than that.
            if lengths[t] < drafted:
                drafted, stop = lengths[t], "drafter"
            row, keep = rows[t], rule.keep_drafting
            for i in range(drafted - (stop != "drafter")):
                if not keep(row[i]):
                    drafted, stop = i + 1, "controller"
                    break
        accepted = min(drafted, matches[t])
        rule.update(drafted, accepted, stop)
        rounds.append((drafted, accepted, stop, LOOKED_UP) if looked_up else (drafted, accepted, stop))
        t += accepted + 1
    return rounds


class _Source(NamedTuple):
    """Drafts after every position, what their controller is shown of them, and that controller."""

    rule: Controller
    lengths: list[int]
    matches: list[int]
    signals: list[list[Signal]]


def _row(controller: Controller, probability: float, entropy: float) -> list[Signal]:
    """The same of every token: of copied ones, which are certain, and of any to who does not look."""
    return [Signal(i, probability, probability, entropy) for i in range(1, controller.k_max + 1)]
