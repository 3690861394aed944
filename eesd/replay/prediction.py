"""prediction.csv: what the cost table predicts of measured generations, and the proof that replay makes their rounds.

    python -m eesd predict results/traces/smollm2-135m/asdiv/main/deep1.safetensors \
        --rows results/bench/smollm2-135m/asdiv/main.jsonl --costs resources/hardware/smollm2-135m.json \
        --out results/prediction/smollm2-135m/main/prediction.csv

Every greedy row of vanilla, or of a method that drafts chains with the head of a trace, is replayed with its own
controller and seed. Equal rounds are priced. Other rounds are an error if the C++ engine decoded, whose numbers do not
depend on how many positions are computed at once; a trace computes many, so other engines may round a draft to another
token. Such rows, and all that a replay cannot follow, are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.rows import Row, read_rows
from eesd.control import Controller, make_controller
from eesd.cost_file import measured_how
from eesd.errors import EesdError
from eesd.files import sha256_file
from eesd.replay.lookup import Lookup
from eesd.replay.loop import Rounds, equip_for, replay_item
from eesd.replay.oracle import Clock
from eesd.replay.trace import Trace, TracedItem, check_same_model, read_trace
from eesd.words import BASELINE

Made = tuple[Rounds, Controller]


@dataclass(frozen=True)
class Predictor:
    """One trace with its prices."""

    trace: Trace
    costs: Path

    @cached_property
    def clock(self) -> Clock:
        """Seconds of rounds on this trace."""
        facts = self.trace.facts
        return Clock(self.trace, facts.read_costs(self.costs, borrowed=False), facts.k_max)

    @cached_property
    def items(self) -> dict[str, TracedItem]:
        """Items by name."""
        return {item.id: item for item in self.trace.items}

    def rounds(self, row: Row) -> Made:
        """The rounds of a row in replay, and the controller that made them."""
        item = self.items[row["item"]]
        controller = make_controller(row["settings"]["controller"])
        equip_for(controller, self.trace, self.clock.table)
        found = replay_item(controller, item, row["seed"] - item.seed, Lookup.of(row["settings"].get("lookup")))
        return found, controller

    def seconds(self, row: Row, made: Made | None) -> float:
        """Predicted seconds of a row's rounds; made: these in replay, None for vanilla's."""
        item = self.items[row["item"]]
        return self.clock.item(item, *made) if made else self.clock.vanilla_item(item)


def _differs(row: Row, found: Rounds) -> bool:
    """Whether replay made other rounds than a row's; EesdError where that cannot be rounding."""
    live, made = ([(*one[:2], *one[3:]) for one in rounds] for rounds in (row["rounds"], found))
    if live != made and row["engine"].startswith("cpp-"):
        first = next((i for i, (a, b) in enumerate(zip(live, made, strict=False)) if a != b), min(len(live), len(made)))
        raise EesdError(
            f"{row['where']}: {row['method']} on {row['item']}: round {first} (drafted, accepted) is "
            f"{_at(live, first)} live and {_at(made, first)} in replay. Row and trace must come from the same code and "
            "head: record the trace again, or measure the rows again."
        )
    return live != made


def _at(rounds: Sequence[tuple[Any, ...]], place: int) -> tuple[Any, ...] | str:
    return rounds[place] if place < len(rounds) else "missing"


def write_prediction_table(traces: Sequence[Path], rows: Sequence[Path], costs: Path, out: Path) -> pd.DataFrame:
    """Predict every replayable row, write prediction.csv and print how far off the predictions are."""
    predictors = [Predictor(read_trace(path), costs) for path in traces]
    check_same_model([one.trace for one in predictors])
    measured = [row for row in read_rows(rows) if row["decoding"] == "greedy"]
    baselines = {_unit(row): row for row in measured if row["method"] == BASELINE}
    pairs, left_out = _pairs(predictors, measured)
    records = [_record(one, row, made, baselines[_unit(row)]) for one, row, made in pairs]
    if not any(record["method"] != BASELINE for record in records):
        why = "; ".join(f"{count} rows {why}" for why, count in left_out.items())
        raise EesdError(f"No row can be replayed ({why or 'all are vanilla'}). Give rows and traces of the same group.")
    table = pd.DataFrame(records)
    table["paired_error"] = paired_errors(table)
    table = table[list(COLUMNS["prediction"])]
    write_csv(table, out)
    print(describe(table))
    for why, count in left_out.items():
        print(f"left out: {count} rows, {why}")
    for how, count in Counter(_how(row) for _, row, _ in pairs).items():
        if how != predictors[0].clock.table.how:
            print(f"{count} rows were measured with {how}, their prices with {predictors[0].clock.table.how} ({costs})")
    return table


def _how(row: Row) -> str:
    return measured_how(row["dtype"], row["device"].split(":")[0], row["threads"])


