"""replay.csv: every controller setting on every trace, timed with every cost table, beside the oracle.

    python -m eesd replay results/traces/smollm2-135m/asdiv/main/deep1.safetensors \
        --costs resources/hardware/smollm2-135m.json --out results/replay/smollm2-135m/regret/replay.csv \
        --settings '{"controllers": [{"name": "static", "grid": {"k": [1, 2, 4, 8]}}, {"name": "beta_ts"}], "seeds": 3}'

`grid` lists values of settings, and all their combinations are replayed. `lookup`, as in a method, puts prompt lookup
before the drafter of every replay, those of the oracle and of the best static length included.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.stats import Speedup, paired_speedup
from eesd.control import CostTable, make_controller, read_costs
from eesd.control.grid import all_settings, expand
from eesd.errors import EesdError
from eesd.progress import progress
from eesd.replay.lookup import Lookup
from eesd.replay.loop import Rounds, equip_for, replay
from eesd.replay.oracle import Clock, oracle
from eesd.replay.trace import Trace, check_same_model, read_trace
from eesd.words import BASELINE

ORACLE = "oracle"
# Settings that a process replays before it reports: enough to hide what starting it costs, few enough to share evenly.
CHUNK = 25
# Of items, for the interval of one row: a table may have thousands.
RESAMPLES = 999


def write_replay_table(
    traces: Sequence[Path], costs: Sequence[Path], settings: Mapping[str, Any], out: Path, workers: int = 0
) -> pd.DataFrame:
    """Replay all settings on all traces and write replay.csv, sorted as the arguments are."""
    for cache in (_trace, _clock):  # files may have changed since an earlier call
        cache.cache_clear()
    costs = _first_of_each(costs)
    check_same_model([_trace(path) for path in traces])
    chosen = expand(settings["controllers"])
    chunks = [chosen[first : first + CHUNK] for first in range(0, len(chosen), CHUNK)]
    shared = (tuple(costs), settings["seeds"], settings.get("lookup"))
    jobs = [(path, chunk, *shared) for path in traces for chunk in [None, *chunks]]
    workers = workers or min(os.cpu_count() or 1, len(jobs))
    records: list[dict[str, Any]] = []
    with progress("replay", len(jobs), "chunk") as bar, ProcessPoolExecutor(workers) as pool:
        for found in pool.map(_replay_chunk, *zip(*jobs, strict=True)):
            records += found
            bar.update()
    table = _compared(pd.DataFrame(records))[list(COLUMNS["replay"])]
    write_csv(table, out)
    return table


def _first_of_each(costs: Sequence[Path]) -> list[Path]:
    """The cost tables without those of a model and machine that an earlier one is of: measured here and published."""
    found: dict[str, Path] = {}
    for path in costs:
        hardware = read_costs(path).hardware
        if found.setdefault(hardware, path) != path:
            print(f"{path}: left out, {found[hardware]} is of {hardware} too.", file=sys.stderr)
    return list(found.values())


@lru_cache(maxsize=4)
def _trace(path: Path) -> Trace:
    return read_trace(path)


@lru_cache(maxsize=16)
def _clock(trace_path: Path, cost_path: Path) -> tuple[Clock, CostTable]:
    trace = _trace(trace_path)
    table = trace.facts.read_costs(cost_path)
    return Clock(trace, table, trace.facts.k_max), table


def _replay_chunk(
    path: Path,
    chunk: Sequence[Mapping[str, Any]] | None,
    costs: Sequence[Path],
    seeds: int,
    lookup: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Records of some settings on one trace, for every cost table; None stands for the oracle."""
    trace = _trace(path)
    records = []
    for cost_path in costs if chunk is None else []:
        clock, table = _clock(path, cost_path)
        k_max = trace.facts.k_max
        rounds = oracle(clock, k_max, Lookup.of(lookup))
        found = _record(trace, table, [rounds], clock.items(rounds), (ORACLE, {"k_max": k_max}), lookup)
        records.append({**found, **_references(trace, clock, table, seeds, lookup)})
    for settings in chunk or []:
        replays: list[list[Rounds]] = []
        for cost_path in costs:
            clock, table = _clock(path, cost_path)
            controller = make_controller(settings)
            if controller.uses_costs or not replays:
                replays = list(_replays(settings, trace, table, seeds, lookup))
            seconds = np.mean([clock.items(made, controller) for made in replays], 0)
            named = (settings["name"], all_settings(controller))
            records.append(_record(trace, table, replays, seconds, named, lookup))
    return records


