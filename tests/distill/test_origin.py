"""Heads that go on from the weights of another: at the same exit, at another one, and those they cannot go on from."""

from __future__ import annotations

import json
import shutil
from unittest.mock import Mock

import pytest
import torch

from eesd.distill import train as train_module
from eesd.distill.corpus import generate_corpus, read_corpus
from eesd.distill.evaluate import candidate_accuracies, confidences, evaluate
from eesd.distill.heads import make_student
from eesd.distill.origin import read_origin
from eesd.distill.record import record_batch
from eesd.distill.train import train_heads
from eesd.drafting.exit_head import load_exit_head
from eesd.errors import EesdError
from eesd.files import sha256_file
from eesd.models.loading import load_target
from eesd.models.special import fingerprint
from tests.distill.test_train import HEAD
from tests.toys import write_tiny_model

DEEP = {**HEAD, "init": "lens", "context": "verified", "output_head": "tied"}


@pytest.fixture(scope="module")
def corpus(model, settings, tmp_path_factory):
    """One with the states of both exits."""
    out = tmp_path_factory.mktemp("corpus") / "default"
    generate_corpus(model, {**settings, "exit_layers": [1, 2]}, out)
    return out


@pytest.fixture(scope="module")
def deep2(model, corpus, tmp_path_factory):
    """A trained head after layer 2."""
    out = tmp_path_factory.mktemp("heads") / "deep2"
    train_heads(model, corpus, {out: DEEP})
    return out


def student_of(settings, out, model, corpus):
    target = load_target(model, "float32")
    traces = read_corpus(corpus, [settings["exit_layer"], 4], "train")["asdiv"]
    origin = read_origin(settings, out, target, fingerprint(model))
    return make_student(settings, target, traces, origin=origin), traces


def test_at_the_same_exit_it_starts_as_the_other_ended(model, corpus, deep2):
    student, _ = student_of({**DEEP, "init": "deep2"}, deep2.with_name("more"), model, corpus)
    trained, card = load_exit_head(deep2, student.target, fingerprint(model))
    for name, weight in trained.state_dict().items():
        assert torch.equal(student.module.state_dict()[name], weight), name
    assert torch.equal(student.vocabulary, trained.token_ids) and len(student.head_rows) == card["vocab_rows"]
    learns = {name for name, weight in student.module.named_parameters() if weight.requires_grad}
    assert learns == {name for name, _ in student.module.named_parameters()} - {"head.weight"}


def test_at_another_exit_its_map_is_fitted_anew(model, corpus, deep2, monkeypatch):
    settings = {**DEEP, "init": "deep2", "exit_layer": 1}
    moved, traces = student_of(settings, deep2.with_name("deep1"), model, corpus)
    monkeypatch.setattr("eesd.distill.heads.fit_lens", lambda *args: (args[-1].estimate.weight, args[-1].estimate.bias))
    unfitted, _ = student_of(settings, deep2.with_name("deep1"), model, corpus)
    with torch.inference_mode():
        assert train_module.batch_loss(moved, traces) < train_module.batch_loss(unfitted, traces)


def test_training_goes_on_and_the_card_says_from_what(model, corpus, deep2):
    out = deep2.with_name("more")
    settings = {**DEEP, "init": "deep2", "epochs": 3}
    student, traces = student_of(settings, out, model, corpus)
    train_heads(model, corpus, {out: settings})
    trained, card = load_exit_head(out, student.target, fingerprint(model))
    first = json.loads((deep2 / "card.json").read_text())
    assert card["init"] == "deep2"
    assert card["origin"] == {
        "head": "deep2",
        "weights_sha256": sha256_file(deep2 / "head.safetensors"),
        "train_tokens": first["train_tokens"],
    }
    with torch.inference_mode():
        before = train_module.batch_loss(student, traces)
        student.module.load_state_dict(trained.state_dict())
        assert train_module.batch_loss(student, traces) < before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "deep3"}, "Unknown init 'deep3'.*Nor is there a trained head"),
        ({"context": "none"}, "has context verified, but the head that goes on from it has none"),
        ({"output_head": "free"}, "has output_head tied"),
    ],
)
def test_heads_that_it_cannot_go_on_from_are_refused(model, corpus, deep2, changes, message):
    with pytest.raises(EesdError, match=message):
        train_heads(model, corpus, {deep2.with_name("other"): {**DEEP, "init": "deep2", **changes}})


