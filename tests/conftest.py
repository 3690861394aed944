"""Shared by all tests: where the repository is, and property tests that are the same on every machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Kernels in Triton run in its interpreter. It looks when it is imported, which many libraries do if it is there.
    os.environ["TRITON_INTERPRET"] = "1"

# Shared machines stall now and then; a deadline would turn that into a failure.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def embedded_model(root: Path) -> Path:
    """The converted default model, which `make test` fetches first; skips where tests run without it."""
    folder = root / "resources" / "models" / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        pytest.skip("no default model: snakemake --cores all resources/models/smollm2-135m makes it")
    return folder
