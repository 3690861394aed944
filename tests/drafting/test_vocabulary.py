"""Rows of a head that follow the prompt: which tokens they stand for, and that every engine reads them anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eesd.control import make_controller
from eesd.decoding.chain import Chain
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching
from eesd.drafting.base import Drafter
from eesd.drafting.exit_head import ExitHeadDrafter
from eesd.drafting.vocabulary import prompt_vocabulary
from eesd.models.engine import attach_engine
from tests.toys import exit_drafter, needs_compiler, tiny_target


@given(st.permutations(range(40)), st.integers(1, 40), st.lists(st.integers(0, 39), max_size=60))
def test_it_keeps_its_size_and_most_frequent_tokens(tokens, rows, prompt):
    ranked = torch.tensor(tokens[:rows])
    found = prompt_vocabulary(ranked, prompt).tolist()
    kept = rows - rows // 4
    assert len(found) == len(set(found)) == rows
    assert found[:kept] == tokens[:kept]
    further = set(prompt) - set(found[:kept])
    assert len(further & set(found)) == min(len(further), rows // 4)
    if not further:
        assert found == ranked.tolist()


def test_of_a_long_prompt_it_takes_the_last_tokens():
    found = prompt_vocabulary(torch.arange(8), [20, 21, 22, 20, 3])
    assert found.tolist() == [0, 1, 2, 3, 4, 5, 20, 22]


def follower(target, rows=16):
    drafter = exit_drafter(target, rows=rows, lens=True, deep=True)
    drafter.head.follows_prompt = True
    return drafter


def static_chain(budget=6):
    return Chain(make_controller({"name": "static", "k": 6}), budget, Sampling(), None)


@torch.inference_mode()
def test_a_text_is_drafted_with_the_rows_of_its_prompt():
    """All positions at once as one after another, after another prompt had the rows."""
    target, tokens = tiny_target(), [30, 31, 32, 33, 5, 31, 9, 30]
    drafter = follower(target)
    found = []
    for draft_text in (ExitHeadDrafter.draft_text, Drafter.draft_text):
        drafter.head.begin([40, 41, 42], target)
        chains = [static_chain() for _ in range(2)]
        draft_text(drafter, target, tokens, 5, chains)
        found.append([chain.tokens for chain in chains])
    assert found[0] == found[1]
    assert {token for tokens in found[0] for token in tokens} <= set(drafter.vocabulary.tolist())


def test_graphs_draft_with_the_rows_of_the_prompt():
    target, prompts = tiny_target(), [[30, 31, 32, 33], [40, 41, 42, 30]]
    chain = make_controller({"name": "static", "k": 6})
    branching = Branching(nodes=5, width=2)
    found = []
    for engine in ("torch", "graphs"):
        attach_engine(target, engine)
        drafter = follower(target)
        drafter.head.pack(target.engine)
        found.append(
            [
                generate(target, prompt, drafter=drafter, controller=chain, branching=trees, max_new_tokens=24).rounds
                for prompt in prompts
                for trees in (None, branching)
            ]
        )
    assert found[0] == found[1]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_and_torch_draft_with_the_rows_of_the_prompt(dtype):
    """One head after another prompt is a head made for it, in whole steps, alone and in plain torch."""
    target = tiny_target()
    for weight in target.parameters():
        weight.copy_(weight.bfloat16())
    target = target.to(dtype)
    prompts = [[30, 31, 32, 33], [40, 41, 42, 30]]

    def drafts(drafter, prompt):
        chain = make_controller({"name": "static", "k": 6})
        return generate(target, prompt, drafter=drafter, controller=chain, max_new_tokens=24)

    plain = follower(target)
    expected = [drafts(plain, prompt) for prompt in prompts]
    engine = attach_engine(target, "cpp")
    drafter = follower(target)
    drafter.head.pack(engine)
    for prompt, wanted in zip(prompts, expected, strict=True):
        found = drafts(drafter, prompt)
        assert drafter.steps is not None
        assert drafter.vocabulary.tolist() == prompt_vocabulary(torch.arange(16), prompt).tolist()
        assert dtype == torch.bfloat16 or found.rounds == wanted.rounds
        weight = drafter.head.head.weight
        states = torch.randn(3, target.config.hidden_size).to(dtype)
        torch.testing.assert_close(
            drafter.head.logits(states).float(), (states @ weight.T).float(), rtol=0.02, atol=0.02
        )
        assert torch.equal(weight, target.head_weight[drafter.vocabulary])
