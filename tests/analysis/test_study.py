"""Tables and figures of trained heads: studies, calibration, agreement by position."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from eesd.analysis import style
from eesd.analysis.cards import calibration_records
from eesd.analysis.columns import COLUMNS, write_csv
from eesd.analysis.figures import FIGURES
from eesd.analysis.figures.distill import read_study
from eesd.analysis.stats import mean_interval
from eesd.analysis.study import write_study_table
from eesd.errors import EesdError
from tests.analysis.factory import write_card, write_study
from tests.analysis.test_figures import svg


def test_rows_stay_in_the_order_of_the_study_with_value_and_seed(tmp_path: Path) -> None:
    table = pd.read_csv(write_study(tmp_path, "init", ["last", "same"], seeds=2) / "heads.csv")
    assert list(table.columns) == list(COLUMNS["heads"])
    assert list(dict.fromkeys(table["head"])) == [f"toy.init-{v}.s{s}" for v in ("last", "same") for s in (0, 1)]
    assert set(table["study"]) == {"toy"}
    assert [json.loads(text)["init"] for text in table["varied"]] == list(table["init"])
    assert table.groupby("head")["seed"].first().tolist() == [0, 1, 0, 1]
    assert table[["task", "position"]].values.tolist()[:4] == [["asdiv", 1], ["asdiv", 2], ["xsum", 1], ["xsum", 2]]


def test_cards_of_another_study_are_refused(tmp_path: Path) -> None:
    card = write_card(tmp_path / "card.json", "init.last.s0")
    with pytest.raises(
        EesdError, match=r"study init needs one card .* missing or foreign: init\.last\.s0, init\.last\.s1"
    ):
        write_study_table([card], {"study": "init", "varied": [["init.last.s1", {}]]}, tmp_path / "heads.csv")


def test_interval_over_seeds_by_hand() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3))
    assert low + high == pytest.approx(2 * mean)
    assert mean_interval([1.0])[0] == 1.0
    assert all(math.isnan(end) for end in (*mean_interval([1.0])[1:], *mean_interval([])))


def test_figure_names_study_values_tasks_and_seeds(tmp_path: Path) -> None:
    text = svg("study", write_study(tmp_path / "one", "init", ["last", "same"], seeds=3, others={"context": "none"}))
    for words in ("toy: top-1 agreement, first drafted token (n = 3 seeds)", "last", "same", "ASDiv", "XSum"):
        assert words in text
    text = svg("study", write_study(tmp_path / "two", "train_tokens", [500, 5000, 50087]))
    for words in ("1 seed: no interval", "training tokens", "500", "5k", "50k"):
        assert words in text


def test_seeds_that_meet_a_budget_about_share_a_point(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "train_tokens", [1000, 2000], seeds=3)
    table = pd.read_csv(folder / "heads.csv")
    table["train_tokens"] += 3 * table["seed"]
    table.to_csv(folder / "heads.csv", index=False)
    assert sorted(set(read_study(folder)["value"])) == [1003, 2003]


@pytest.mark.parametrize("key", ["init", "train_tokens"])
@pytest.mark.parametrize("without", [["xsum"], ["asdiv", "xsum"]])
def test_chain_lengths_that_were_not_measured_are_said_to_be_missing(
    tmp_path: Path, key: str, without: list[str]
) -> None:
    folder = write_study(tmp_path, key, [1000, 2000], seeds=2)
    table = pd.read_csv(folder / "heads.csv")
    table.loc[table["task"].isin(without), "chain_length"] = math.nan
    write_csv(table, folder / "heads.csv")
    text = svg("study", folder)
    assert text.count("<!-- not measured -->") == len(without) and "nan" not in text
    text = svg("heads_by_position", folder)
    assert text.count(": not measured -->") == len(without) * table["head"].nunique() and "nan" not in text


@pytest.mark.filterwarnings("error")  # numpy's, of means of nothing
def test_one_missing_value_among_others_is_a_line_without_a_point(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "init", ["last", "same"])
    table = pd.read_csv(folder / "heads.csv")
    table.loc[(table["task"] == "xsum") & (table["init"] == "last"), "chain_length"] = math.nan
    write_csv(table, folder / "heads.csv")
    text = svg("study", folder)
    assert "not measured" not in text and "nan" not in text


def test_logarithmic_axis_for_tokens_and_rows_alone(tmp_path: Path) -> None:
    for key, scale in (("train_tokens", "log"), ("vocab_rows", "log"), ("exit_layer", "linear")):
        folder = write_study(tmp_path / key, key, [1000, 2000, 4000])
        with style.style():
            assert FIGURES["study"](folder).axes[0].get_xscale() == scale


def test_a_budget_beyond_the_corpus_is_no_further_seed(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "train_tokens", [1000, 2000], seeds=2)
    table = pd.read_csv(folder / "heads.csv")
    table["train_tokens"] = 1000
    write_csv(table, folder / "heads.csv")
    assert len(read_study(folder)) == 2 * 2  # tasks x seeds


def test_a_table_of_no_study_is_refused(tables_dir: Path) -> None:
    with pytest.raises(EesdError, match="not the table of one study"):
        FIGURES["study"](tables_dir)


def test_calibration_has_a_row_for_each_bin_and_confidence(tmp_path: Path) -> None:
    records = calibration_records([write_card(tmp_path / "card.json")])
    assert [(r["confidence"], r["tokens"], r["ece"]) for r in records] == [
        ("raw", 300, 0.125),
        ("raw", 100, 0.125),
        ("calibrated", 300, 0.0125),
        ("calibrated", 100, 0.0125),
    ]
    assert set(records[0]) == set(COLUMNS["calibration"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {}}, "calibration has no bins_raw"),
        ({"calibration": None}, "calibration has no bins_raw"),
        (
            {"calibration": {"bins_raw": [{}], "ece_raw": 0, "bins": [], "ece": 0}},
            "needs predicted, observed and tokens",
        ),
        (
            {
                "calibration": {
                    "bins_raw": [{"predicted": 2, "observed": 0, "tokens": 1}],
                    "ece_raw": 0,
                    "bins": [],
                    "ece": 0,
                }
            },
            "shares are between 0 and 1",
        ),
    ],
)
def test_a_damaged_calibration_is_one_message(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(EesdError, match=message):
        calibration_records([write_card(tmp_path / "card.json", **changes)])


def test_reliability_and_positions_name_heads_and_numbers(tables_dir: Path) -> None:
    text = svg("reliability", tables_dir)
    for words in ("exit4", "ECE 0.125 raw, 0.013 calibrated", "400 tokens", "300"):
        assert words in text
    text = svg("heads_by_position", tables_dir)
    for words in ("ASDiv (1,234 tokens)", "exit4: 0.70", "mean chain", "draft position"):
        assert words in text
