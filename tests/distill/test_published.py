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


def test_configuration_names_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PUBLISHED_HEADS", tmp_path)
    (tmp_path / "smollm2-135m/deep1").mkdir(parents=True)
    made = {"kind": "exit_layer", "exit_layer": 1, "context": "verified", "vocab_rows": 8192}
    (tmp_path / "smollm2-135m/deep1/card.json").write_text(json.dumps({"settings": made}))
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("run: {heads: published}")
    with pytest.raises(EesdError, match=r"no published head 'paper4' .*published: deep1"):
        settings.load_config([overlay])
    run = "run: {heads: published, groups: [mine], replays: [%s], views: [%s]}"
    mine = run + "\ngroups: {mine: {methods: [vanilla, eesd]}}"
    overlay.write_text(mine % ("", ""))
    assert settings.load_config([overlay])["run"]["heads"] == "published"
    # A head that goes on from a published one is trained.
    other = "\nmethods: {eesd: {head: mine}}\nheads: {mine: {init: %s, context: verified, output_head: tied}}"
    overlay.write_text(mine % ("", "") + other % "deep1")
    config = settings.load_config([overlay])
    assert settings.head_origin(config, "smollm2-135m", "mine") == [
        f"results/heads/smollm2-135m/deep1/{name}" for name in ("head.safetensors", "card.json")
    ]
    overlay.write_text(mine % ("", "") + other % "lens")
    with pytest.raises(EesdError, match="no published head 'mine'"):
        settings.load_config([overlay])
    # What is looked at needs its heads as well as what is measured.
    overlay.write_text(mine % ("", "main"))
    with pytest.raises(EesdError, match="no published head 'paper4'"):
        settings.load_config([overlay])
    overlay.write_text(mine % ("", "") + "\nheads: {deep1: {vocab_rows: 1024}}")
    with pytest.raises(EesdError, match="vocab_rows is 1024, but the published head has 8192"):
        settings.load_config([overlay])
