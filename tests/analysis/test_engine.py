"""engine.csv from cost tables: numbers by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd.analysis.engine import write_engine_table
from eesd.analysis.figures import figure
from eesd.analysis.figures.engine import _parts, draw_engine
from eesd.control import read_costs
from eesd.errors import EesdError
from tests.analysis.factory import write_costs


def test_bandwidth_share_by_hand(tmp_path: Path) -> None:
    table = write_engine_table([write_costs(tmp_path / "toy.json")], tmp_path / "engine.csv")
    vanilla = table[(table["path"] == "vanilla") & (table["context_tokens"] == 128)].iloc[0]
    # 270 MB at 45 GB/s take 6 ms of the 9 ms measured.
    assert vanilla["bandwidth_share"] == pytest.approx(6 / 9)
    assert (table["path"] == "controller").sum() == 1


def test_costs_of_a_busy_machine_are_marked(tmp_path: Path) -> None:
    for crowding, machine in ((0.04, "Toy CPU"), (0.3, "Toy CPU, machine busy")):
        costs = write_costs(tmp_path / "toy.json", crowding=crowding)
        assert set(write_engine_table([costs], tmp_path / "engine.csv")["device"]) == {machine}
        assert read_costs(costs).hardware == f"toy, float32, {machine}"


def test_two_models_are_two_rows_of_panels(tmp_path: Path) -> None:
    files = [write_costs(tmp_path / "a.json", "a"), write_costs(tmp_path / "b.json", "b")]
    table = write_engine_table(files, tmp_path / "engine.csv")
    assert set(table["model"]) == {"a", "b"}
    assert all(path.is_file() for path in figure("engine", tmp_path, tmp_path / "engine"))


def test_two_machines_of_one_model_are_kept_apart(tmp_path: Path) -> None:
    files = [write_costs(tmp_path / f"{name}.json", device=name) for name in ("one", "other")]
    write_engine_table(files, tmp_path / "engine.csv")
    drawing = draw_engine(tmp_path)
    assert len(drawing.axes) == 4
    assert ["one" in drawing.axes[0].get_title(loc="left"), "other" in drawing.axes[2].get_title(loc="left")] == [
        True
    ] * 2


def test_bars_add_up_to_whole_rounds(tmp_path: Path) -> None:
    path = write_costs(tmp_path / "toy.json")
    pieces = json.loads(path.read_text())["costs"]
    pieces += [{**pieces[0], "path": name, "query_tokens": k, "seconds": s} for name, k, s in (("round", 4, 0.016),)]
    table = write_engine_table([write_costs(path, costs=pieces)], tmp_path / "engine.csv")
    vanilla, eesd = _parts(table[table["context_tokens"] == 128])
    assert sum(vanilla.values()) == pytest.approx(0.009)
    assert sum(eesd.values()) == pytest.approx(0.016)
    # Four steps of 2 ms, half of each first layers; and those of the last token.
    assert eesd["first layers"] == pytest.approx(4 * 0.001 + 0.001)
    apart, _ = _parts(table[table["context_tokens"] == 1024])
    assert sum(apart.values()) == pytest.approx(0.009)


def test_bad_cost_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="not a cost table"):
        write_engine_table([tmp_path / "none.json"], tmp_path / "engine.csv")
    piece = {"path": "vanilla", "query_tokens": 1, "context_tokens": 8, "seconds": 0.0, "bytes": 1}
    with pytest.raises(EesdError, match=r"vanilla of 1 tokens at context 8 has no time above zero"):
        write_engine_table([write_costs(tmp_path / "zero.json", costs=[piece])], tmp_path / "engine.csv")
    write_engine_table([write_costs(tmp_path / "few.json", costs=[{**piece, "seconds": 1.0}])], tmp_path / "engine.csv")
    with pytest.raises(EesdError, match="no cost of first_layers"):
        figure("engine", tmp_path, tmp_path / "engine")
