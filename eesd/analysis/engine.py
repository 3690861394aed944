"""The table of what decoding costs, from the cost tables that `eesd hardware` measures.

python -m eesd engine --out results/tables/engine.csv resources/hardware/smollm2-135m.json
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from eesd.analysis.columns import COLUMNS, write_csv
from eesd.cost_file import read_measured

SHARED = ("model", "device", "dtype", "engine", "threads")


def write_engine_table(cost_files: Iterable[Path | str], out: Path | str) -> pd.DataFrame:
    """One row for every piece, query and context length of every cost table, in the order they were measured."""
    records = [record for path in cost_files for record in _records(path)]
    table = pd.DataFrame(records, columns=list(COLUMNS["engine"]))
    write_csv(table, out)
    return table


def _records(path: Path | str) -> list[dict[str, Any]]:
    measured = read_measured(path)
    costs = measured.facts
    shared = {field: costs[field] for field in SHARED} | {"device": measured.machine}
    step = {"path": "controller", "query_tokens": 1, "context_tokens": None, "seconds": costs["controller_step_s"]}
    pieces, bandwidth = costs["costs"], costs["read_bandwidth_bytes_per_s"]
    # The bound of the same minutes, where it was measured beside the pieces.
    streams = {p["context_tokens"]: p["bytes"] / p["seconds"] for p in pieces if p["path"] == "stream"}
    for piece in pieces:
        bound = streams.get(piece["context_tokens"], bandwidth)
        piece["bandwidth_share"] = piece["bytes"] / bound / piece["seconds"]
    return [{**shared, **piece} for piece in [*pieces, step]]
