"""The benchmark on a tiny model: units, rows, restarts, comparison with vanilla, failures that lose nothing."""

from __future__ import annotations

import errno
import json
import shutil

import pytest

from eesd.analysis.rows import read_rows
from eesd.analysis.tables import write_tables
from eesd.bench import records
from eesd.bench.compare import Judge, length_rule
from eesd.bench.records import RowFile
from eesd.bench.runner import Bench, run_bench
from eesd.distill.corpus import generate_corpus
from eesd.distill.train import train_heads
from eesd.errors import EesdError
from eesd.models.loading import load_target
from eesd.models.special import fingerprint
from tests.distill.test_train import HEAD
from tests.toys import corpus_settings, write_tiny_data, write_tiny_model

PROMPTS = {"a": [1], "b": [1]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    """A group with a real trained head, as the workflow would resolve it."""
    folder = tmp_path_factory.mktemp("bench")
    data_dir = str(write_tiny_data(folder / "data"))
    few = {"train_answers": 8, "calibration_answers": 2, "evaluation_answers": 2, "max_new_tokens": 8}
    corpus = corpus_settings(data_dir, **few)
    generate_corpus(model, corpus, folder / "corpus")
    train_heads(model, folder / "corpus", {folder / "head": {**HEAD, "epochs": 1}})
    drafting = {"drafter": "exit_head", "head": "exit2", "head_path": str(folder / "head")}
    return {
        "model": "tiny",
        "task": "asdiv",
        "group": "main",
        "methods": {
            "vanilla": {},
            "hf_generate": {"peer": "hf_generate"},
            "static_k2": {**drafting, "controller": {"name": "static", "k": 2}},
            "eesd": {**drafting, "controller": {"name": "beta_ts"}},
        },
        "prompts": 3,
        "repeats": 2,
        "max_new_tokens": 12,
        "max_prompt_tokens": 400,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "dtype": "float32",
        "warmup": 1,
        "threads": 1,
        "data_dir": data_dir,
        "resources": "resources",
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "main.jsonl"
    run_bench(model, settings, out)
    return out


def test_every_unit_has_every_method_and_every_output_is_vanillas(finished, settings):
    rows = lines(finished)
    assert len(rows) == 3 * 2 * 4
    units = {(row["item"], row["repeat"]) for row in rows}
    assert len(units) == 6
    assert {row["comparison"]["class"] for row in rows} == {"baseline", "identical"}
    orders = {tuple(r["method"] for r in rows if (r["item"], r["repeat"]) == unit) for unit in units}
    assert len(orders) > 1  # not always the same method first


def test_rows_say_what_other_processes_took(model, settings, finished, tmp_path, monkeypatch, capsys):
    assert all(0 <= row["crowding"] <= 1 for row in lines(finished))
    monkeypatch.setattr("eesd.bench.load.Crowding.share", lambda self: 0.5)
    run_bench(model, {**settings, "repeats": 1, "prompts": 1}, tmp_path / "rows.jsonl")
    assert {row["crowding"] for row in lines(tmp_path / "rows.jsonl")} == {0.5}
    assert "other processes took 50% of the processors" in capsys.readouterr().out


def test_float64_with_a_trained_head(model, settings, tmp_path):
    run_bench(model, {**settings, "dtype": "float64", "repeats": 1, "prompts": 1}, tmp_path / "rows.jsonl")
    assert {row["comparison"]["class"] for row in lines(tmp_path / "rows.jsonl")} == {"baseline", "identical"}


def test_rows_satisfy_the_readers(finished, tmp_path):
    assert len(read_rows([finished])) == 24
    tables = write_tables([finished], [], tmp_path)
    assert tables["lossless"]["different"].sum() == 0


def test_a_restart_continues_after_the_finished_units(model, settings, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "main.jsonl"
    original, calls = Bench.run_unit, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Bench, "run_unit", failing)
    with pytest.raises(KeyboardInterrupt):
        run_bench(model, settings, out)
    part = tmp_path / "main.jsonl.part"
    assert len(lines(part)) == 8
    # A crash in the middle of a write leaves a torn line.
    with open(part, "a") as stream:
        stream.write('{"schema": 1, "item": "asd')
    run_bench(model, settings, out)
    assert len(calls) == 1 + 6
    assert not part.exists()

    def essence(path):
        return sorted((r["item"], r["repeat"], r["method"], tuple(r["output_tokens"]), r["seed"]) for r in lines(path))

    assert essence(out) == essence(finished)


def test_rows_of_other_settings_are_put_aside_not_mixed(model, settings, finished, tmp_path, capsys):
    out = tmp_path / "main.jsonl"
    part = tmp_path / "main.jsonl.part"
    part.write_text(finished.read_text())
    run_bench(model, {**settings, "max_new_tokens": 5, "repeats": 1}, out)
    assert {row["settings"]["max_new_tokens"] for row in lines(out)} == {5}
    assert len(lines(tmp_path / "main.jsonl.part.old")) == 24
    assert "other settings, code or data" in capsys.readouterr().out


def test_rows_of_another_configuration_or_reference_are_put_aside(model, settings, finished, tmp_path):
    """The same weights and prompts, read or scored in another way."""
    changed = tmp_path / "model"
    shutil.copytree(model, changed)
    found = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**found, "rms_norm_eps": 2 * found["rms_norm_eps"]}))
    data = tmp_path / "data"
    shutil.copytree(settings["data_dir"], data)
    (data / "asdiv.jsonl").write_text((data / "asdiv.jsonl").read_text().replace('"answer": "', '"answer": "1'))
    assert fingerprint(changed) == fingerprint(model)
    for folder, rows in ((changed, settings), (model, {**settings, "data_dir": str(data)})):
        out = tmp_path / folder.name / "main.jsonl"
        out.parent.mkdir(exist_ok=True)
        out.with_name("main.jsonl.part").write_text(finished.read_text())
        run_bench(folder, {**rows, "repeats": 1, "prompts": 1}, out)
        assert out.with_name("main.jsonl.part.old").exists()


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1)
    row = {"item": "a", "repeat": 0, "method": "vanilla", "settings_hash": "h", "prompt_tokens": [1]}
    file.append([row])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(EesdError, match=r"disk is full.*1 finished units are kept"):
        file.append([{**row, "item": "b"}])
    monkeypatch.undo()
    assert ("a", 0) in RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1).done


