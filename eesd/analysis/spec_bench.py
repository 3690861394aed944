"""Rows as answer files of Spec-Bench (github.com/hemingkx/Spec-Bench), for its own scripts and for comparing with them.

    eesd spec-bench results/bench/smollm2-135m/spec_bench/main.jsonl --out results/spec_bench

One file for each model, group and method, `<model>-<group>-<method>.jsonl`; repeats are its `choices`. As there,
`accept_lengths` are the tokens that every pass of the target settles, its own included, the pass of the prompt first.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from eesd.analysis.rows import Row, read_rows, settled
from eesd.errors import EesdError
from eesd.files import write_atomic


def write_answers(rows: Iterable[Path], out: Path) -> list[Path]:
    """Write the answer files of all rows into folder `out`, sorted by question."""
    answers: dict[str, dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[str, tuple[str, ...]] = {}
    for row in read_rows(rows):
        owner = tuple(row[part] for part in ("model", "group", "method"))
        model_id = "-".join(owner)
        if owners.setdefault(model_id, owner) != owner:
            raise EesdError(
                f"{row['where']}: file {model_id}.jsonl would hold two methods, {' / '.join(owners[model_id])} and "
                f"{' / '.join(owner)}. Write them into different folders."
            )
        answers[model_id][row["task"], row["item"]].append(row)
    written = []
    for model_id, questions in sorted(answers.items()):
        lines = [_answer(model_id, *key, questions[key]) for key in sorted(questions, key=_order)]
        written.append(out / f"{model_id}.jsonl")
        write_atomic(written[-1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return written


def _order(key: tuple[str, str]) -> tuple[str, bool, int, str]:
    task, item = key
    number = _question(task, item)[1]
    return task, isinstance(number, str), 0 if isinstance(number, str) else number, item


def _question(task: str, item: str) -> tuple[str, int | str]:
    """Category and id: those of Spec-Bench for its own questions; elsewhere the task and our item."""
    if task != "spec_bench":
        return task, item
    category, _, number = item.rpartition("/")
    return category, int(number) if number.isdecimal() else number


def _answer(model_id: str, task: str, item: str, rows: list[Row]) -> dict[str, Any]:
    category, number = _question(task, item)
    return {
        "question_id": number,
        "category": category,
        "answer_id": hashlib.sha256(f"{model_id}/{task}/{item}".encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [_choice(row) for row in sorted(rows, key=lambda row: row["repeat"])],
        "tstamp": max(datetime.fromisoformat(row["time"]).timestamp() for row in rows),
    }


def _choice(row: Row) -> dict[str, Any]:
    lengths = accept_lengths(row)
    return {
        "index": row["repeat"],
        "turns": [row["text"]],
        "decoding_steps": [len(lengths)],
        "new_tokens": [len(row["output_tokens"])],
        "wall_time": [row["seconds"]["total"]],
        "accept_lengths": lengths,
    }


def accept_lengths(row: Row) -> list[int]:
    """Output tokens of every pass; they add up to the output."""
    total = len(row["output_tokens"])
    # Hugging Face's plain `generate` has no rounds: a pass for every token.
    if not row["rounds"]:
        return [1] * total
    lengths = [total - settled(row)]
    for one in row["rounds"]:
        # The last round may reach past the end of the output.
        lengths.append(min(one[1] + 1, total - sum(lengths)))
    return lengths
