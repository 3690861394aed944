"""Figures come from tables alone, redraw byte by byte, and refuse tables that would mislead."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

from eesd.analysis import style
from eesd.analysis.figures import FIGURES, figure
from eesd.analysis.tables import write_tables
from eesd.errors import EesdError
from eesd.replay.table import write_replay_table
from eesd.replay.trace import write_trace
from tests.analysis.factory import comparison, make_row, realistic_rows, unit, write_card, write_costs, write_rows
from tests.replay.factory import random_trace

REPLAYS = ["replay_regret", "replay_sensitivity", "replay_steps", "replay_strips"]
NAMES = [
    "acceptance",
    "discards",
    "divergence_gaps",
    "engine",
    "exit_layers",
    "heads",
    "heads_by_position",
    "prediction",
    "reliability",
    *REPLAYS,
    "round_cost",
    "speedup",
    "study",
    "time_split",
]


SAMPLED = {"vanilla": "baseline", "eesd": "not_compared"}


def test_registered_names() -> None:
    assert FIGURES.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_redraws_byte_by_byte(tables_dir: Path, tmp_path: Path, name: str) -> None:
    tables = tables_dir / "study" if name == "study" else tables_dir
    first = figure(name, tables, tmp_path / "one" / name)
    second = figure(name, tables, tmp_path / "two" / name)
    assert [path.name for path in first] == [f"{name}.pdf", f"{name}.png", f"{name}.svg"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_size > 1000


def svg(name: str, tables_dir: Path) -> str:
    """The figure as SVG, which has its words in comments; quicker than writing all three files."""
    stream = io.StringIO()
    with style.style():
        FIGURES[name](tables_dir).savefig(stream, format="svg")
    return stream.getvalue()


def test_speedup_has_both_baselines_and_counts(tables_dir: Path) -> None:
    text = svg("speedup", tables_dir)
    for words in ("speedup over our vanilla", "speedup over HF generate", "ASDiv (n = 6)", "static k = 2", "EESD"):
        assert words in text


def test_exit_layers_have_a_line_for_what_they_share(tables_dir: Path) -> None:
    text = svg("exit_layers", tables_dir)
    assert all(word in text for word in ("static k = 2", "Draft &amp; Verify", "exit layer", "ASDiv (n = 4)"))


def test_rounds_are_drawn_against_vanilla(tables_dir: Path, tmp_path: Path) -> None:
    for name, words in (("round_cost", "cost of a round (vanilla tokens)"), ("discards", "verifications per output")):
        text = svg(name, tables_dir)
        assert all(word in text for word in (words, "vanilla", "static k = 2", "ASDiv (n = 6)"))
        # Another library's seconds have no parts and its drafts no counts.
        assert "HF generate" not in text
    for column in ("method", "baseline"):
        for table in ("acceptance", "speedup"):
            frame = pd.read_csv(tables_dir / f"{table}.csv")
            left = frame[frame[column] != "vanilla"] if column == "baseline" and table == "speedup" else frame
            left = frame[frame["method"] == "vanilla"] if column == "method" else left
            left.to_csv(tmp_path / f"{table}.csv", index=False)
        with pytest.raises(EesdError, match="no group has both vanilla and a method"):
            svg("round_cost", tmp_path)


def test_replays_show_every_controller_oracle_and_task(tables_dir: Path) -> None:
    for name in ("replay_regret", "replay_steps"):
        text = svg(name, tables_dir)
        for words in ("toy, float32, Toy CPU", "ASDiv (n = 2)", "XSum (n = 2)", "Beta-TS", "HF heuristic"):
            assert words in text
    assert "oracle" in svg("replay_strips", tables_dir)
    text = svg("replay_sensitivity", tables_dir)
    assert "Beta-TS, toy, float32, Toy CPU" in text
    assert "forget" in text and "prior" in text


def test_every_cost_table_has_a_map_and_a_band_of_bars(tmp_path: Path) -> None:
    dear = [
        {**piece, "seconds": 3 * piece["seconds"]} for piece in json.loads(costs(tmp_path, "a").read_text())["costs"]
    ]
    tables = [costs(tmp_path, "slow CPU"), costs(tmp_path, "GPU of 7B"), costs(tmp_path, "GPU of 70B", costs=dear)]
    write_trace(random_trace(), tmp_path / "asdiv.safetensors")
    grid = {"forget": [0.9, 1.0], "prior": [[1, 1], [2, 1]]}
    settings = {"controllers": [{"name": "beta_ts", "grid": grid}], "seeds": 1}
    write_replay_table([tmp_path / "asdiv.safetensors"], tables, settings, tmp_path / "replay.csv", workers=1)
    text = svg("replay_sensitivity", tmp_path)
    assert all(f"Beta-TS, toy, float32, {device}" in text for device in ("slow CPU", "GPU of 7B", "GPU of 70B"))
    text = svg("replay_regret", tmp_path)
    assert all(text.count(f"toy, float32, {device}") == 1 for device in ("slow CPU", "GPU of 7B", "GPU of 70B"))


def costs(folder: Path, device: str, **changes) -> Path:
    return write_costs(folder / f"{device}.json", device=device, **changes)


def test_prediction_tells_both_errors_and_counts(tables_dir: Path, tmp_path: Path) -> None:
    text = svg("prediction", tables_dir)
    for words in ("speedup:", "paired:", "seconds:", "ASDiv (n = 2)", "static k = 2"):
        assert words in text
    table = pd.read_csv(tables_dir / "prediction.csv")
    table[table["method"] == "vanilla"].to_csv(tmp_path / "prediction.csv", index=False)
    with pytest.raises(EesdError, match="no method beside vanilla"):
        svg("prediction", tmp_path)


@pytest.mark.parametrize(
    ("name", "controllers", "message"),
    [
        ("replay_regret", ["oracle"], "no controller beside the oracle"),
        ("replay_steps", ["oracle", "beta_ts"], "no static controller"),
        ("replay_sensitivity", ["oracle", "static"], "no controller with two settings that vary"),
    ],
)
def test_a_replay_without_what_the_figure_shows(tables_dir: Path, tmp_path: Path, name, controllers, message) -> None:
    table = pd.read_csv(tables_dir / "replay.csv")
    table[table["controller"].isin(controllers)].to_csv(tmp_path / "replay.csv", index=False)
    with pytest.raises(EesdError, match=message):
        figure(name, tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("engine", "exit_layers", "prediction", "study", *REPLAYS)]
)
def test_one_task_two_methods_one_prompt(tmp_path: Path, name: str) -> None:
    rows = realistic_rows(tasks=("asdiv",), methods=("vanilla", "eesd"), n_items=1)
    cards = [write_card(tmp_path / "card.json")]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], cards, tmp_path / "tables")
    text = svg(name, tmp_path / "tables")
    assert ("n = 1: no interval" in text) == (name == "speedup")


def test_a_busy_machine_shows_in_the_speedups(tmp_path: Path) -> None:
    rows = [{**row, "crowding": 0.3} for row in realistic_rows(tasks=("asdiv",), n_items=2)]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    assert "ASDiv (n = 2, busy)" in svg("speedup", tmp_path / "tables")


def test_gaps_are_drawn_against_their_bound_or_said_to_be_none(tables_dir: Path, tmp_path: Path) -> None:
    assert "no output diverges" in svg("divergence_gaps", tables_dir)
    gaps = {"vanilla_token": 6, "token": 0, "gap": 0.01, "bound": 0.02, "vanilla_logit": 1.0, "logit": 1.01}
    rows = [
        *unit(dtype="bfloat16"),
        make_row("vanilla", "asdiv-2", dtype="bfloat16"),
        make_row(
            "eesd", "asdiv-2", output_tokens=[5, 0, 7, 8, 9], comparison=comparison("tie", 1, **gaps), dtype="bfloat16"
        ),
    ]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    text = svg("divergence_gaps", tmp_path / "tables")
    assert "bfloat16: 1 of 2 identical," in text and "1 ties, 0 different" in text
    assert "in length alone" not in text
    path = tmp_path / "tables" / "divergences.csv"
    table = pd.read_csv(path)
    longer = table.assign(item="asdiv-3", gap=None, bound=None, length_rule="eos_overrun")
    longer.to_csv(path, mode="a", header=False, index=False)
    assert "1 more differ in length alone" in svg("divergence_gaps", tmp_path / "tables")
    sampled = [make_row(m, decoding="sampled", comparison=comparison(c)) for m, c in SAMPLED.items()]
    write_tables([write_rows(tmp_path / "rows.jsonl", sampled)], [], tmp_path / "tables")
    with pytest.raises(EesdError, match="no greedy outputs"):
        svg("divergence_gaps", tmp_path / "tables")


def test_absent_method_is_said(tmp_path: Path) -> None:
    rows = [*unit(methods=("vanilla", "eesd", "medusa")), *unit("xsum-1", task="xsum")]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    for name in ("speedup", "time_split"):
        assert "not run" in svg(name, tmp_path / "tables")


def test_several_models_are_named(tmp_path: Path) -> None:
    rows = [*unit(), *unit(model="other")]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    text = svg("speedup", tmp_path / "tables")
    assert "toy, main" in text
    assert "other, main" in text


def test_more_tasks_than_columns(tmp_path: Path) -> None:
    rows = [row for task in "abcde" for row in unit(f"{task}-1", task=task)]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    assert "(continued)" in svg("acceptance", tmp_path / "tables")


def test_unknown_figure(tables_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="Did you mean 'speedup'"):
        figure("spedup", tables_dir, tmp_path / "spedup")


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match=r"speedup\.csv: no such file"):
        figure("speedup", tmp_path, tmp_path / "speedup")


def test_empty_table(tables_dir: Path, tmp_path: Path) -> None:
    header = (tables_dir / "heads.csv").read_text().splitlines()[0]
    (tmp_path / "heads.csv").write_text(header + "\n")
    with pytest.raises(EesdError, match=r"heads\.csv: no rows"):
        figure("heads", tmp_path, tmp_path / "heads")


@pytest.mark.parametrize("content", ["", "model,task\na,b\n", '"a\n'])
def test_foreign_table(tmp_path: Path, content: str) -> None:
    (tmp_path / "speedup.csv").write_text(content)
    with pytest.raises(EesdError, match=r"speedup\.csv: (no column|not a CSV)"):
        figure("speedup", tmp_path, tmp_path / "speedup")


def test_nothing_drafted(tmp_path: Path) -> None:
    rows = [make_row(), make_row("hf_generate")]
    write_tables([write_rows(tmp_path / "rows.jsonl", rows)], [], tmp_path / "tables")
    with pytest.raises(EesdError, match="no method drafts"):
        figure("acceptance", tmp_path / "tables", tmp_path / "acceptance")


def test_failure_leaves_the_old_figure(tables_dir: Path, tmp_path: Path) -> None:
    paths = figure("heads", tables_dir, tmp_path / "heads")
    before = [path.read_bytes() for path in paths]
    shutil.copy(tables_dir / "speedup.csv", tmp_path / "heads.csv")
    with pytest.raises(EesdError):
        figure("heads", tmp_path, tmp_path / "heads")
    assert [path.read_bytes() for path in paths] == before


def test_colours_are_stable_and_labels_keep_unknown_names() -> None:
    assert style.method_color("my_method") == style.method_color("my_method")
    assert style.method_color("eesd") == "#d55e00"
    assert style.method_color("static_k2") != style.method_color("static_k4")
    assert [style.method_label(name) for name in ("eesd", "static_k12", "my_method")] == [
        "EESD, Beta-TS",
        "static k = 12",
        "my_method",
    ]
    assert [style.task_label(name) for name in ("asdiv", "my_task")] == ["ASDiv", "my_task"]


def test_user_settings_do_not_change_figures(tables_dir: Path, tmp_path: Path) -> None:
    plain = figure("heads", tables_dir, tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        themed = figure("heads", tables_dir, tmp_path / "themed")
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in themed]


def test_analysis_never_imports_torch() -> None:
    modules = "eesd.analysis.tables, eesd.analysis.figures, eesd.analysis.provenance, eesd.analysis.study"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
