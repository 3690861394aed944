"""The rounds that a controller makes of a trace: the decode loop without a model.

    rounds = replay(make_controller({"name": "beta_ts"}), trace)
    rounds[0]        # of the first item: [(drafted, accepted, stop), ...], as live decoding with the same seed

Follows `eesd.decoding.generate` and `chain` step by step: the first token is the prefill's, a draft leaves room for
the target's own token, the last round may be cut by the end of text.
"""

from __future__ import annotations

from math import nan

from eesd.control import Calibration, Controller, CostTable, Signal, calibration_of
from eesd.errors import EesdError
from eesd.replay.trace import Trace, TracedItem

Rounds = list[tuple[int, int, str]]


def replay(controller: Controller, trace: Trace, shift: int = 0) -> list[Rounds]:
    """Rounds of every item in order, so that what a controller carries over prompts is carried over here.

    shift: added to the seeds; 0 is live decoding. Raises EesdError when drafts may be longer than the trace's.
    """
    if controller.k_max > trace.facts.k_max:
        raise EesdError(
            f"The controller may draft {controller.k_max} tokens, but the trace of {trace.facts.task} holds "
            f"{trace.facts.k_max} a position. Lower k or k_max, or record a longer trace."
        )
    return [replay_item(controller, item, shift) for item in trace.items]


def equip_for(controller: Controller, trace: Trace, costs: CostTable | None) -> None:
    """Hand a controller the calibration of the trace's head and a cost table."""
    calibration: Calibration | None = None
    if controller.uses_calibration:
        where = f"Trace of {trace.facts.model}, {trace.facts.task}, {trace.facts.drafter}"
        calibration = calibration_of({"calibration": trace.facts.calibration}, where)
    controller.equip(calibration, costs)


def replay_item(controller: Controller, item: TracedItem, shift: int = 0) -> Rounds:
    """Rounds of one prompt."""
    controller.reset(item.seed + shift)
    keep, k_max, match, rounds = controller.keep_drafting, controller.k_max, item.chains.matches, []
    lengths = item.chains.lengths
    signals = item.chains.signals if controller.uses_signal else None
    row = [Signal(i, nan, nan, nan) for i in range(1, k_max + 1)]
    t, last = 0, len(item.output) - 1
    while t < last:
        # t + 1 tokens are settled, and the target's own token needs room.
        room = item.max_new_tokens - t - 2
        drafted, stop = (room, "length") if room < k_max else (k_max, "k_max")
        if not drafted:
            stop = "none"
        elif not controller.start_drafting():
            drafted, stop = 0, "controller"
        else:
            if signals:
                row = signals[t]
            # At its limit a draft asks nobody; a drafter may have less to propose than that.
            if lengths[t] < drafted:
                drafted, stop = lengths[t], "drafter"
            for i in range(drafted - (stop != "drafter")):
                if not keep(row[i]):
                    drafted, stop = i + 1, "controller"
                    break
        accepted = min(drafted, match[t])
        controller.update(drafted, accepted)
        rounds.append((drafted, accepted, stop))
        t += accepted + 1
    return rounds
