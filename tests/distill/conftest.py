"""A tiny model and a corpus that it wrote, made once."""

from __future__ import annotations

import pytest

from eesd.distill.corpus import generate_corpus
from tests.toys import corpus_settings, write_tiny_data, write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    return corpus_settings(write_tiny_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def corpus(model, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "default"
    generate_corpus(model, settings, out)
    return out