def test_text_with_exotic_line_ends_survives_a_restart(tmp_path):
    row = {"repeat": 0, "method": "vanilla", "settings_hash": "h", "prompt_tokens": [1], "text": "a\u2028b\u0085c"}
    file = RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1)
    for item in PROMPTS:
        file.append([{**row, "item": item}])
    assert len(RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1).done) == 2


def test_a_changed_prompt_under_the_same_id_is_not_the_same_item(tmp_path):
    row = {"item": "a", "repeat": 0, "method": "vanilla", "settings_hash": "h", "prompt_tokens": [1]}
    RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1).append([row])
    assert not RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, {"a": [2]}, 1).done
    assert (tmp_path / "main.jsonl.part.old").exists()


def test_items_no_longer_asked_for_are_left_out(tmp_path):
    row = {"repeat": 0, "method": "vanilla", "settings_hash": "h", "prompt_tokens": [1]}
    file = RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1)
    for item in PROMPTS:
        file.append([{**row, "item": item}])
    assert RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, {"b": [1]}, 1).done == {("b", 0)}


def test_repeats_no_longer_asked_for_are_left_out(tmp_path):
    row = {"item": "a", "method": "vanilla", "settings_hash": "h", "prompt_tokens": [1]}
    file = RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 3)
    for repeat in range(3):
        file.append([{**row, "repeat": repeat}])
    assert RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1).done == {("a", 0)}
    assert [row["repeat"] for row in lines(tmp_path / "main.jsonl.part")] == [0]


