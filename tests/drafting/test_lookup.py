"""Prompt lookup copies what a plain search of the context finds, and loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eesd.control import make_controller
from eesd.decoding.chain import Chain
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.drafting import Prompt, Verified
from eesd.drafting.lookup import LookupDrafter
from tests.toys import tiny_target

NO_STATES = torch.empty(1, 0, 1)


def begin(drafter: LookupDrafter, tokens: list[int]) -> None:
    drafter.begin(Prompt(None, None, tokens, NO_STATES, NO_STATES))


def chain(k: int) -> Chain:
    return Chain(make_controller({"name": "static", "k": k}), 100, Sampling(), None)


def searched(tokens: list[int], max_ngram: int, min_ngram: int) -> list[int]:
    """What follows the first earlier occurrence of the longest n-gram at the end."""
    for n in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n :]
    return []


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    rounds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6),
    max_ngram=st.integers(1, 4),
    min_ngram=st.integers(1, 4),
    asked=st.booleans(),
)
def test_drafts_what_a_search_of_prompt_and_output_finds(prompt, rounds, max_ngram, min_ngram, asked):
    drafter = LookupDrafter(max_ngram, min_ngram)
    begin(drafter, prompt)
    context = list(prompt)
    for kept, token in rounds:
        context.append(token)
        found, expected = chain(3), searched(context, max_ngram, min_ngram)[:3]
        if asked:
            assert drafter.proposes(token, len(context) - 1) == bool(expected)
        drafter.draft(found, token, len(context) - 1)
        assert found.tokens == expected
        assert found.stop == ("k_max" if len(found.tokens) == 3 else "")
        accepted = min(kept, len(found.tokens))
        drafter.accept(Verified(token, found.tokens, accepted, 0, NO_STATES, NO_STATES))
        context += found.tokens[:accepted]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lookup_in_the_loop(temperature):
    target = tiny_target()
    prompt = [3, 1, 4, 1, 5, 3, 1]
    found = generate(
        target,
        prompt,
        drafter=LookupDrafter(2),
        controller=make_controller({"name": "static", "k": 4}),
        sampling=Sampling(temperature),
        max_new_tokens=60,
    )
    assert len(found.tokens) == 60
    assert {r.stop for r in found.rounds} <= {"k_max", "drafter", "none", "length"}
    if temperature == 0:
        assert found.tokens == generate(target, prompt, max_new_tokens=60).tokens
