"""Corpora of texts alone, whose states training computes again, and several heads in one pass over them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from eesd.distill import lens as lens_module
from eesd.distill import record as record_module
from eesd.distill import train as train_module
from eesd.distill.corpus import generate_corpus, read_corpus
from eesd.distill.heads import make_student
from eesd.distill.record import reread
from eesd.distill.train import pair, train_heads
from eesd.errors import EesdError
from eesd.models.loading import load_target
from tests.distill.test_train import HEAD, MEDUSA

DEEP = {"context": "verified", "init": "lens"}


@pytest.fixture(scope="module")
def texts(model, settings, tmp_path_factory):
    """The corpus of the other tests, its texts alone."""
    out = tmp_path_factory.mktemp("texts") / "default"
    generate_corpus(model, {**settings, "states": "recomputed", "exit_layers": []}, out)
    return out


@pytest.mark.parametrize("kind", [{}, DEEP, MEDUSA], ids=["paper", "deep", "medusa"])
def test_states_computed_again_are_those_that_were_stored(model, corpus, texts, kind, monkeypatch):
    monkeypatch.setattr(record_module, "LAWS", 7)
    for shard in texts.glob("*.safetensors"):
        assert sorted(load_file(shard)) == ["lengths", "tokens"]
    target, found = load_target(model, "float32"), []
    for folder in (corpus, texts):
        traces = read_corpus(folder, [2, 4], "train")["asdiv"]
        settings = {**HEAD, **kind, "vocab_rows": "full"}
        student = make_student(
            settings, target, traces, complete=lambda some: some if some[0].states else reread(target, some, [2, 4])
        )
        batch = student.batch(traces)
        found.append((batch, [logits.softmax(-1) for _, logits in student.predictions(batch, 2)]))
    (stored, drafts), (again, others) = found
    for name, value in vars(stored).items():
        if name == "teacher_ids":  # of tokens that are hardly ever given, the order is rounding
            assert torch.equal(value[..., 0], again.teacher_ids[..., 0])
        elif isinstance(value, torch.Tensor) and name != "teacher_probs":
            torch.testing.assert_close(getattr(again, name), value, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(again.teacher_probs, stored.teacher_probs, rtol=2e-3, atol=1e-3)
    for law, other in zip(drafts, others, strict=True):
        torch.testing.assert_close(other, law, rtol=2e-2, atol=2e-3)


def test_a_large_corpus_fits_the_lens_on_a_part(model, corpus, monkeypatch):
    target, seen = load_target(model, "float32"), []
    traces = read_corpus(corpus, [2, 4], "train")["asdiv"]
    monkeypatch.setattr(lens_module, "ENOUGH", 0.5)
    lens_module.fit_lens(traces, 2, target, deep=False, complete=lambda some: seen.extend(some) or some)
    tokens = sum(trace.answer_tokens for trace in seen)
    assert 0 < len(seen) < len(traces) and tokens >= 0.25 * (target.config.hidden_size + 1)


def test_a_corpus_of_texts_serves_every_exit_layer(model, texts, tmp_path):
    for exit_layer in (1, 3):
        train_heads(model, texts, {tmp_path / f"n{exit_layer}": {**HEAD, "exit_layer": exit_layer, "epochs": 1}})
        card = json.loads((tmp_path / f"n{exit_layer}" / "card.json").read_text())
        assert card["exit_layer"] == exit_layer and 0 <= card["agreement"]["asdiv"]["top1"][0] <= 1


def test_heads_of_one_pass_are_those_of_passes_of_their_own(model, texts, tmp_path, monkeypatch):
    """Interrupted between the checkpoints of two heads, so that one is a step behind the other."""
    heads = {
        "a": {**HEAD, "epochs": 2},
        "b": {**HEAD, **MEDUSA, "epochs": 2},
        "c": {**HEAD, "exit_layer": 3, "epochs": 2},
    }
    for name, head in heads.items():
        train_heads(model, texts, {tmp_path / "alone" / name: head})
    monkeypatch.setattr(train_module, "CHECKPOINT_INTERVAL_S", 0.0)
    original, calls = train_module.save_checkpoint, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:  # the second head's second checkpoint
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(train_module, "save_checkpoint", failing)
    together = {tmp_path / "together" / name: head for name, head in heads.items()}
    with pytest.raises(KeyboardInterrupt):
        train_heads(model, texts, together)
    train_heads(model, texts, together)
    for name in heads:
        alone, beside = (load_file(tmp_path / way / name / "head.safetensors") for way in ("alone", "together"))
        assert alone.keys() == beside.keys()
        for key, tensor in alone.items():
            assert torch.equal(tensor, beside[key]), (name, key)
    card = json.loads((tmp_path / "together" / "b" / "card.json").read_text())
    assert card["trained_with"] == ["a", "c"]
    assert not list((tmp_path / "together").glob("*.work"))


def test_heads_that_go_through_the_corpus_differently_do_not_share_a_pass(model, corpus, tmp_path):
    with pytest.raises(EesdError, match=r"share train_tokens, learn, batch, epochs, seed; here batch is \[4, 8\]"):
        train_heads(model, corpus, {tmp_path / "a": HEAD, tmp_path / "b": {**HEAD, "batch": 8}})


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_every_head_has_settings_and_a_folder(names, tmp_path):
    assert pair([tmp_path / "a", tmp_path / "b"], [HEAD, HEAD]) == {tmp_path / "a": HEAD, tmp_path / "b": HEAD}
    with pytest.raises(EesdError, match=r"2 --settings and . different --out: give one of each"):
        pair([tmp_path / name for name in names], [HEAD, HEAD])


@pytest.fixture(scope="module")
def labelled(model, settings, tmp_path_factory):
    """The corpus of the other tests, with labels of its prompts."""
    out = tmp_path_factory.mktemp("labelled") / "default"
    generate_corpus(model, {**settings, "labels": "texts"}, out)
    return out


@pytest.mark.parametrize("kind", [DEEP, MEDUSA], ids=["deep", "medusa"])
def test_heads_learn_from_prompts_too(model, corpus, labelled, tmp_path, kind):
    head, cards = {**HEAD, **kind, "epochs": 2}, {}
    for name, folder, learn in (
        ("plain", corpus, "answers"),
        ("alone", labelled, "answers"),
        ("whole", labelled, "texts"),
    ):
        train_heads(model, folder, {tmp_path / name: {**head, "learn": learn}})
        cards[name] = json.loads((tmp_path / name / "card.json").read_text())
    # Labels that are not learnt from change nothing.
    assert (tmp_path / "alone" / "head.safetensors").read_bytes() == (
        tmp_path / "plain" / "head.safetensors"
    ).read_bytes()
    assert cards["alone"]["train_labels"] == cards["whole"]["train_tokens"] < cards["whole"]["train_labels"]
    assert (tmp_path / "whole" / "head.safetensors").read_bytes() != (
        tmp_path / "plain" / "head.safetensors"
    ).read_bytes()
    traces = read_corpus(labelled, [2, 4], "train")["asdiv"]
    assert len({tuple(trace.tokens[: trace.learnt_from].tolist()) for trace in traces}) == 1  # what all begin with
    for split in ("calibration", "evaluation"):
        assert all(t.learnt_from == t.prompt_tokens for t in read_corpus(labelled, [2, 4], split)["asdiv"])


@pytest.mark.parametrize("kind", [DEEP, MEDUSA], ids=["deep", "medusa"])
def test_prompts_teach_first_drafted_tokens_alone(model, labelled, kind):
    traces = read_corpus(labelled, [2, 4], "train")["asdiv"][:6]
    student = make_student({**HEAD, **kind}, load_target(model, "float32"), traces)
    whole, alone = (
        list(student.predictions(student.batch(part), 3)) for part in (traces, [t.answer_alone() for t in traces])
    )
    assert [len(logits) for _, logits in whole] == [sum(t.labels for t in traces), *(len(x) for _, x in alone[1:])]
    in_answers = alone[0][0][whole[0][0]]
    torch.testing.assert_close(whole[0][1][in_answers], alone[0][1])
    for (where, logits), (expected_where, expected) in zip(whole[1:], alone[1:], strict=True):
        assert torch.equal(where, expected_where)
        torch.testing.assert_close(logits, expected)


def test_labels_computed_again_are_those_that_were_stored(model, settings, labelled, tmp_path):
    generate_corpus(
        model, {**settings, "states": "recomputed", "exit_layers": [], "labels": "texts"}, tmp_path / "texts"
    )
    stored = read_corpus(labelled, [2, 4], "train")["asdiv"]
    again = reread(load_target(model, "float32"), read_corpus(tmp_path / "texts", [2, 4], "train")["asdiv"], [2, 4])
    for one, other in zip(stored, again, strict=True):
        assert one.learnt_from == other.learnt_from
        assert torch.equal(one.teacher_ids[:, 0], other.teacher_ids[:, 0])


def test_a_corpus_without_labels_of_prompts_is_refused(model, corpus, tmp_path):
    with pytest.raises(EesdError, match="no labels of prompts"):
        train_heads(model, corpus, {tmp_path / "x": {**HEAD, "learn": "texts"}})