def test_nan_never_reaches_a_row_file(tmp_path):
    file = RowFile(tmp_path / "main.jsonl", {"vanilla": "h"}, PROMPTS, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.append([{"item": "a", "repeat": 0, "method": "vanilla", "seconds": float("nan")}])


def test_sampled_groups_are_not_compared_token_by_token(model, settings, tmp_path):
    out = tmp_path / "sampled.jsonl"
    methods = {name: settings["methods"][name] for name in ("vanilla", "eesd", "hf_generate")}
    run_bench(model, {**settings, "methods": methods, "temperature": 1.0, "repeats": 1}, out)
    rows = lines(out)
    assert {r["comparison"]["class"] for r in rows if r["method"] != "vanilla"} == {"not_compared"}
    assert {r["decoding"] for r in rows} == {"sampled"}


def test_trees_are_measured_beside_chains_and_typical_acceptance_is_marked(model, settings, tmp_path):
    chain = settings["methods"]["static_k2"]
    exact = {"nodes": 4, "width": 2, "acceptance": "exact", "epsilon": 0.09, "delta": 0.3}
    methods = {
        "vanilla": {},
        "tree": {**chain, "tree": exact},
        "typical": {**chain, "tree": {**exact, "acceptance": "typical"}},
    }
    for temperature, classes in ((0.0, {"identical"}), (1.0, {"not_compared"})):
        out = tmp_path / f"{temperature}.jsonl"
        run_bench(model, {**settings, "methods": methods, "temperature": temperature, "repeats": 1}, out)
        rows = lines(out)
        assert {r["comparison"]["class"] for r in rows if r["method"] != "vanilla"} == classes
        # At temperature 0 typical acceptance is greedy acceptance.
        lossy = {"typical"} if temperature else set()
        assert {r["method"] for r in rows if r["lossy"]} == lossy
        assert {drafted for r in rows if r["method"] == "tree" for drafted, _, _ in r["rounds"][:-2]} == {4}
        tables = write_tables([out], [], tmp_path)
        assert dict(zip(tables["lossless"]["method"], tables["lossless"]["lossy"], strict=True)) == {
            "tree": False,
            "typical": bool(lossy),
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "no method 'vanilla'"),
        ({"task": "asdvi"}, "Did you mean 'asdiv'"),
        ({"prompts": 1000}, "Lower `prompts`"),
        ({"max_prompt_tokens": 3}, "0 evaluation prompts of at most 3 tokens"),
        ({"max_new_tokens": 5000}, "exceeds the model's context"),
        ({"methods": {"vanilla": {}, "x": {"drafter": "exit_haed"}}}, "no controller"),
    ],
)
def test_bad_settings_say_what_to_do(model, settings, tmp_path, changes, message):
    with pytest.raises(EesdError, match=message):
        run_bench(model, {**settings, **changes}, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_a_divergence_needs_evidence_to_be_a_tie(model):
    target = load_target(model, "float32")
    judge = Judge(target, model)
    prompt, vanilla = [5, 6, 7], [8, 9, 10]
    wrong = judge.compare(prompt, vanilla, [8, 200, 10])
    assert wrong.kind == "different"
    assert wrong.position == 1
    assert wrong.gap > wrong.bound > 0
    assert wrong.gap == abs(wrong.vanilla_logit - wrong.logit)
    assert judge.compare(prompt, vanilla, vanilla[:2]).kind == "different"
    assert judge.compare(prompt, vanilla, vanilla).kind == "identical"


@pytest.mark.parametrize(
    ("vanilla", "output", "rule"),
    [
        ([1, 2, 0], [1, 2], "eos_dropped"),
        ([1, 2, 0], [1, 2, 0, 5], "eos_overrun"),
        ([1, 2, 3], [1, 2], "ended_early"),
        ([1, 2, 3], [1, 2, 3, 4], "limit_overrun"),
        ([1, 2, 3], [1, 4], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_lengths_are_held_against_the_rules_of_ending(vanilla, output, rule):
    assert length_rule(vanilla, output, {0}) == rule


def test_a_tie_is_recognised_by_its_gap(model, monkeypatch):
    judge = Judge(load_target(model, "float32"), model)
    monkeypatch.setattr(judge, "_evidence", lambda *_: ((1.5, 1.25), 0.5))
    assert judge.compare([1], [2, 3], [2, 4]).as_row() == {
        "class": "tie",
        "position": 1,
        "vanilla_token": 3,
        "token": 4,
        "gap": 0.25,
        "bound": 0.5,
        "vanilla_logit": 1.5,
        "logit": 1.25,
        "length_rule": None,
    }


def test_threads_are_those_of_the_settings(finished):
    assert {row["threads"] for row in lines(finished)} == {1}
