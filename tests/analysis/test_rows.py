"""Every way a row file can be wrong is one EesdError with file and line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from eesd.analysis.rows import FIELDS, read_rows
from eesd.errors import EesdError
from tests.analysis.factory import comparison, make_row, realistic_rows, split_seconds, unit, write_rows


def fails(tmp_path: Path, rows: list[dict[str, Any]], *words: str) -> None:
    """Reading these rows raises one EesdError that contains all the words."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(EesdError) as caught:
        read_rows([path])
    for word in words:
        assert word in str(caught.value)


def test_good_rows_carry_their_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unit())
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line does not shift the numbers
    assert [row["where"] for row in read_rows([path])] == [f"{path}:1", f"{path}:3"]


def test_realistic_rows_are_valid(tmp_path: Path) -> None:
    assert len(read_rows([write_rows(tmp_path / "rows.jsonl", realistic_rows(n_items=3))])) == 45


def test_no_files() -> None:
    with pytest.raises(EesdError, match="No row files"):
        read_rows([])


@pytest.mark.parametrize(
    ("text", "word"), [("", "empty"), ('{"schema": 1', ":1: not valid JSON"), ("[1]", ":1: expected")]
)
def test_broken_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(EesdError, match=word):
        read_rows([path])


def test_other_schema(tmp_path: Path) -> None:
    fails(tmp_path, [make_row(schema=2)], "rows.jsonl:1", "schema 2, expected 1")


@pytest.mark.parametrize("field", FIELDS)
def test_missing_field(tmp_path: Path, field: str) -> None:
    row = make_row()
    del row[field]
    fails(tmp_path, [make_row(item="first"), row], "rows.jsonl:2", f"no field '{field}'")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("repeat", -1),
        ("repeat", True),
        ("threads", 2.5),
        ("lossy", 0),
        ("rounds", None),
        ("temperature", math.nan),
    ],
)
def test_wrong_type(tmp_path: Path, field: str, value: Any) -> None:
    fails(tmp_path, [make_row(**{field: value})], "rows.jsonl:1", f"field '{field}'")


@pytest.mark.parametrize("crowding", [-0.1, 1.5, math.nan, "much", None])
def test_impossible_crowding(tmp_path: Path, crowding: Any) -> None:
    fails(tmp_path, [make_row(crowding=crowding)], "rows.jsonl:1", "'crowding'")


@pytest.mark.parametrize("total", [0.0, -1.0, math.nan, math.inf, None])
def test_impossible_total(tmp_path: Path, total: float | None) -> None:
    fails(tmp_path, [make_row(seconds={**split_seconds(1.0), "total": total})], "rows.jsonl:1", "seconds.total")


@pytest.mark.parametrize("value", [-0.1, math.nan, None])
def test_impossible_part(tmp_path: Path, value: float | None) -> None:
    fails(tmp_path, [make_row(seconds={**split_seconds(1.0), "draft": value})], "rows.jsonl:1", "seconds.draft")


def test_parts_must_add_up(tmp_path: Path) -> None:
    fails(tmp_path, [make_row(seconds={**split_seconds(1.0), "verify": 5.0})], "add up to")


def test_seconds_need_every_part(tmp_path: Path) -> None:
    fails(tmp_path, [make_row(seconds={"total": 1.0})], "lacks prefill, draft, verify, control, other")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"output_tokens": []}, "output_tokens"),
        ({"prompt_tokens": [1, -2]}, "prompt_tokens"),
        ({"decoding": "gredy"}, "Did you mean 'greedy'"),
        ({"rounds": [[1, 2, "none"]]}, "accepted more"),
        ({"rounds": [[1, 1]]}, "expected [drafted, accepted"),
        ({"rounds": [[1, 1, "none", "copied"]]}, "where lookup drafted it"),
        ({"rounds": [[0, 0, "none"]] * 9}, "5 output tokens, but its rounds account for 10"),
        ({"rounds": [[0, 0, "none"]]}, "5 output tokens, but its rounds account for 2"),
        ({"comparison": {"class": "identicl"}}, "unknown comparison class", ),
        ({"comparison": {"class": "identical"}}, "vanilla alone is the baseline"),
        ({"scores": {"exact_match": math.nan}}, "score 'exact_match'"),
        ({"time": "yesterday"}, "expected a date"),
    ],
)  # fmt: skip
def test_wrong_content(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(**changes)])
    with pytest.raises(EesdError) as caught:
        read_rows([path])
    assert word.lower() in str(caught.value).lower()
    assert "rows.jsonl:1" in str(caught.value)


