"""Answer files of Spec-Bench: its fields, its categories, and numbers that agree with the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eesd.analysis.spec_bench import accept_lengths, write_answers
from eesd.errors import EesdError
from tests.analysis.factory import make_row, realistic_rows, split_seconds, unit, write_rows

FIELDS = {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
CHOICE = {"index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"}


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_have_the_fields_that_its_scripts_read(tmp_path: Path):
    rows = []
    for item in ("translation/170", "qa/81"):
        for repeat in (0, 1):
            rows += [make_row(m, item, task="spec_bench", repeat=repeat) for m in ("vanilla", "eesd")]
    written = write_answers([write_rows(tmp_path / "main.jsonl", rows)], tmp_path / "out")
    assert [path.name for path in written] == ["toy-main-eesd.jsonl", "toy-main-vanilla.jsonl"]
    found = answers(written[0])
    assert [(line["question_id"], line["category"], line["model_id"]) for line in found] == [
        (81, "qa", "toy-main-eesd"),
        (170, "translation", "toy-main-eesd"),
    ]
    assert all(set(line) == FIELDS and all(set(choice) == CHOICE for choice in line["choices"]) for line in found)
    choice = found[0]["choices"][1]
    assert (choice["index"], choice["turns"], choice["new_tokens"]) == (1, ["five tokens of text"], [5])
    assert (choice["wall_time"], choice["decoding_steps"], choice["accept_lengths"]) == ([1.0], [3], [1, 2, 2])


def test_two_methods_of_one_file_name_are_refused(tmp_path: Path):
    rows = [*unit(methods=("vanilla", "b-c"), group="a"), *unit(methods=("vanilla", "c"), group="a-b")]
    with pytest.raises(EesdError, match="toy / a / b-c and toy / a-b / c"):
        write_answers([write_rows(tmp_path / "rows.jsonl", rows)], tmp_path)


def test_passes_add_up_to_the_output(tmp_path: Path):
    rows = realistic_rows(n_items=3)
    assert all(sum(accept_lengths(row)) == len(row["output_tokens"]) for row in rows)
    assert all(min(accept_lengths(row)) > 0 for row in rows)
    assert accept_lengths(make_row("hf_generate")) == accept_lengths(make_row("vanilla")) == [1] * 5
    # A peer's pass over the prompt may verify a draft.
    lookup = make_row("hf_lookup", rounds=[[2, 1, "peer"]], seconds=split_seconds(1.0, peer=True))
    assert accept_lengths(lookup) == [3, 2]
    assert len(write_answers([write_rows(tmp_path / "rows.jsonl", rows)], tmp_path)) == 5
