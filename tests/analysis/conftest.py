"""Tables of a synthetic run, made once for all tests that only read them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eesd.analysis.engine import write_engine_table
from eesd.analysis.tables import write_tables
from eesd.replay.prediction import write_prediction_table
from eesd.replay.strips import write_strips_table
from eesd.replay.table import write_replay_table
from eesd.replay.trace import write_trace
from tests.analysis.factory import realistic_rows, write_card, write_costs, write_exits, write_rows, write_study
from tests.replay.factory import live_rows, random_trace


@pytest.fixture(scope="session")
def tables_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tables of five methods on three tasks."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "main.jsonl", realistic_rows(n_items=6))
    write_tables([rows], [write_card(folder / "card.json")], folder / "tables")
    write_engine_table([write_costs(folder / "toy.json")], folder / "tables" / "engine.csv")
    traces = [folder / f"{task}.safetensors" for task in ("asdiv", "xsum")]
    for path in traces:
        write_trace(random_trace(path.stem), path)
    grid = {"forget": [0.9, 1.0], "prior": [[1, 1], [2, 1], [4, 1]]}
    controllers = [
        {"name": "static", "grid": {"k": [1, 2, 4]}},
        {"name": "hf_heuristic", "k_max": 12},
        {"name": "beta_ts", "grid": grid},
    ]
    settings = {"controllers": controllers, "seeds": 1}
    write_replay_table(traces, [folder / "toy.json"], settings, folder / "tables" / "replay.csv", workers=1)
    alone = {"controllers": [{"name": "static", "k": 2}, {"name": "beta_ts"}], "seeds": 1}
    write_strips_table(traces, folder / "toy.json", alone, folder / "tables" / "strips.csv")
    rows = write_rows(folder / "traced.jsonl", [row for path in traces for row in live_rows(random_trace(path.stem))])
    write_prediction_table(traces, [rows], folder / "toy.json", folder / "tables" / "prediction.csv")
    shutil.copy(write_exits(folder / "exits"), folder / "tables")
    write_study(folder / "tables" / "study", "exit_layer", [2, 4, 8], seeds=3)
    return folder / "tables"
