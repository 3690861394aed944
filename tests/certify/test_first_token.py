"""First-token laws on a tiny model in float64, where nothing but the code could tell them apart."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from eesd.certify.first_token import total_variation, write_first_tokens
from eesd.certify.toy import TOY_DRAFTERS, toy_target
from eesd.decoding import sampling
from eesd.decoding.sampling import Sampling
from tests.toys import write_tiny_data, write_tiny_model

PREFIXES = [[1, 2, 3], [7, 0, 7, 0, 7]]


@pytest.mark.parametrize("drafter", ["early_exit", "exit_head", "medusa", "self_sd", "lookup"])
@pytest.mark.parametrize("how", [Sampling(1.0), Sampling(0.8, top_k=3)], ids=str)
def test_the_law_is_the_targets(drafter, how):
    target = toy_target(dtype=torch.float64, engine="none")
    for prefix in PREFIXES:
        assert total_variation(target, TOY_DRAFTERS[drafter](target), prefix, how) < 1e-12


def test_a_biased_rule_is_seen(monkeypatch):
    target = toy_target(dtype=torch.float64, engine="none")
    monkeypatch.setattr(sampling, "draw", lambda law, generator: torch.tensor(0))
    distances = [
        total_variation(target, TOY_DRAFTERS["early_exit"](target), prefix, Sampling(1.0)) for prefix in PREFIXES
    ]
    assert max(distances) > 1e-3


def test_the_table(tmp_path):
    model, data = write_tiny_model(tmp_path / "tiny"), write_tiny_data(tmp_path / "data", rows=120)
    write_first_tokens(model, tmp_path / "first.csv", "asdiv", data, None)
    table = pd.read_csv(tmp_path / "first.csv")
    assert len(table) == 20
    assert table["total_variation"].max() < 1e-4
