"""Corpus and training end to end on a tiny model: resuming, learning, cards, refusals."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from eesd.analysis.cards import head_records
from eesd.distill import corpus as corpus_module
from eesd.distill import train as train_module
from eesd.distill.batches import epoch_batches, make_batch
from eesd.distill.corpus import generate_corpus, plan_shards, read_corpus
from eesd.distill.evaluate import candidate_accuracies, evaluate
from eesd.distill.heads import make_student
from eesd.distill.record import Trace
from eesd.distill.train import learning_rate_factor, limit_tokens, loss_name, train_heads
from eesd.distill.vocabulary import choose_vocabulary
from eesd.drafting.exit_head import load_exit_head
from eesd.drafting.medusa import load_medusa_heads
from eesd.errors import EesdError
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.special import fingerprint
from eesd.tasks import TASKS, DataSource, encode_prompt
from tests.toys import write_tiny_model

MEDUSA = {"kind": "medusa", "medusa_heads": 3}
HEAD = {
    "kind": "exit_layer",
    "exit_layer": 2,
    "init": "last",
    "context": "none",
    "output_head": "free",
    "loss": {"soft": 1.0},
    "learn": "answers",
    "depth": 2,
    "train_tokens": None,
    "vocabulary": "frequent",
    "vocab_rows": 64,
    "epochs": 6,
    "batch": 4,
    "learning_rate": 3e-3,
    "seed": 0,
}


def test_corpus_holds_what_was_asked_for(corpus):
    index = json.loads((corpus / "corpus.json").read_text())
    assert sum(entry["rows"] for entry in index["shards"].values()) == 20
    train = read_corpus(corpus, [2], "train")["asdiv"]
    assert len(train) == 12
    assert index["generated_tokens"]["train"]["asdiv"] == sum(len(t.teacher_ids) for t in train)
    held_out = {tuple(t.tokens[: t.prompt_tokens].tolist()) for t in read_corpus(corpus, [2], "calibration")["asdiv"]}
    assert not held_out & {tuple(t.tokens[: t.prompt_tokens].tolist()) for t in train}


def test_interrupted_corpus_goes_on_without_repeating_shards(model, settings, corpus, tmp_path, monkeypatch):
    calls = []
    original = corpus_module.record_batch

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(corpus_module, "record_batch", failing)
    out = tmp_path / "default"
    with pytest.raises(KeyboardInterrupt):
        generate_corpus(model, settings, out)
    assert not out.exists()
    generate_corpus(model, settings, out)
    assert len(calls) == 1 + 5  # five shards, one of them attempted twice
    for shard in sorted(corpus.glob("*.safetensors")):
        again = load_file(out / shard.name)
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, again[name])


def test_a_smaller_budget_leaves_the_shards_beyond_it_out(model, settings, corpus, tmp_path, monkeypatch):
    out, names = tmp_path / "some", []
    original = corpus_module._summary

    def failing(*args):
        names.extend(shard.name for shard in args[1])
        if len(names) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(corpus_module, "_summary", failing)
    with pytest.raises(KeyboardInterrupt):
        generate_corpus(model, settings, out)
    generate_corpus(model, {**settings, "tokens": 1}, out)
    index = json.loads((out / "corpus.json").read_text())
    assert len(index["shards"]) == 3 and sum(entry["split"] == "train" for entry in index["shards"].values()) == 1
    assert {file.stem for file in out.glob("*.safetensors")} == set(index["shards"])


def test_a_task_with_few_prompts_answers_them_again(model, settings, tmp_path):
    asked = {**settings, "train_answers": 100, "temperatures": [0.0, 0.8, 0.8], "batch": 6, "max_new_tokens": 4}
    generate_corpus(model, asked, tmp_path / "all")
    traces = read_corpus(tmp_path / "all", [2], "train")["asdiv"]
    prompts = Counter(tuple(t.tokens[: t.prompt_tokens].tolist()) for t in traces)
    assert set(prompts.values()) == {3}
    generate_corpus(model, {**asked, "tokens": 30}, tmp_path / "some")
    written = json.loads((tmp_path / "some" / "corpus.json").read_text())["generated_tokens"]["train"]["asdiv"]
    assert 30 <= written <= 30 + 6 * 4


def test_a_task_may_have_a_number_of_answers_of_its_own(model, settings, tmp_path):
    rows = [json.dumps({"passage": f"Apples -- Tom buys {i} apples."}) for i in range(400)]
    (tmp_path / "boolq.jsonl").write_text("\n".join(rows))
    asked = {**settings, "tasks": ["passages"], "train_answers_by_task": {"passages": 5}, "data_dir": str(tmp_path)}
    sizes = Counter()
    for shard in plan_shards(asked, load_tokenizer(model)):
        sizes[shard.split] += len(shard.prompts)
    assert sizes == {"train": 5, "calibration": 4, "evaluation": 4}


def test_reference_answers_without_states_take_no_time(model, settings, tmp_path):
    out, given = tmp_path / "given", {"text": "reference", "states": "recomputed", "exit_layers": []}
    generate_corpus(model, {**settings, **given}, out)
    assert read_corpus(out, [], "train")["asdiv"]


def test_reference_answers_are_read_and_heads_still_judged_on_the_targets(model, settings, corpus, tmp_path):
    generate_corpus(model, {**settings, "text": "reference"}, tmp_path / "given")
    source, tokenizer = DataSource.of(settings), load_tokenizer(model)
    answers = {
        tuple(encode_prompt(tokenizer, item.prompt)): [*tokenizer(item.reference)["input_ids"], tokenizer.eos_token_id]
        for item in TASKS["asdiv"].items("train", source)
    }
    traces = read_corpus(tmp_path / "given", [2], "train")["asdiv"]
    assert len(traces) == 12
    for trace in traces:
        tokens = trace.tokens.tolist()
        wanted = answers[tuple(tokens[: trace.prompt_tokens])]
        assert tokens[trace.prompt_tokens :] == wanted[: settings["max_new_tokens"]]
    for split in ("calibration", "evaluation"):
        pairs = zip(*(read_corpus(folder, [2], split)["asdiv"] for folder in (corpus, tmp_path / "given")), strict=True)
        assert all(torch.equal(one.tokens, other.tokens) for one, other in pairs)


def test_a_task_without_written_answers_is_refused(model, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(type(TASKS["asdiv"]), "written_answer", lambda self, item: " ")
    with pytest.raises(EesdError, match=r"Task asdiv, .*: no written answer"):
        generate_corpus(model, {**settings, "text": "reference"}, tmp_path / "given")


def test_other_settings_start_the_corpus_anew(model, settings, tmp_path, monkeypatch):
    out = tmp_path / "default"
    work = tmp_path / "default.work"
    work.mkdir()
    (work / "settings_hash").write_text("other")
    (work / "train-asdiv-0000.safetensors").write_text("stale")
    generate_corpus(model, settings, out)
    assert len(read_corpus(out, [2], "train")["asdiv"]) == 12


def test_wrong_layer_or_unfinished_corpus_is_refused(corpus, tmp_path):
    with pytest.raises(EesdError, match=r"layers \[2, 4\], not 3"):
        read_corpus(corpus, [3], "train")
    with pytest.raises(EesdError, match="no complete corpus"):
        read_corpus(tmp_path, [2], "train")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "same", "loss": {"tv": 1.0, "hard": 0.5}},
        {"init": "lens", "output_head": "tied"},
        {"context": "verified"},
        {"init": "lens", "context": "verified", "output_head": "tied", "depth": 3, "loss": {"soft": 1.0, "text": 1.0}},
    ],
    ids=["paper", "same_tv", "lens", "deep", "lens_deep"],
)
def test_training_lowers_the_loss_and_leaves_a_card(model, corpus, tmp_path, changes):
    settings = {**HEAD, **changes}
    traces = read_corpus(corpus, [2, 4], "train")["asdiv"]
    target = load_target(model, "float32")
    out = tmp_path / "exit2"
    train_heads(model, corpus, {out: settings})
    trained, card = load_exit_head(out, target, fingerprint(model))
    student = make_student(settings, target, traces)
    with torch.inference_mode():
        before = train_module.batch_loss(student, traces)
        student.module.load_state_dict(trained.state_dict())
        after = train_module.batch_loss(student, traces)
    assert after < before - 0.02
    assert card["vocab_rows"] == 64
    assert set(card["agreement"]["asdiv"]) == {"top1", "expected_acceptance", "chain_length", "positions"}
    assert len(card["agreement"]["asdiv"]["top1"]) == 6
    assert card["calibration"]["y"] == sorted(card["calibration"]["y"])
    assert card["train_tokens"] == sum(len(t.teacher_ids) for t in traces)
    assert card["trained"]["versions"]["torch"] == torch.__version__ and card["trained"]["time"].endswith("Z")
    stored = load_file(out / "head.safetensors")
    assert ("head.weight" in stored) == (settings["output_head"] == "free")
    assert not (tmp_path / "exit2.work").exists()


def test_interrupted_training_gives_the_same_head(model, corpus, tmp_path, monkeypatch):
    settings = {**HEAD, "context": "verified"}
    train_heads(model, corpus, {tmp_path / "straight": settings})
    monkeypatch.setattr(train_module, "CHECKPOINT_INTERVAL_S", 0.0)
    original, calls = train_module.batch_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train_module, "batch_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train_heads(model, corpus, {tmp_path / "broken": settings})
    train_heads(model, corpus, {tmp_path / "broken": settings})
    assert len(calls) == 18 + 1  # six epochs of three batches, one of them attempted twice
    straight, resumed = (load_file(tmp_path / name / "head.safetensors") for name in ("straight", "broken"))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_a_head_for_another_model_is_refused_with_both_fingerprints(model, corpus, tmp_path):
    train_heads(model, corpus, {tmp_path / "exit2": {**HEAD, "epochs": 1}})
    target = load_target(model, "float32")
    with pytest.raises(EesdError, match=f"{fingerprint(model)}.*000000000000"):
        load_exit_head(tmp_path / "exit2", target, "000000000000")
    with pytest.raises(EesdError, match="no trained head here"):
        load_exit_head(tmp_path / "none", target, "x")
    for name in ("head.safetensors", "card.json"):
        whole = (tmp_path / "exit2" / name).read_bytes()
        (tmp_path / "exit2" / name).write_bytes(whole[:20])
        with pytest.raises(EesdError, match=r"damaged .* train it again"):
            load_exit_head(tmp_path / "exit2", target, fingerprint(model))
        (tmp_path / "exit2" / name).write_bytes(whole)


def test_a_corpus_of_another_model_is_refused(corpus, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(EesdError, match="written by a model with fingerprint"):
        train_heads(other, corpus, {tmp_path / "x": HEAD})


def test_impossible_corpus_settings_are_found_before_generating(model, settings, tmp_path):
    with pytest.raises(EesdError, match="between 1 and 3"):
        generate_corpus(model, {**settings, "exit_layers": [4]}, tmp_path / "x")
    with pytest.raises(EesdError, match="exceeds the model's context of 4096"):
        generate_corpus(model, {**settings, "max_new_tokens": 4090}, tmp_path / "x")


def test_bad_head_settings_are_refused(model, corpus, tmp_path):
    with pytest.raises(EesdError, match="exit_layer must lie between 1 and 3"):
        train_heads(model, corpus, {tmp_path / "x": {**HEAD, "exit_layer": 4}})
    with pytest.raises(EesdError, match=r"Unknown init 'lst'.* Did you mean 'last'"):
        train_heads(model, corpus, {tmp_path / "x": {**HEAD, "init": "lst"}})
    with pytest.raises(EesdError, match="vocabulary: `prompt` exchanges rows of the target's output head"):
        train_heads(model, corpus, {tmp_path / "x": {**HEAD, "vocabulary": "prompt"}})


def test_vocabulary_is_the_most_frequent_tokens(corpus):
    traces = read_corpus(corpus, [2], "train")["asdiv"]
    written = torch.cat([t.tokens[t.prompt_tokens :] for t in traces]).tolist()
    chosen = choose_vocabulary(traces, 5, 257).tolist()
    counts = [written.count(token) for token in chosen]
    assert counts == sorted(counts, reverse=True)
    least = counts[-1]
    assert all(written.count(token) <= least for token in set(written) - set(chosen))
    assert choose_vocabulary(traces, "full", 257) is None
    assert choose_vocabulary(traces, 1000, 257) is None


def test_a_budget_of_tokens_takes_the_same_share_of_every_task(corpus):
    traces = read_corpus(corpus, [2], "train")["asdiv"]
    kept = limit_tokens({"a": traces, "b": traces[:6]}, 90, seed=0)
    sizes = [len(t.teacher_ids) for t in kept]
    assert 90 <= sum(sizes) < 90 + 2 * max(sizes)
    assert limit_tokens({"a": traces}, None, seed=0) == traces
    assert loss_name({"soft": 1.0, "tv": 0.5, "hard": 0.0}) == "soft + 0.5 tv"


def test_a_budget_of_tokens_draws_prompts_of_every_length():
    traces = [Trace(length, torch.zeros(length + 10)) for length in range(1, 201)]
    drawn = [[t.prompt_tokens for t in limit_tokens({"a": traces}, 500, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 50 and 80 < sum(drawn[0]) / 50 < 120


def test_every_trace_is_seen_once_an_epoch(corpus):
    traces = read_corpus(corpus, [2], "train")["asdiv"]
    batches = epoch_batches(traces, 5, seed=3)
    assert sorted(id(t) for batch in batches for t in batch) == sorted(map(id, traces))


def test_traces_whose_prompts_teach_are_batched_together():
    traces = [Trace(10, torch.zeros(30), learnt_from=2 if i % 2 else 10) for i in range(64)]
    kinds = [{trace.prompt_teaches for trace in batch} for batch in epoch_batches(traces, 8, seed=0)]
    assert sorted(map(len, kinds)) == [1] * 8


def test_answers_of_a_batch_begin_at_one_position(model, corpus):
    target = load_target(model, "float32")
    of_all = read_corpus(corpus, [2, 4], "train")
    traces = [trace for of_task in of_all.values() for trace in of_task][:6]
    batch = make_batch(traces, 2, target)
    assert len({trace.prompt_tokens for trace in traces}) > 1
    assert batch.begins.tolist() == [batch.answer] * 6
    for row, trace in enumerate(traces):
        start, end = int(batch.starts[row]), int(batch.ends[row])
        assert end - start == len(trace.tokens) - 1
        assert batch.tokens[row, batch.answer : end].tolist() == trace.tokens[trace.prompt_tokens :].tolist()
        assert torch.equal(batch.states[row, start:end], trace.states[2].float())
        assert not batch.states[row, :start].any() and not batch.states[row, end:].any()


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] < factors[4] == 1.0
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("output_head", ["free", "tied"])
def test_medusa_heads_learn_from_a_corpus_without_exit_layers(model, settings, tmp_path, output_head):
    generate_corpus(model, {**settings, "exit_layers": []}, tmp_path / "corpus")
    wanted = {**{key: HEAD[key] for key in HEAD if key not in ("exit_layer", "init", "context", "depth")}, **MEDUSA}
    wanted |= {"output_head": output_head, "epochs": 12}
    traces = read_corpus(tmp_path / "corpus", [4], "train")["asdiv"]
    target = load_target(model, "float32")
    out = tmp_path / "many"
    train_heads(model, tmp_path / "corpus", {out: wanted})
    trained, card = load_medusa_heads(out, target, fingerprint(model))
    student = make_student(wanted, target, traces)
    with torch.inference_mode():
        before = train_module.batch_loss(student, traces)
        student.module.load_state_dict(trained.state_dict())
        after = train_module.batch_loss(student, traces)
    assert after < before - 0.02
    assert {key: card[key] for key in ("kind", "exit_layer", "init", "context")} == {
        "kind": "medusa",
        "exit_layer": 0,
        "init": "output",
        "context": "verified",
    }
    assert len(card["agreement"]["asdiv"]["top1"]) == 3
    # One list of ten candidates for each head; the first of them is what agreement counts.
    assert [len(shares) for shares in card["accuracies"]] == [10] * 3
    assert all(0 < sum(shares) <= 1 for shares in card["accuracies"])
    assert card["agreement"]["asdiv"]["chain_length"] <= 3
    assert card["calibration"]["y"] == sorted(card["calibration"]["y"])
    assert ("outputs.0.weight" in load_file(out / "head.safetensors")) == (output_head == "free")
    assert len(head_records([out / "card.json"])) == 3


@pytest.mark.parametrize("changes", [MEDUSA, {"context": "verified", "init": "lens"}], ids=["medusa", "exit_layer"])
def test_accuracies_are_shares_of_ranks_and_begin_with_agreement(model, corpus, changes):
    traces = read_corpus(corpus, [2, 4], "calibration")["asdiv"]
    student = make_student({**HEAD, **changes, "vocab_rows": "full"}, load_target(model, "float32"), traces)
    found, agreement = candidate_accuracies(student, traces), evaluate(student, traces)
    assert [shares[0] for shares in found] == pytest.approx(agreement["top1"])
    # By hand, for the second drafted token.
    hits = [0] * 10
    batch = make_batch(traces, student.exit_layer, student.target)
    where, logits = list(student.predictions(batch, 2))[1]
    drafted = where.nonzero()[:, 1] > batch.answer + 1  # the pass over a prompt writes the first token of its answer
    where, logits = where & (torch.arange(where.shape[1]) > batch.answer + 1), logits[drafted]
    for row, token in zip(logits, batch.teacher_ids[where][:, 0].tolist(), strict=True):
        rank = row.argsort(descending=True).tolist().index(token)
        if rank < 10:
            hits[rank] += 1
    assert found[1] == pytest.approx([hit / len(logits) for hit in hits])
    assert evaluate(student, traces, depth=2)["top1"] == agreement["top1"][:2]


def test_untrained_medusa_heads_predict_what_the_target_does_earlier(model, corpus):
    """Head j at position p is the target's own prediction at p - j, inside the generated text."""
    traces = read_corpus(corpus, [2, 4], "train")["asdiv"][:3]
    target = load_target(model, "float32")
    student = make_student({**HEAD, **MEDUSA, "vocab_rows": "full"}, target, traces)
    batch = make_batch(traces, 0, target)
    assert batch.states is None
    found = list(student.predictions(batch, 6))
    assert len(found) == 3
    for depth, (where, logits) in enumerate(found, 1):
        rows, positions = where.nonzero(as_tuple=True)
        assert torch.equal(where, batch.predicting(depth))
        expected = target.head_weight @ batch.final[rows, positions - depth].T
        torch.testing.assert_close(logits, expected.T, rtol=1e-4, atol=1e-4)
