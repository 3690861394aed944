"""A tiny model and a corpus that it wrote, made once."""

from __future__ import annotations

import pytest

from eesd.distill.corpus import generate_corpus
from tests.toys import write_tiny_data, write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    return {
        "tasks": ["asdiv"],
        "train_answers": 12,
        "calibration_answers": 4,
        "evaluation_answers": 4,
        "tokens": None,
        "max_new_tokens": 10,
        "max_prompt_tokens": 400,
        "text": "generated",
        "states": "stored",
        "temperatures": [0.0],
        "batch": 4,
        "seed": 0,
        "exit_layers": [2],
        "dtype": "float32",
        "resources": "resources",
        "data_dir": str(write_tiny_data(tmp_path_factory.mktemp("data"))),
    }


@pytest.fixture(scope="session")
def corpus(model, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "default"
    generate_corpus(model, settings, out)
    return out
