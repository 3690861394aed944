"""Tables of a synthetic run, made once for all tests that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eesd.analysis.engine import write_engine_table
from eesd.analysis.tables import write_tables
from tests.analysis.factory import realistic_rows, write_card, write_costs, write_rows


@pytest.fixture(scope="session")
def tables_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tables of five methods on three tasks."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "main.jsonl", realistic_rows(n_items=6))
    write_tables([rows], [write_card(folder / "card.json")], folder / "tables")
    write_engine_table([write_costs(folder / "toy.json")], folder / "tables" / "engine.csv")
    return folder / "tables"
