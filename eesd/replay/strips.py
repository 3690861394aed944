"""strips.csv: how draft lengths follow what can be drafted, along one answer of each trace.

    python -m eesd strips results/traces/smollm2-135m/asdiv/main/deep1.safetensors \
        --costs resources/hardware/smollm2-135m.json --out results/replay/smollm2-135m/strips/strips.csv \
        --settings '{"controllers": [{"name": "static", "k": 4}, {"name": "beta_ts"}], "seeds": 1}'

The answer is chosen by a rule: the item whose mean match length is the median of its task, the lower of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.control import CostTable, make_controller
from eesd.control.grid import expand
from eesd.errors import EesdError
from eesd.replay.lookup import Lookup
from eesd.replay.loop import Rounds, equip_for, replay_item
from eesd.replay.oracle import Clock, oracle
from eesd.replay.table import drafter_name
from eesd.replay.trace import Trace, TracedItem, check_same_model, read_trace

MATCH, ORACLE = "match", "oracle"


def write_strips_table(traces: Sequence[Path], costs: Path, settings: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """The rounds of every controller on the median item of every trace, below what could be drafted and the oracle."""
    found = [read_trace(path) for path in traces]
    check_same_model(found)
    chosen = expand(settings["controllers"])
    records = []
    for trace in found:
        table = trace.facts.read_costs(costs)
        item = median_item(trace)
        who = {
            "model": trace.facts.model,
            "task": trace.facts.task,
            "drafter": drafter_name(trace, settings.get("lookup")),
        }
        for label, rounds in _lines(trace, item, table, chosen, settings.get("lookup")):
            records += [{**who, "item": item.id, "label": label, **one} for one in rounds]
    result = pd.DataFrame(records, columns=list(COLUMNS["strips"]))
    write_csv(result, out)
    return result


def median_item(trace: Trace) -> TracedItem:
    """The item whose mean match length is the median, of two the lower; outputs of one token have none."""
    items = [item for item in trace.items if len(item.output) > 1]
    if not items:
        raise EesdError(f"The trace of {trace.facts.task} has no output of two tokens, so there is nothing to show.")
    items.sort(key=lambda item: (float(item.chains.match.mean()), item.id))
    return items[(len(items) - 1) // 2]


def _lines(
    trace: Trace,
    item: TracedItem,
    table: CostTable,
    chosen: Sequence[Mapping[str, Any]],
    lookup: Mapping[str, Any] | None,
) -> Iterator[tuple[str, list[dict[str, int]]]]:
    """What could be drafted at every position, then the rounds of the oracle and of every controller."""
    longest = max(make_controller(settings).k_max for settings in chosen)
    possible = [min(longest, length) for length in item.chains.matches]
    yield MATCH, [{"position": t, "drafted": longest, "accepted": match} for t, match in enumerate(possible)]
    one = Trace(trace.facts, (item,))
    first = Lookup.of(lookup)
    longest = max(longest, first.controller.k_max if first else 0)
    yield ORACLE, _placed(oracle(Clock(one, table, longest), longest, first)[0])
    for settings in chosen:
        controller = make_controller(settings)
        equip_for(controller, trace, table)
        if controller.k_max > trace.facts.k_max:
            raise EesdError(f"{settings['name']} may draft {controller.k_max} tokens: record a longer trace.")
        label = ", ".join([settings["name"], *(f"{key} = {value}" for key, value in settings.items() if key != "name")])
        # A lookup of its own: no line depends on what the controller of another one's lookup has learnt.
        yield label, _placed(replay_item(controller, item, 0, Lookup.of(lookup)))


def _placed(rounds: Rounds) -> list[dict[str, int]]:
    """Rounds with the output token after which each drafts."""
    found, position = [], 0
    for drafted, accepted, *_ in rounds:
        found.append({"position": position, "drafted": drafted, "accepted": accepted})
        position += accepted + 1
    return found
