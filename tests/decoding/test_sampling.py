"""Speculative sampling keeps the target's law: exact enumeration on small vocabularies and a draw test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eesd.decoding import sampling
from eesd.decoding.sampling import Sampling, accept_greedy, accept_sampled, draw
from eesd.errors import EesdError


def test_greedy_accepts_the_matching_prefix():
    best = [2, 4, 1]
    assert accept_greedy([2, 4], best) == (2, 1)
    assert accept_greedy([2, 3], best) == (1, 4)
    assert accept_greedy([0, 4], best) == (0, 2)


def law(weights: list[float]) -> torch.Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    return values / values.sum()


laws = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda w: sum(w) > 0.1).map(law)


@settings(max_examples=200, deadline=None)
@given(p=laws, q=laws)
def test_accept_or_resample_has_exactly_the_targets_law(p, q):
    """P(x) = q(x) min(1, p/q) + P(reject) * residual(x) = p(x), by enumeration of the rule."""
    accepted = torch.minimum(p, q)
    residual = (p - q).clamp(min=0)
    rejected = 1 - accepted.sum()
    output = accepted + (rejected * residual / residual.sum() if residual.sum() > 0 else 0)
    torch.testing.assert_close(output, p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([0, 2, 3])])
def test_sampled_verification_draws_from_the_targets_law(vocabulary):
    generator = torch.Generator().manual_seed(0)
    p = law([0.1, 0.4, 0.2, 0.3])
    q = law([0.5, 0.1, 0.1, 0.3]) if vocabulary is None else law([0.6, 0.3, 0.1])
    counts = torch.zeros(4, dtype=torch.float64)
    draws = 20_000
    for _ in range(draws):
        row = int(draw(q, generator))
        token = row if vocabulary is None else int(vocabulary[row])
        accepted, after = accept_sampled([token], [q], vocabulary, torch.stack((p, p)), generator)
        counts[token if accepted else after] += 1
    chi_square = float(((counts - draws * p) ** 2 / (draws * p)).sum())
    assert chi_square < 16.3  # 99.9 % quantile with 3 degrees of freedom


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.integers(0, 8), min_size=4, max_size=4).filter(any),
    second=st.lists(st.integers(0, 8), min_size=4, max_size=4).filter(any),
    drafted=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_a_chain_of_certain_tokens_keeps_exactly_the_targets_law(first, second, drafted):
    """All outcomes of the random numbers, each counted once: u takes the middles of equal steps, draws become laws."""
    p, after = law(first), law(second)
    bonus = law([1, 2, 3, 4])
    output = {"first": torch.zeros(4, dtype=torch.float64), "second": torch.zeros(4, dtype=torch.float64)}
    grid = [((i + 0.5) / sum(first), (j + 0.5) / sum(second)) for i in range(sum(first)) for j in range(sum(second))]
    for numbers in grid:
        uniforms, laws = iter(numbers), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling.torch, "rand", lambda *_, it=uniforms, **__: torch.tensor(next(it)).double())
            patch.setattr(sampling, "draw", lambda law, _, seen=laws: seen.append(law / law.sum()) or 0)
            accepted, _ = accept_sampled(list(drafted), [None, None], None, torch.stack((p, after, bonus)), None)
        own = laws[0]
        output["first"] += own if accepted == 0 else torch.eye(4, dtype=torch.float64)[drafted[0]]
        if accepted > 0:
            output["second"] += own if accepted == 1 else torch.eye(4, dtype=torch.float64)[drafted[1]]
        if accepted == 2:
            torch.testing.assert_close(own, bonus)
    torch.testing.assert_close(output["first"] / len(grid), p, rtol=0, atol=1e-12)
    reached = p[drafted[0]] * len(grid)
    torch.testing.assert_close(output["second"], reached * after, rtol=0, atol=1e-9)


def test_a_zero_probability_token_is_never_accepted():
    generator = torch.Generator().manual_seed(0)
    p, q = law([0.0, 1.0, 0.0, 0.0]), law([1.0, 0.0, 0.0, 0.0])
    assert accept_sampled([0], [q], None, torch.stack((p, p)), generator) == (0, 1)
    assert accept_sampled([0], [None], None, torch.stack((p, p)), generator) == (0, 1)


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(Sampling(2.0).probabilities(logits), (logits / 2).softmax(-1))
    assert (Sampling(1.0, top_k=2).probabilities(logits) > 0).tolist() == [True, True, False, False]
    # Masses are 0.64, 0.24, 0.09, 0.03: the second token is the one that reaches 0.7.
    nucleus = Sampling(1.0, top_p=0.7).probabilities(logits)
    assert (nucleus > 0).tolist() == [True, True, False, False]
    assert float(nucleus.sum()) == pytest.approx(1)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_settings_are_refused(bad):
    with pytest.raises(EesdError, match="Sampling needs"):
        Sampling(**bad)
