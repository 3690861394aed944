"""Recording traces from row files: what is kept, restarts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from eesd.bench import trace as recording
from eesd.bench.methods import build_method
from eesd.bench.trace import record_trace
from eesd.control import Calibration, make_controller
from eesd.decoding.generate import GREEDY, generate
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target
from eesd.models.special import fingerprint
from eesd.replay import trace as trace_files
from eesd.replay.loop import replay
from eesd.replay.trace import read_trace
from tests.toys import tiny_head, write_tiny_model

PROMPTS = ([5, 6, 7], [9, 8], [40, 41, 42, 43])
LIMIT = 12
CALIBRATION = {"x": [0.0, 1.0], "y": [0.1, 0.9]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, an untrained head and vanilla's rows."""
    folder = tmp_path_factory.mktemp("trace")
    model = write_tiny_model(folder / "tiny")
    target = load_target(model, "float32")
    head = folder / "head"
    head.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in tiny_head(target).state_dict().items()}
    save_file(tensors, head / "head.safetensors")
    card = {"kind": "exit_layer", "fingerprint": fingerprint(model), "exit_layer": 2, "settings": {}}
    card["calibration"] = CALIBRATION
    (head / "card.json").write_text(json.dumps(card))
    attach_engine(target)
    rows = []
    for seed, prompt in enumerate(PROMPTS):
        made = generate(target, prompt, max_new_tokens=LIMIT, eos={0})
        row = {"method": "vanilla", "repeat": 0, "item": f"i{seed}", "seed": seed, "decoding": "greedy"}
        row |= {"dtype": "float32", "finish": made.finish, "settings": {"max_new_tokens": LIMIT}}
        rows.append({**row, "prompt_tokens": prompt, "output_tokens": made.tokens})
    write(folder / "rows.jsonl", rows + [{**row, "repeat": 1} for row in rows])
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, **changes) -> dict:
    made = {"model": "tiny", "task": "asdiv", "drafter": "exit_head", "head": "mine", "k_max": 5}
    return {**made, "head_path": str(folder / "head"), **changes}


def test_a_trace_replays_what_a_configured_method_does(folder: Path, tmp_path: Path):
    out = tmp_path / "trace.safetensors"
    record_trace(folder / "tiny", folder / "rows.jsonl", settings(folder), out)
    trace = read_trace(out)
    assert [item.id for item in trace.items] == ["i0", "i1", "i2"]
    facts = trace.facts
    assert (facts.drafter, facts.exit_layer, facts.k_max, facts.calibration) == ("mine", 2, 5, CALIBRATION)
    target = load_target(folder / "tiny", "float32")
    attach_engine(target)
    for controller in ({"name": "cali_ts", "k_max": 5}, {"name": "beta_ts", "k_max": 4}, {"name": "static", "k": 2}):
        method = build_method("x", settings(folder, controller=controller), target, folder / "tiny", GREEDY, {0})
        live = [method(p, seed=i, max_new_tokens=LIMIT).rounds for i, p in enumerate(PROMPTS)]
        replayed = make_controller(controller)
        replayed.equip(Calibration(**CALIBRATION))
        found = replay(replayed, trace)
        assert [[(r.drafted, r.accepted, r.stop) for r in rounds] for rounds in live] == found


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, monkeypatch) -> tuple[Path, list]:
    """The trace of a recording that was interrupted at its third item, and a list of what is recorded from then on."""
    out, made, later = tmp_path / "trace.safetensors", [], []
    original = recording.traced_item

    def two(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments)
        return original(*arguments)

    def counted(*arguments):
        later.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(recording, "traced_item", two)
    with pytest.raises(KeyboardInterrupt):
        record_trace(folder / "tiny", folder / "rows.jsonl", settings(folder), out)
    assert not out.exists()
    monkeypatch.setattr(recording, "traced_item", counted)
    return out, later


def test_an_interrupted_recording_goes_on(folder: Path, interrupted):
    out, later = interrupted
    record_trace(folder / "tiny", folder / "rows.jsonl", settings(folder), out)
    assert len(later) == 1
    assert len(read_trace(out).items) == 3
    assert [path.name for path in out.parent.iterdir()] == ["trace.safetensors"]


def test_parts_of_another_limit_are_recorded_again(folder: Path, interrupted, tmp_path: Path):
    out, later = interrupted
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    longer = [{**row, "settings": {"max_new_tokens": LIMIT + 1}} for row in rows]
    record_trace(folder / "tiny", write(tmp_path / "rows.jsonl", longer), settings(folder), out)
    assert len(later) == 3
    assert [item.max_new_tokens for item in read_trace(out).items] == [LIMIT + 1] * 3


def test_parts_of_another_version_are_recorded_again(folder: Path, interrupted, monkeypatch):
    out, later = interrupted
    monkeypatch.setattr(trace_files, "SCHEMA", "newer")
    record_trace(folder / "tiny", folder / "rows.jsonl", settings(folder), out)
    assert len(later) == 3


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"method": "eesd"}, {}, "no row of vanilla"),
        ({"decoding": "sampled"}, {}, "sampled outputs cannot be replayed"),
        ({}, {"k_max": 0}, "k_max of a trace must be a whole number"),
        ({}, {"drafter": "exit_haed"}, "Did you mean 'exit_head'"),
        ({}, {"head_path": "nowhere"}, "no trained head here"),
    ],
)
def test_bad_input_says_what_to_do(folder: Path, tmp_path: Path, row, changes, message):
    first = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    rows = write(tmp_path / "rows.jsonl", [{**first, **row}])
    with pytest.raises(EesdError, match=message):
        record_trace(folder / "tiny", rows, settings(folder, **changes), tmp_path / "out.safetensors")


def test_trees_are_refused(tmp_path):
    with pytest.raises(EesdError, match="A trace records chains"):
        record_trace(tmp_path, tmp_path / "rows.jsonl", {"k_max": 4, "tree": {"nodes": 4}}, tmp_path / "out")
