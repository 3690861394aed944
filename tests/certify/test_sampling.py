"""The sampling certificate: passes on the real code, finds biases of the size that it promises."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare

from eesd.analysis.verdict import check_sampling
from eesd.certify import sampling
from eesd.certify.sampling import LENGTH, SAMPLING, detectable_w, g_test, holm, sample_outputs, write_certificate
from eesd.certify.toy import PROMPT, exact_law, toy_target
from eesd.decoding import generate as generating
from eesd.errors import EesdError


@pytest.fixture(scope="module")
def law():
    return exact_law(toy_target(), PROMPT, LENGTH, SAMPLING)


def test_the_exact_law_is_one(law):
    assert len(law) == 8**LENGTH
    assert sum(law.values()) == pytest.approx(1)


@pytest.mark.parametrize(("drafter", "controller"), [("exit_head_deep", "beta_ts"), ("medusa", "static")])
def test_outputs_follow_the_exact_law(law, drafter, controller):
    found = g_test(sample_outputs(drafter, controller, 20_000), law)
    assert found["samples"] == 20_000
    assert found["p_value"] > 0.001


def test_generation_with_torchs_own_random_numbers_follows_the_law(law):
    """Nothing replaced: also the seeds and the drawing itself."""
    target = toy_target()
    drafter, controller = sampling.TOY_DRAFTERS["lookup"](target), sampling.toy_controller("static")
    counts = {}
    for seed in range(3000):
        tokens = generating.generate(
            target, PROMPT, drafter=drafter, controller=controller, sampling=SAMPLING, max_new_tokens=LENGTH, seed=seed
        ).tokens
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    assert g_test(counts, law)["p_value"] > 0.001


def test_the_smallest_bias_it_promises_to_find_is_found_about_nine_times_in_ten():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(60, 2.0))
    n, tests = 200_000, 20
    w = detectable_w(n, len(p), tests)
    shift = np.zeros(60)
    shift[:2] = 1, -1
    shift *= w / np.sqrt((shift**2 / p).sum())
    law, biased = dict(enumerate(p)), p + shift
    found = sum(g_test(dict(enumerate(rng.multinomial(n, biased))), law)["p_value"] < 0.01 / tests for _ in range(200))
    assert 165 <= found <= 195
    fair = sum(g_test(dict(enumerate(rng.multinomial(n, p))), law)["p_value"] < 0.05 for _ in range(400))
    assert 8 <= fair <= 34


def test_impossible_outputs_are_never_accepted():
    assert g_test({0: 999_999, 1: 1}, {0: 1.0, 1: 0.0})["p_value"] == 0


def test_the_statistic_is_that_of_the_definition():
    found = g_test({0: 48, 1: 52}, {0: 0.5, 1: 0.5})
    assert found["cohen_w"] == pytest.approx(0.04)
    assert found["total_variation"] == pytest.approx(0.02)
    assert found["p_value"] == pytest.approx(chisquare([48, 52]).pvalue, rel=0.01)


def test_holm():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_the_table_and_the_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "pairs", lambda: [("lookup", "static")])
    write_certificate(tmp_path / "sampling.csv", 2000)
    table = pd.read_csv(tmp_path / "sampling.csv")
    assert list(table.columns) == list(sampling.COLUMNS["sampling"])
    assert "0 laws rejected" in capsys.readouterr().out
    monkeypatch.setattr(sampling, "SAMPLING", sampling.Sampling(0.6))
    monkeypatch.setattr(
        sampling, "exact_law", lambda *args, law=sampling.exact_law: law(*args[:3], sampling.Sampling(0.5))
    )
    with pytest.raises(EesdError, match="lookup with static"):
        check_sampling(write_certificate(tmp_path / "sampling.csv", 2000))
    with pytest.raises(EesdError, match="at least 1000"):
        write_certificate(tmp_path / "sampling.csv", 10)
