"""Exact groups and float64: a promise of equal bits, refused where it cannot be kept; float64 runs like any dtype."""

from __future__ import annotations

import json

import pytest
import torch

from eesd.analysis.tables import write_tables
from eesd.bench.compare import Judge
from eesd.bench.runner import check_exact, run_bench
from eesd.errors import EesdError
from eesd.models.engine import attach_engine, make_engine
from eesd.models.loading import load_target
from tests.toys import needs_compiler, write_tiny_data, write_tiny_model

LOOKUP = {"drafter": "lookup", "max_ngram": 2, "controller": {"name": "static", "k": 6}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def settings(folder, **changes):
    group = {
        "model": "tiny",
        "task": "asdiv",
        "group": "main",
        "methods": {
            "vanilla": {},
            "lookup": LOOKUP,
            "early": {"drafter": "early_exit", "exit_layer": 2, "controller": {"name": "static", "k": 4}},
        },
        "prompts": 3,
        "repeats": 1,
        "max_new_tokens": 24,
        "max_prompt_tokens": 400,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "warmup": 0,
        "threads": 1,
        "data_dir": str(write_tiny_data(folder)),
        "resources": "resources",
    }
    return {**group, **changes}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_rows_are_identical_and_say_so(model, tmp_path, dtype):
    out = tmp_path / "rows.jsonl"
    run_bench(model, settings(tmp_path / "data", dtype=dtype, exact=True), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["comparison"]["class"] for row in rows} == {"baseline", "identical"}
    assert all(row["exact"] and row["settings"]["exact"] for row in rows)
    assert write_tables([out], [], tmp_path)["lossless"]["exact"].all()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
def test_logits_of_a_verification_are_vanillas_bit_by_bit(model, rows):
    target = load_target(model, "bfloat16", "cpu")
    attach_engine(target, "cpp")
    prompt, tokens = list(range(1, 30)), torch.arange(40, 56)[:rows]
    together, alone = (target.new_cache(64) for _ in range(2))
    with torch.inference_mode():
        for cache in (together, alone):
            target.run(target.embed(torch.tensor([prompt])), slice(None), cache)
        verified = target.logits(target.run(target.embed(tokens[None]), slice(None), together, len(prompt))[0])
        for i, token in enumerate(tokens):
            state = target.run(target.embed(token.view(1, 1)), slice(None), alone, len(prompt) + i)
            assert torch.equal(target.logits(state[0])[0], verified[i])


def test_plain_torch_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(EesdError, match=r"'torch \(chosen\)' does not promise"):
        check_exact(make_engine("torch"))
    monkeypatch.setenv("EESD_ENGINE", "torch")
    with pytest.raises(EesdError, match="set exact: false"):
        run_bench(model, settings(tmp_path / "data", dtype="bfloat16", exact=True), tmp_path / "rows.jsonl")


def test_exact_knows_no_ties(model):
    target = load_target(model, "float32")
    judge = Judge(target, model, exact=True)
    judge._evidence = lambda *_: ((1.0, 1.0), 0.5)
    assert judge.compare([1], [2, 3], [2, 4]).kind == "different"


def test_float64_is_a_dtype_of_a_group(model, tmp_path):
    out = tmp_path / "rows.jsonl"
    run_bench(model, settings(tmp_path / "data", dtype="float64"), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["comparison"]["class"] for row in rows} == {"baseline", "identical"}
    assert {(row["dtype"], row["engine"]) for row in rows} == {("float64", "torch (chosen)")}
    with pytest.raises(EesdError, match="does not promise"):
        run_bench(model, settings(tmp_path / "data", dtype="float64", exact=True), tmp_path / "other.jsonl")
