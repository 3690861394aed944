"""Controllers that never forget: neither the warm-up nor a second look at a decode adds to what they know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd.bench.records import RowFile
from eesd.bench.runner import Bench, run_bench
from eesd.bench.view import record_views
from tests.toys import write_tiny_data, write_tiny_model

RULE = {"name": "hf_heuristic", "k": 5, "k_max": 12, "reset_on": "never"}
COPIES = {"min_ngram": 1, "max_ngram": 2, "controller": RULE}
METHODS = {
    "vanilla": {},
    "early": {"drafter": "early_exit", "exit_layer": 2, "controller": RULE},
    "early_lookup": {
        "drafter": "early_exit",
        "exit_layer": 2,
        "controller": {"name": "static", "k": 1},
        "lookup": COPIES,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return {
        "model": "tiny",
        "task": "asdiv",
        "group": "main",
        "methods": METHODS,
        "prompts": 2,
        "repeats": 1,
        "max_new_tokens": 30,
        "max_prompt_tokens": 400,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "dtype": "float32",
        "warmup": 2,
        "threads": 1,
        "data_dir": str(write_tiny_data(tmp_path_factory.mktemp("bench") / "data")),
        "resources": "resources",
    }


def test_nothing_is_learnt_from_the_warm_up(model, settings):
    bench = Bench(model, settings)
    rules = [bench.methods["early"].controller, bench.methods["early_lookup"].lookup.controller]
    bench.warm_up()
    assert [rule.length for rule in rules] == [5, 5]
    bench.run_unit(bench.prompts[0], 0)  # which does teach them
    assert 5 not in [rule.length for rule in rules]


def test_both_decodes_of_a_view_begin_with_the_same_memory(model, settings, tmp_path):
    record_views(model, settings, tmp_path / "views.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "views.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(METHODS)
    rounds = {(row["item"], row["method"]): row["rounds"] for row in rows}
    first, second = dict.fromkeys(row["item"] for row in rows)
    # What is remembered is one decode of the prompt before.
    assert len(rounds[first, "early"][0]["drafts"]) == 5 > len(rounds[second, "early"][0]["drafts"])
    assert any(one["looked_up"] for one in rounds[first, "early_lookup"])


def drafted(rows: Path) -> dict[tuple[str, str], list]:
    return {(row["item"], row["method"]): row["rounds"] for row in map(json.loads, rows.read_text().splitlines())}


def test_an_interrupted_run_goes_on_with_what_was_learnt(model, settings, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_bench(model, settings, whole)
    append = RowFile.append

    def interrupted(self, rows):
        if self.done:
            raise KeyboardInterrupt  # the memory is ahead of the rows
        append(self, rows)

    monkeypatch.setattr(RowFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(model, settings, cut)
    monkeypatch.undo()
    run_bench(model, settings, cut)
    assert drafted(cut) == drafted(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "cut.jsonl"}


def test_rows_without_their_memory_are_put_aside(model, settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "main.jsonl"
    monkeypatch.setattr(RowFile, "finish", lambda self: None)
    run_bench(model, settings, out)
    monkeypatch.undo()
    run_bench(model, settings, out)
    assert "reset_on: never" in capsys.readouterr().out
    assert (tmp_path / "main.jsonl.part.old").exists()
