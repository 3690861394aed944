"""Exit layers: which methods share a line, and how lines are told apart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from eesd.analysis.exits import series
from eesd.analysis.tables import build_tables, write_tables
from tests.analysis.factory import make_row, write_card, write_rows


def test_exit_layers_are_compared_where_nothing_else_differs(tables_dir: Path, tmp_path: Path) -> None:
    table = pd.read_csv(tables_dir / "exit_layers.csv")
    assert set(table["exit_layer"]) == {2, 4, 8}
    assert set(table["series"]) == {"static k = 2, context none", "draft_verify, context none"}
    assert (table.groupby("exit_layer")["speedup"].first().diff().dropna() < 0).all(), "deeper was made slower"
    settings = {"head": "exit4", "controller": {"name": "static", "k": 2}}
    rows = [make_row("vanilla"), make_row("a", settings=settings)]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [write_card(tmp_path / "card.json")], tmp_path)
    assert not (tmp_path / "exit_layers.csv").exists(), "one depth compares nothing"
    rule = {"name": "beta_ts", "k_max": 12, "prior": [1.0, 1.0], "reset_on": "prompt"}  # as by default
    assert series({"controller": rule}, "verified") == "beta_ts"
    tree = {"nodes": 5, "width": 2, "acceptance": "exact", "epsilon": 0.09, "delta": 0.3}
    assert series({"controller": {**rule, "k_max": 4}, "tree": tree}, "none") == (
        "beta_ts k_max = 4, tree of 5 and width 2, context none"
    )
    rows.append(make_row("b", settings={**settings, "head": "exit8"}))
    path = write_rows(tmp_path / "rows.jsonl", rows)
    cards = [write_card(tmp_path / "card.json"), tmp_path / "exit8.json"]
    for loss, compared in (("soft", True), ("hard", False)):
        trained = {"seed": 0, "exit_layer": 8} if compared else {"seed": 0, "exit_layer": 8, "loss": {loss: 1}}
        write_card(cards[1], "exit8", exit_layer=8, settings=trained)
        write_tables([path], cards, tmp_path / loss)
        assert (tmp_path / loss / "exit_layers.csv").exists() == compared, "heads learnt from other labels"


def test_lines_of_heads_that_learnt_otherwise_say_how(tmp_path: Path) -> None:
    rows, cards = [make_row("vanilla")], []
    for layer in (2, 4):
        for seed in (0, 1):
            head = f"exit{layer}-{seed}"
            settings = {"head": head, "controller": {"name": "static", "k": 2}}
            rows.append(make_row(head, settings=settings))
            trained = {"seed": seed, "exit_layer": layer, "loss": {"soft": 1}}
            cards.append(write_card(tmp_path / f"{head}.json", head, exit_layer=layer, settings=trained))
    table = build_tables(rows, cards)["exit_layers"]
    assert table.groupby("series")["head"].agg(list).to_dict() == {
        "static k = 2, context none, seed = 0": ["exit2-0", "exit4-0"],
        "static k = 2, context none, seed = 1": ["exit2-1", "exit4-1"],
    }