def _unit(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "task", "group", "item", "repeat"))


def _pairs(
    predictors: Sequence[Predictor], rows: Sequence[Row]
) -> tuple[list[tuple[Predictor, Row, Made | None]], Counter[str]]:
    """Every row with the trace that can replay it, vanilla's with the first of its task, and what replay made of it;
    and why others have none."""
    pairs, left_out = [], Counter()
    for row in rows:
        settings = row["settings"]
        for one in predictors:
            facts = one.trace.facts
            same = (facts.model, facts.task) == (row["model"], row["task"])
            chain = settings.get("drafter") == "exit_head" and not settings.get("tree")
            drafts = chain and settings.get("head") == facts.drafter
            if same and (drafts or row["method"] == BASELINE):
                why = _obstacle(one, row)
                made = None if why or row["method"] == BASELINE else one.rounds(row)
                if made and _differs(row, made[0]):
                    why = f"drafted otherwise than the trace, many of whose positions {row['engine']} computes at once"
                if why:
                    left_out[why] += 1
                else:
                    pairs.append((one, row, made))
                break
        else:
            left_out["not drafted as a chain with the head of a trace"] += 1
    return pairs, left_out


def _obstacle(one: Predictor, row: Row) -> str:
    """Why a row's rounds cannot be made again, or nothing; EesdError for a row that the trace does not fit."""
    facts, settings = one.trace.facts, row["settings"]
    if row["dtype"] != facts.dtype or settings.get("head_sha256") not in (None, facts.head_sha256):
        raise EesdError(
            f"{row['where']}: the trace of {facts.model}, {facts.task}, {facts.drafter} was recorded with another head "
            f"or dtype than {row['method']}. Record it again."
        )
    if row["item"] not in one.items:
        raise EesdError(f"{row['where']}: {row['item']} is not in the trace of {facts.task}. Record it again.")
    if tuple(row["output_tokens"]) != one.items[row["item"]].output:
        return "rounding led to another output than the trace's"
    if not row["rounds"]:
        return "one token, which needs no round"
    rules = [part["controller"] for part in (settings, settings.get("lookup")) if part and "controller" in part]
    if any(rule.get("reset_on") == "never" for rule in rules):
        return "its controller remembers other prompts"
    if any(make_controller(rule).k_max > facts.k_max for rule in rules):
        return f"its drafts may be longer than the {facts.k_max} tokens that the trace holds"
    if settings.get("costs_sha256") not in (None, sha256_file(one.costs)):
        return "decided by another cost table"
    return ""


def _record(one: Predictor, row: Row, made: Made | None, baseline: Row) -> dict[str, Any]:
    predicted, measured = one.seconds(row, made), _measured(row)
    return {
        **{key: row[key] for key in ("model", "task", "group", "method", "item", "repeat")},
        "drafter": None if row is baseline else one.trace.facts.drafter,
        "predicted_s": predicted,
        "measured_s": measured,
        "error": predicted / measured - 1,
        "predicted_speedup": one.seconds(baseline, None) / predicted,
        "measured_speedup": _measured(baseline) / measured,
        "tokens": len(row["output_tokens"]) - 1,
        "rounds": len(row["rounds"]),
        "hardware": one.clock.table.hardware,
    }


def paired_errors(table: pd.DataFrame) -> pd.Series:
    """Error of every row once its prediction is scaled by how fast the machine was in its unit.

    The scale is the median of measured / predicted over the other rows of the unit, so no row explains itself; NaN for
    a row that is alone.
    """
    ratio = table["measured_s"] / table["predicted_s"]
    errors = pd.Series(np.nan, index=table.index)
    for rows in table.groupby(["model", "task", "group", "item", "repeat"]).groups.values():
        for row in rows:
            errors[row] = ratio[rows.drop(row)].median() / ratio[row] - 1
    return errors


def _measured(row: Mapping[str, Any]) -> float:
    return row["seconds"]["total"] - row["seconds"]["prefill"]


def describe(table: pd.DataFrame) -> str:
    """How far off the predictions are, in one line for each kind of error."""
    lines = [f"{len(table)} rows, {table['rounds'].sum()} rounds, the same live and in replay."]
    drafting = table[table["method"] != BASELINE]
    kinds = {
        "seconds": table["error"],
        "seconds, the machine's speed in the unit taken out": table["paired_error"],
        "the speedup over vanilla": drafting["predicted_speedup"] / drafting["measured_speedup"] - 1,
    }
    for name, errors in kinds.items():
        median, high = errors.abs().quantile([0.5, 0.9])
        said = f"error of {name}: median {100 * median:.1f} %, 90th percentile {100 * high:.1f} %"
        lines.append(f"{said}; {100 * errors.median():+.1f} % in the median")
    return "\n".join(lines)
