"""Exact laws of the real decoding code: accept-resample, drafts and whole generations, by running every outcome."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eesd.certify.chance import exactly, sampled, spread
from eesd.control import CONTROLLERS, make_controller
from eesd.decoding.chain import Chain
from eesd.decoding.sampling import Sampling, accept_sampled, draw, draw_rows
from tests.certify.laws import EXACT, assert_law, chain_law, sequence_law

logits = st.lists(st.floats(-4, 4), min_size=3, max_size=3)
samplings = st.builds(Sampling, st.floats(0.3, 3), st.integers(0, 3), st.floats(0.3, 1))


def test_every_outcome_of_a_draw_and_a_comparison_has_its_probability():
    law = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)

    def run():
        token, uniform = int(draw(law, None)), torch.rand(())
        # The second comparison is decided by the first wherever that says so.
        return token, uniform < 0.25, uniform * 2.0 < 1.0

    found = spread(run, 1.0, exactly)
    assert found == pytest.approx(
        {
            (token, *hits): p * q
            for token, p in ((0, 0.25), (2, 0.75))
            for hits, q in (((True, True), 0.25), ((False, True), 0.25), ((False, False), 0.5))
        }
    )


def test_samples_are_divided_and_none_is_lost():
    counts = spread(lambda: int(draw(torch.tensor([0.2, 0.8]), None)), 100_000, sampled(0))
    assert sum(counts.values()) == 100_000
    assert counts[1] == pytest.approx(80_000, abs=600)


def test_inversion_draws_from_its_law():
    """What `spread` takes the place of."""
    law = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    drawn = draw_rows(law.expand(200_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5)
    kept = law > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - 200_000 * law)[kept] ** 2 / (200_000 * law[kept])).sum())
    assert chi_square < 16.3  # 99.9 % quantile with 3 degrees of freedom


@settings(max_examples=30, deadline=None)
@given(
    target=st.lists(logits, min_size=3, max_size=3),
    draft=st.lists(logits, min_size=2, max_size=2),
    sampling=samplings,
    trimmed=st.booleans(),
)
def test_a_chain_keeps_the_targets_law(target, draft, sampling, trimmed):
    """Drafting and verifying two tokens: each settled token has the law of its own prefix, to 1e-12."""
    assert_law(*chain_law(target, draft, sampling, trimmed))


@pytest.mark.parametrize("name", CONTROLLERS.names())
@pytest.mark.parametrize("drafter", ["scripted", "exit_head", "early_exit", "lookup"])
def test_whole_generations_have_the_targets_law(name, drafter):
    found, expected = sequence_law(drafter, name, length=3)
    assert_law(found, expected)


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, top_k=2), Sampling(1.3, top_p=0.8)], ids=str)
def test_generations_with_temperature_top_k_and_top_p(sampling):
    assert_law(*sequence_law("exit_head", "static", length=4, sampling=sampling, seeds=(0,)))


def test_a_law_that_is_wrong_is_noticed():
    with pytest.raises(AssertionError):
        assert_law({0: 0.5, 1: 0.5}, {0: 0.5 + 2 * EXACT, 1: 0.5 - 2 * EXACT})


def test_a_chain_of_certain_tokens_needs_no_draft_law():
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def run():
        chain = Chain(make_controller({"name": "static", "k": 1}), 3, Sampling(1.0), None)
        chain.copy(1)
        accepted, token = accept_sampled(chain.tokens, chain.laws, None, torch.stack((p, p)), None)
        return [*chain.tokens[:accepted], token][0]

    assert_law(spread(run, 1.0, exactly), dict(enumerate(p.tolist())))