def test_last_round_may_be_cut(tmp_path: Path) -> None:
    cut = make_row(
        "eesd", rounds=[[2, 1, "controller"], [4, 4, "k_max"]]
    )  # 1 + 2 + 5 tokens, cut to 5 by the end of text
    assert len(read_rows([write_rows(tmp_path / "rows.jsonl", [make_row(), cut])])) == 2


def test_duplicate(tmp_path: Path) -> None:
    fails(tmp_path, [*unit(), make_row("eesd")], "rows.jsonl:3", "second row", "rows.jsonl:2")


def test_same_file_twice(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unit())
    with pytest.raises(EesdError, match="second row"):
        read_rows([path, path])


def test_no_vanilla(tmp_path: Path) -> None:
    fails(tmp_path, [*unit(), make_row("eesd", "asdiv-2")], "rows.jsonl:3", "'asdiv-2'", "no vanilla row")


def test_unit_lacks_a_method(tmp_path: Path) -> None:
    fails(tmp_path, [*unit(), make_row(item="asdiv-2")], "rows.jsonl:3", "'asdiv-2'", "lacks eesd")


@pytest.mark.parametrize(
    ("field", "value"),
    [("settings_hash", "other"), ("engine", "cpp"), ("dtype", "bfloat16"), ("device_name", "Other"), ("threads", 8)],
)
def test_mixed_settings(tmp_path: Path, field: str, value: Any) -> None:
    mixed = [make_row("vanilla", "asdiv-2"), make_row("eesd", "asdiv-2", **{field: value})]
    fails(tmp_path, [*unit(), *mixed], "rows.jsonl:4", field, "rows.jsonl:")


@pytest.mark.parametrize(("field", "value"), [("dtype", "bfloat16"), ("threads", 16), ("device_name", "Other CPU")])
def test_tasks_of_a_group_are_measured_alike(tmp_path: Path, field: str, value: Any) -> None:
    other = unit("xsum-1", task="xsum", **{field: value})
    fails(tmp_path, unit() + other, "rows.jsonl:3", field, repr(value))


def test_other_prompt_than_vanilla(tmp_path: Path) -> None:
    fails(tmp_path, [make_row(), make_row("eesd", prompt_tokens=[1])], "rows.jsonl:2", "another prompt")


def test_missing_score(tmp_path: Path) -> None:
    fails(tmp_path, [make_row(), make_row("eesd", scores={})], "rows.jsonl:2", "no score 'exact_match'")


def test_claims_are_checked_against_tokens(tmp_path: Path) -> None:
    other = {"output_tokens": [5, 6, 0, 8, 9]}
    fails(tmp_path, [make_row(), make_row("eesd", **other)], "rows.jsonl:2", "classed identical", "at output token 2")
    wrong = comparison("different", 1)
    fails(tmp_path, [make_row(), make_row("eesd", comparison=wrong, **other)], "at output token 1", "at output token 2")
    fails(tmp_path, [make_row(), make_row("eesd", comparison=wrong)], "nowhere")


@pytest.mark.parametrize("evidence", [{}, {"gap": 0.1}, {"gap": 0.2, "bound": 0.1}, {"gap": math.nan, "bound": 1.0}])
def test_tie_needs_evidence(tmp_path: Path, evidence: dict[str, float]) -> None:
    tie = make_row("eesd", output_tokens=[5, 6, 0, 8, 9], comparison=comparison("tie", 2, **evidence))
    fails(tmp_path, [make_row(), tie], "rows.jsonl:2", "a tie needs gap <= bound")
