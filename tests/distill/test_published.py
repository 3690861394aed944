"""Published heads are taken over whole and undamaged, or refused."""

from __future__ import annotations

import json

import pytest

from eesd import settings
from eesd.distill.published import publish_head, take_head
from eesd.errors import EesdError


@pytest.fixture
def head(tmp_path, monkeypatch):
    monkeypatch.setattr("eesd.distill.published.fingerprint", lambda model: model.name)
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "head.safetensors").write_bytes(b"weights")
    (folder / "card.json").write_text(json.dumps({"fingerprint": "right", "exit_layer": 4}))
    return folder


def test_there_and_back(head, tmp_path):
    publish_head(head, tmp_path / "published")
    take_head(tmp_path / "published", tmp_path / "right", tmp_path / "results")
    assert (tmp_path / "results/head.safetensors").read_bytes() == b"weights"
    assert json.loads((tmp_path / "results/card.json").read_text())["exit_layer"] == 4


def test_damaged_weights_and_other_models_are_refused(head, tmp_path):
    with pytest.raises(EesdError, match=r"card.json|no such file"):
        publish_head(tmp_path / "nowhere", tmp_path / "out")
    publish_head(head, tmp_path / "published")
    with pytest.raises(EesdError, match=r"fingerprint right, but .*wrong"):
        take_head(tmp_path / "published", tmp_path / "wrong", tmp_path / "results")
    (tmp_path / "published/head.safetensors").write_bytes(b"weightz")
    with pytest.raises(EesdError, match="SHA-256"):
        take_head(tmp_path / "published", tmp_path / "right", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Publishes the card of a head beside no others than those of the test."""
    monkeypatch.setattr("eesd.published.PUBLISHED_HEADS", tmp_path)

    def write(head, exit_layer, context):
        rows, vocabulary = (1024, "prompt") if context == "verified" else (2048, "frequent")
        made = {"kind": "exit_layer", "exit_layer": exit_layer, "context": context, "vocab_rows": rows}
        (tmp_path / "smollm2-135m" / head).mkdir(parents=True)
        text = json.dumps({"settings": {**made, "vocabulary": vocabulary, "output_head": "tied"}})
        (tmp_path / "smollm2-135m" / head / "card.json").write_text(text)

    return write


def test_configuration_names_what_is_published(tmp_path, card):
    card("deep1", 1, "verified")
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("run: {heads: published}")
    with pytest.raises(EesdError, match=r"no published head 'paper4' .*published: deep1"):
        settings.load_config([overlay])
    run = "run: {heads: published, groups: [mine], replays: [%s], views: [%s]}"
    mine = run + "\ngroups: {mine: {methods: [vanilla, eesd]}}"
    overlay.write_text(mine % ("", ""))
    assert settings.load_config([overlay])["run"]["heads"] == "published"
    # What is looked at needs its heads as well as what is measured.
    overlay.write_text(mine % ("", "main"))
    with pytest.raises(EesdError, match="no published head 'paper4'"):
        settings.load_config([overlay])
    overlay.write_text(mine % ("", "") + "\nheads: {deep1: {vocab_rows: 512}}")
    with pytest.raises(EesdError, match="vocab_rows is 512, but the published head has 1024"):
        settings.load_config([overlay])


def test_heads_that_go_on_from_published_ones_are_trained(tmp_path, card):
    card("paper4", 4, "none")
    overlay = tmp_path / "mine.yaml"
    text = """
run: {heads: published, groups: [mine], replays: [], views: []}
groups: {mine: {methods: [vanilla, eesd]}}
methods: {eesd: {head: mine}}
"""
    overlay.write_text(text + "heads: {paper4: {output_head: tied}, mine: {init: paper4, output_head: tied}}")
    config = settings.load_config([overlay])
    weights = [f"results/heads/smollm2-135m/paper4/{name}" for name in ("head.safetensors", "card.json")]
    assert settings.head_origin(config, "smollm2-135m", "mine") == weights
    assert settings.head_origin(config, "smollm2-135m", "medusa4") == []
    overlay.write_text(
        text + "heads: {between: {init: paper4, vocab_rows: 2048}, mine: {init: between, vocab_rows: 2048}, paper4: {}}"
    )
    with pytest.raises(
        EesdError,
        match=r"between.output_head: is free, but the published 'paper4', .* has tied. Set output_head of both",
    ):
        settings.load_config([overlay])
    for anew in ("{init: lens}", "{kind: medusa}"):
        overlay.write_text(text + f"heads: {{mine: {anew}}}")
        with pytest.raises(EesdError, match=r"no published head 'mine'|of kind medusa"):
            settings.load_config([overlay])