@pytest.mark.parametrize(
    "changes", [{"vocab_rows": "full"}, {"context": "none", "init": "last", "output_head": "free"}]
)
def test_heads_of_every_shape_move(model, corpus, tmp_path, changes):
    """One whose rows are the target's own weights, which stay frozen, and the paper's, which has no map to fit."""
    train_heads(model, corpus, {tmp_path / "old": {**DEEP, **changes, "epochs": 1}})
    settings = {**DEEP, **changes, "init": "old", "exit_layer": 1, "epochs": 1}
    student, _ = student_of(settings, tmp_path / "new", model, corpus)
    assert not any(weight.requires_grad for weight in student.target.parameters())
    assert student.module.head.weight.requires_grad == (settings["output_head"] == "free")
    train_heads(model, corpus, {tmp_path / "new": settings})
    train_heads(model, corpus, {tmp_path / "newer": {**settings, "init": "new"}})
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("old", "new", "newer")]
    assert [card["exit_layer"] for card in cards] == [2, 1, 1]
    assert cards[2]["origin"]["train_tokens"] == 2 * cards[0]["train_tokens"]


def test_a_free_output_head_keeps_its_rows(model, corpus, tmp_path):
    free = {**DEEP, "output_head": "free", "epochs": 1}
    train_heads(model, corpus, {tmp_path / "old": free})
    with pytest.raises(EesdError, match=r"has vocab_rows 64, but .* 32\. Set vocab_rows to 64"):
        train_heads(model, corpus, {tmp_path / "new": {**free, "init": "old", "vocab_rows": 32}})


def test_a_tied_output_head_takes_another_vocabulary(model, corpus, deep2):
    settings = {**DEEP, "init": "deep2", "vocab_rows": 32, "vocabulary": "prompt"}
    student, traces = student_of(settings, deep2.with_name("few"), model, corpus)
    assert len(student.vocabulary) == len(student.module.head.weight) == 32
    before = student.module.layer.qkv.weight.clone()
    train_heads(model, corpus, {deep2.with_name("few"): settings})
    head, card = load_exit_head(deep2.with_name("few"), student.target, fingerprint(model))
    assert head.follows_prompt and card["vocab_rows"] == 32
    assert not torch.equal(head.layer.qkv.weight, before)
    # What is measured is what decoding drafts: the rows after each trace's prompt.
    for trace in traces[:3]:
        batch = student.batch([trace])
        where, logits = next(student.predictions(batch, 1))
        ids = head.begin(trace.tokens[: trace.prompt_tokens].tolist(), student.target)
        assert batch.words.draftable[0].sum() == len(ids) == 32
        rows = student.rows_of(ids[None].expand(len(logits), -1), batch, where)
        assert (rows >= 0).all()
        assert ((logits.softmax(-1) > 0).sum(-1) == 32).all()
        assert torch.equal(batch.words.weight[rows[0]], head.head.weight)
    short = record_batch(student.target, [[3, 1, 4]] * 2, [2, 4], 5, [0.0], set(), 0)
    assert evaluate(student, short)["chain_length"] is None and len(confidences(student, short)[0])
    candidate_accuracies(student, short)


def test_a_corpus_of_texts_serves_a_move(model, settings, deep2, tmp_path):
    texts = tmp_path / "texts"
    generate_corpus(model, {**settings, "states": "recomputed", "exit_layers": []}, texts)
    shutil.copytree(deep2, tmp_path / "deep2")
    train_heads(model, texts, {tmp_path / "deep3": {**DEEP, "init": "deep2", "exit_layer": 3, "epochs": 1}})
    assert json.loads((tmp_path / "deep3/card.json").read_text())["exit_layer"] == 3


def test_a_pass_does_not_go_on_from_a_head_of_its_own(model, corpus, deep2):
    heads = {deep2: DEEP, deep2.with_name("more"): {**DEEP, "init": "deep2"}}
    with pytest.raises(EesdError, match="more: goes on from deep2, which the same pass trains"):
        train_heads(model, corpus, heads)


def test_a_head_of_another_model_is_refused(model, corpus, deep2, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(EesdError, match="this head was trained for a model with fingerprint"):
        read_origin({**DEEP, "init": "deep2"}, deep2.with_name("x"), load_target(other), fingerprint(other))


def test_steps_from_another_origin_are_not_gone_on_with(model, corpus, deep2, tmp_path, monkeypatch):
    """The head to start from was trained anew after an interruption: so is what starts from it."""
    shutil.copytree(deep2, tmp_path / "deep2")
    settings, out = {**DEEP, "init": "deep2", "epochs": 2}, tmp_path / "more"
    with monkeypatch.context() as interrupted:
        interrupted.setattr(train_module, "CHECKPOINT_INTERVAL_S", 0.0)
        interrupted.setattr(train_module, "write_head", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_heads(model, corpus, {out: settings})
    train_heads(model, corpus, {tmp_path / "deep2": {**DEEP, "seed": 1}})
    learn = Mock(side_effect=train_module.batch_loss)
    monkeypatch.setattr(train_module, "batch_loss", learn)
    train_heads(model, corpus, {out: settings})
    assert learn.call_count == 6  # both passes, of three batches each
    assert json.loads((out / "card.json").read_text())["init"] == "deep2"
