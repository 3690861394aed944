"""The cost table: complete, in the documented columns, and honest about bytes."""

from __future__ import annotations

import json
import random

import pytest
import torch

from eesd.analysis.engine import write_engine_table
from eesd.bench import hardware
from eesd.bench.hardware import QUERIES, Piece, Pieces, measure_hardware, stored_bytes, time_pieces
from eesd.errors import EesdError
from eesd.models import shapes
from eesd.models.passes import FusedPasses
from eesd.models.shapes import SHAPES, random_target
from tests.toys import needs_compiler, tiny_config, write_tiny_model


@pytest.fixture(autouse=True)
def small_stream(monkeypatch):
    monkeypatch.setattr(hardware, "STREAM_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(hardware.matmul_rate, "__defaults__", (32,))


def test_every_piece_is_in_the_table(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    out, table = tmp_path / "here.json", tmp_path / "engine.csv"
    measure_hardware(model, None, out, exit_layer=2, contexts=(16, 5000), rounds=2)
    frame = write_engine_table([out], table)
    assert set(frame["context_tokens"].dropna()) == {16}  # 5,000 exceeds the model's context
    assert list(frame.loc[frame["path"] == "verify", "query_tokens"]) == list(QUERIES)
    assert {"vanilla", "draft", "first_layers", "exit_layer", "draft_head", "hf_forward", "controller"} <= set(
        frame["path"]
    )
    assert (frame["seconds"] > 0).all()
    costs = json.loads(out.read_text())
    assert 0 <= costs["crowding"] <= 1
    assert len(costs["costs"]) == len(frame) - 1
    assert costs["read_bandwidth_bytes_per_s"] > 0
    assert 0 < costs["controller_step_s"] < 1e-3
    assert (costs["layers"], costs["distinct_layers"]) == (4, 4)
    assert (costs["queued_draft_steps"], costs["peak_memory_bytes"]) == (1, None)


@needs_compiler
def test_pieces_are_timed_as_the_decode_loop_takes_them(tmp_path, monkeypatch):
    """A pass in one call each, where the engine has it: separate calls cost more."""
    monkeypatch.setenv("EESD_ENGINE", "cpp")
    passes, run = [], FusedPasses.run
    monkeypatch.setattr(FusedPasses, "run", lambda *given: passes.append(run(*given)) or passes[-1])
    out = tmp_path / "here.json"
    measure_hardware(write_tiny_model(tmp_path / "tiny"), None, out, exit_layer=2, contexts=(16,), rounds=2)
    # Vanilla and both kinds of verification in each of two rounds and once before; and whole rounds of the loop.
    assert len(passes) > 3 * (1 + 2 * len(QUERIES))
    assert None not in passes


def test_bytes_add_up():
    target = random_target(tiny_config(), torch.float32, "cpu")
    pieces = {(p.path, p.query_tokens): p.bytes for p in Pieces(target, 2).at(16)}
    assert pieces["verify", 1] == pieces["vanilla", 1]
    assert pieces["verify_from_exit", 4] == pieces["vanilla", 1] - pieces["first_layers", 1]
    assert pieces["draft", 1] == sum(pieces[name, 1] for name in ("first_layers", "exit_layer", "draft_head"))


@pytest.mark.parametrize("contexts", [(16, 200), (200,), (1,)])
def test_the_decode_whose_memory_is_measured(contexts):
    target = random_target(tiny_config(), torch.float32, "cpu")
    generation = hardware._decode(target, Pieces(target, 2).head, 2, contexts)
    assert generation.rounds and generation.finish == "length"
    assert hardware.peak_memory(target, Pieces(target, 2).head, 2, contexts) is None


def test_stored_bytes_follow_what_the_engine_keeps():
    assert stored_bytes(torch.ones(4, 8)) == 4 * 8 * 2
    assert stored_bytes(torch.full((4, 8), 1 / 3)) == 4 * 8 * 4
    assert stored_bytes(torch.ones(8)) == 8 * 4


def test_a_shape_beyond_the_limit_repeats_a_few_layers(monkeypatch):
    monkeypatch.setattr("eesd.models.shapes.DISTINCT_BYTES", 80_000)
    target = random_target(tiny_config(num_layers=6), torch.float32, "cpu")
    assert len(target.layers) == 6
    assert 1 < len(set(target.layers)) < 6
    cache = target.new_cache(8)
    hidden = target.run(target.embed(torch.tensor([[1, 2, 3]])), slice(None), cache)
    assert torch.isfinite(target.logits(hidden)).all()
    assert set(SHAPES) == {"smollm2-135m", "llama-2-7b", "llama-2-13b", "llama-2-70b"}


def test_a_head_drafts_one_token_or_more_or_all(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", tiny_config())
    for rows in (0, "-3", "many"):
        with pytest.raises(EesdError, match="draft-rows must be a number above 0, or full"):
            measure_hardware(None, "tiny", tmp_path / "a.json", 2, "float32", (16,), 1, "cpu", rows)
    target = random_target(tiny_config(), torch.float32, "cpu")
    assert hardware._draft_rows("full", target.config.vocab_size) == target.config.vocab_size
    assert Pieces(target, 2, 16).draft_rows == 16


def test_a_shape_may_be_measured_beyond_its_context_and_on_graphs(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", tiny_config(max_positions=32))
    monkeypatch.setattr("eesd.models.shapes.DISTINCT_BYTES", 80_000)
    monkeypatch.setenv("EESD_ENGINE", "graphs")
    measure_hardware(None, "tiny", tmp_path / "a.json", 2, "float32", (40,), rounds=1, device="cpu")
    costs = json.loads((tmp_path / "a.json").read_text())
    assert {cost["context_tokens"] for cost in costs["costs"]} == {40}
    assert (costs["engine"], costs["capture_s"] > 0) == ("graphs (re-executed)", True)
    assert 1 < costs["distinct_layers"] < costs["layers"] == 4


def test_a_gpu_decides_how_many_layers_are_distinct_and_what_is_queued(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert shapes._room(torch.device("cuda")) == 700
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    runs = []
    pieces = [Piece("draft", 1, lambda: runs.append("draft"), 1, queued=True), Piece("verify", 1, list, 1)]
    time_pieces(pieces, 2, torch.device("cuda"), random.Random(0), int)
    assert len(runs) == 1 + 2 * hardware.QUEUED
    assert len(waits) == 2 * 2 * 2  # before and after each of two pieces, in two rounds


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "Unknown device 'gpu'"), ("cuda:99", "Device cuda:99 is not here"), ("cuda:x", "is not here")],
)
def test_a_device_that_is_not_there(tmp_path, device, message):
    with pytest.raises(EesdError, match=message):
        measure_hardware(None, "llama-2-7b", tmp_path / "a.json", device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rounds": 0}, "rounds of a cost table must be"), ({"contexts": [128, -5]}, "a context of a cost table must be")],
)
def test_impossible_numbers_are_found_before_a_model_is_loaded(tmp_path, changes, message):
    with pytest.raises(EesdError, match=message):
        measure_hardware(tmp_path / "no model", None, tmp_path / "a.json", **changes)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [(None, None, "either --model"), (None, "llama-2-14b", "Did you mean 'llama-2-13b'")],
)
def test_bad_choices_say_what_to_do(tmp_path, model, shape, message):
    with pytest.raises(EesdError, match=message):
        measure_hardware(model, shape, tmp_path / "a.json")
