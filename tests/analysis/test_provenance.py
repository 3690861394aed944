"""Provenance: what was measured, where and when, in a table and in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd.analysis.columns import COLUMNS
from eesd.analysis.provenance import machine_line, read_provenance, write_provenance
from eesd.errors import EesdError
from tests.analysis.factory import split_seconds, unit, write_rows


def two_groups(tmp_path: Path) -> list[Path]:
    """Row files of a greedy float32 group and a bfloat16 group measured a day later."""
    main = unit(seconds=split_seconds(60.0)) + unit("asdiv-2", seconds=split_seconds(60.0), commit=None)
    half = unit(group="bfloat16", dtype="bfloat16", time="2026-02-01T01:00:00+00:00", settings={"k": 2})
    return [write_rows(tmp_path / "main.jsonl", main), write_rows(tmp_path / "bfloat16.jsonl", half)]


def test_table(tmp_path: Path) -> None:
    table = write_provenance(two_groups(tmp_path), tmp_path / "provenance.csv")
    assert list(table.columns) == list(COLUMNS["provenance"])
    assert table["group"].tolist() == ["main", "bfloat16"]
    main = table.iloc[0]
    assert main[["n_items", "n_units", "n_rows", "output_tokens", "decoding_s"]].tolist() == [2, 2, 4, 20, 240.0]
    assert main["methods"] == "vanilla; eesd"
    assert main["commit"] == "abc1234; not in git"
    assert main["torch"] == "2.13.0"
    assert json.loads(table.iloc[1]["settings"]) == {"eesd": {"k": 2}, "vanilla": {"k": 2}}


def test_sentence(tmp_path: Path) -> None:
    table = write_provenance(two_groups(tmp_path), tmp_path / "provenance.csv")
    expected = (
        "Toy CPU (cpu, 2 threads), bfloat16 and float32, engine torch, torch 2.13.0, transformers 5.23.0, "
        "commit abc1234; not in git; 4 minutes of timed decoding on 2026-01-31 to 2026-02-01"
    )
    assert machine_line(table) == expected
    assert machine_line(read_provenance(tmp_path / "provenance.csv")) == expected


def test_bad_tables(tmp_path: Path) -> None:
    with pytest.raises(EesdError, match="no such file"):
        read_provenance(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EesdError, match="not a provenance table"):
        read_provenance(tmp_path / "other.csv")
