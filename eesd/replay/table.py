"""replay.csv: every controller setting on every trace, timed with every cost table, beside the oracle.

    python -m eesd replay results/traces/smollm2-135m/asdiv/deep4.safetensors \
        --costs resources/hardware/smollm2-135m.json --out results/tables/replay.csv \
        --settings '{"controllers": [{"name": "static", "grid": {"k": [1, 2, 4, 8]}}, {"name": "beta_ts"}], "seeds": 3}'

`grid` lists values of settings, and all their combinations are replayed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis.columns import COLUMNS
from eesd.analysis.tables import write_csv
from eesd.control import Controller, CostTable, make_controller, read_costs
from eesd.control.grid import all_settings, expand
from eesd.errors import EesdError
from eesd.progress import progress
from eesd.replay.loop import Rounds, equip_for, replay
from eesd.replay.oracle import Clock, oracle
from eesd.replay.trace import Trace, check_same_model, read_trace

ORACLE = "oracle"
# Settings that a process replays before it reports: enough to hide what starting it costs, few enough to share evenly.
CHUNK = 25


def write_replay_table(
    traces: Sequence[Path], costs: Sequence[Path], settings: Mapping[str, Any], out: Path, workers: int = 0
) -> pd.DataFrame:
    """Replay all settings on all traces and write replay.csv, sorted as the arguments are."""
    for cache in (_trace, _clock):  # files may have changed since an earlier call
        cache.cache_clear()
    check_same_model([_trace(path) for path in traces])
    chosen = expand(settings["controllers"])
    chunks = [chosen[first : first + CHUNK] for first in range(0, len(chosen), CHUNK)]
    jobs = [(path, tuple(costs), chunk, settings["seeds"]) for path in traces for chunk in [None, *chunks]]
    workers = workers or min(os.cpu_count() or 1, len(jobs))
    records: list[dict[str, Any]] = []
    with progress("replay", len(jobs), "chunk") as bar, ProcessPoolExecutor(workers) as pool:
        for found in pool.map(_replay_chunk, *zip(*jobs, strict=True)):
            records += found
            bar.update()
    table = _with_regret(pd.DataFrame(records))[list(COLUMNS["replay"])]
    write_csv(table, out)
    return table


@lru_cache(maxsize=4)
def _trace(path: Path) -> Trace:
    return read_trace(path)


@lru_cache(maxsize=16)
def _clock(trace_path: Path, cost_path: Path) -> tuple[Clock, CostTable]:
    trace = _trace(trace_path)
    table = read_costs(cost_path, trace.facts.exit_layer)
    return Clock(trace, table, trace.facts.k_max), table


def _replay_chunk(
    path: Path, costs: Sequence[Path], chunk: Sequence[Mapping[str, Any]] | None, seeds: int
) -> list[dict[str, Any]]:
    """Records of some settings on one trace, for every cost table; None stands for the oracle."""
    trace = _trace(path)
    records = []
    for cost_path in costs if chunk is None else []:
        clock, table = _clock(path, cost_path)
        rounds = oracle(clock, trace.facts.k_max)
        records.append(_record(trace, table, clock, [rounds], ORACLE, {"k_max": trace.facts.k_max}))
    for settings in chunk or []:
        replays: list[list[Rounds]] = []
        for cost_path in costs:
            clock, table = _clock(path, cost_path)
            controller = make_controller(settings)
            if controller.uses_costs or not replays:
                replays = list(_replays(controller, settings, trace, table, seeds))
            records.append(_record(trace, table, clock, replays, settings["name"], all_settings(controller)))
    return records


def _replays(
    controller: Controller, settings: Mapping[str, Any], trace: Trace, table: CostTable, seeds: int
) -> Iterator[list[Rounds]]:
    """One replay for each seed, each with a controller that has seen nothing; one is enough without chance."""
    for shift in range(seeds if controller.uses_chance else 1):
        fresh = make_controller(settings)
        equip_for(fresh, trace, table)
        yield replay(fresh, trace, shift)


def _record(
    trace: Trace,
    table: CostTable,
    clock: Clock,
    replays: Sequence[list[Rounds]],
    name: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """A row of the table, without its regret; means over the replays."""
    rounds = [one for made in replays for item in made for one in item]
    drafted, accepted = sum(one[0] for one in rounds), sum(one[1] for one in rounds)
    seconds = sum(clock.time(made) for made in replays) / len(replays)
    facts = trace.facts
    return {
        "model": facts.model,
        "task": facts.task,
        "drafter": facts.drafter,
        "controller": name,
        "settings": json.dumps(settings, sort_keys=True),
        "hardware": table.hardware,
        "tokens_per_round": len(replays) * trace.output_tokens / len(rounds),
        "drafted_per_round": drafted / len(rounds),
        "acceptance_rate": accepted / drafted if drafted else None,
        "predicted_speedup": clock.vanilla() / seconds,
        "seconds_per_token": seconds / trace.output_tokens,
        "rounds": len(rounds) / len(replays),
        "output_tokens": trace.output_tokens,
        "n_items": len(trace.items),
        "seeds": len(replays),
        "dtype": facts.dtype,
    }


def _with_regret(table: pd.DataFrame) -> pd.DataFrame:
    """Add 1 - predicted speedup / the oracle's on the same trace and hardware."""
    where = ["model", "task", "drafter", "hardware"]
    best = table[table["controller"] == ORACLE].set_index(where)["predicted_speedup"]
    if best.index.has_duplicates:
        raise EesdError("Two traces of the same model, task and drafter, or a cost table twice: give each once.")
    oracles = best.loc[list(table[where].itertuples(index=False, name=None))].to_numpy()
    return table.assign(regret=1 - table["predicted_speedup"].to_numpy() / oracles)