def _replays(
    settings: Mapping[str, Any], trace: Trace, table: CostTable, seeds: int, lookup: Mapping[str, Any] | None
) -> Iterator[list[Rounds]]:
    """One replay for each seed, each with controllers that have seen nothing; one is enough without chance."""
    first = Lookup.of(lookup)
    chance = make_controller(settings).uses_chance or (first is not None and first.controller.uses_chance)
    for shift in range(seeds if chance else 1):
        fresh = make_controller(settings)
        equip_for(fresh, trace, table)
        yield replay(fresh, trace, shift, Lookup.of(lookup))


def _references(
    trace: Trace, clock: Clock, table: CostTable, seeds: int, lookup: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Seconds by item of vanilla and of the static draft length that, as hindsight shows, was best on the trace."""
    statics = [{"name": "static", "k": k} for k in range(1, trace.facts.k_max + 1)]
    seconds = [
        np.mean([clock.items(made, make_controller(one)) for made in _replays(one, trace, table, seeds, lookup)], 0)
        for one in statics
    ]
    best = int(np.argmin(np.sum(seconds, 1)))
    return {BASELINE: clock.vanilla_items(), "best_static": seconds[best], "best_static_k": best + 1}


def drafter_name(trace: Trace, lookup: Mapping[str, Any] | None) -> str:
    """Who drafts in a replay: the head of the trace, maybe after copies."""
    return trace.facts.drafter + ("" if lookup is None else " + lookup")


def _record(
    trace: Trace,
    table: CostTable,
    replays: Sequence[list[Rounds]],
    seconds: Sequence[float],
    named: tuple[str, Mapping[str, Any]],
    lookup: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A row of the table without what compares it with others; means over the replays. seconds: by item. named: name
    and settings of the controller."""
    rounds = [one for made in replays for item in made for one in item]
    drafted, accepted = sum(one[0] for one in rounds), sum(one[1] for one in rounds)
    facts = trace.facts
    if not rounds:
        raise EesdError(
            f"Trace of {facts.model}, {facts.task}: no output has more than one token, so there is nothing to replay. "
            "Take other prompts, or a larger max_new_tokens."
        )
    return {
        "model": facts.model,
        "task": facts.task,
        "drafter": drafter_name(trace, lookup),
        "controller": named[0],
        "settings": json.dumps(named[1], sort_keys=True),
        "hardware": table.hardware,
        "tokens_per_round": len(replays) * trace.output_tokens / len(rounds),
        "drafted_per_round": drafted / len(rounds),
        "acceptance_rate": accepted / drafted if drafted else None,
        "seconds": list(seconds),
        "seconds_per_token": float(np.sum(seconds)) / trace.output_tokens,
        "rounds": len(rounds) / len(replays),
        "output_tokens": trace.output_tokens,
        "n_items": len(trace.items),
        "seeds": len(replays),
        "dtype": facts.dtype,
    }


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """Add what a record is against vanilla, the best static draft and the oracle of its trace and hardware."""
    where = ["model", "task", "drafter", "hardware"]
    best = table[table["controller"] == ORACLE].set_index(where)
    if best.index.has_duplicates:
        raise EesdError("Two traces of the same model, task and drafter: give each once.")
    records = []
    for key, seconds in zip(table[where].itertuples(index=False, name=None), table["seconds"], strict=True):
        same = best.loc[key]
        speedup, hindsight = _ratio(same[BASELINE], seconds), _ratio(same["best_static"], seconds)
        records.append(
            {
                "predicted_speedup": speedup.ratio,
                "ci_low": speedup.low,
                "ci_high": speedup.high,
                "regret": 1 - sum(same["seconds"]) / sum(seconds),
                "best_static_k": int(same["best_static_k"]),
                "of_best_static": hindsight.ratio,
                "of_best_static_low": hindsight.low,
                "of_best_static_high": hindsight.high,
            }
        )
    return pd.concat([table.drop(columns="best_static_k"), pd.DataFrame(records, table.index)], axis=1)


def _ratio(base: Sequence[float], seconds: Sequence[float]) -> Speedup:
    """How many times faster than `base`, with an interval over items; outputs of one token have no rounds."""
    pairs = [(one, own) for one, own in zip(base, seconds, strict=True) if one > 0]
    ones, own = zip(*pairs, strict=True)
    tokens = [1.0] * len(pairs)
    return paired_speedup(range(len(pairs)), tokens, own, tokens, ones, n_resamples=RESAMPLES)
