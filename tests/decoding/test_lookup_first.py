"""Prompt lookup before another drafter: who drafts a round, what the other learns of it, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from eesd.bench.trace import record_chains
from eesd.control import make_controller
from eesd.decoding.generate import Source, generate
from eesd.decoding.tree import Branching
from eesd.drafting.assistant import AssistantDrafter
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.drafting.lookup import LookupDrafter
from eesd.drafting.self_sd import SelfSDDrafter, Skips
from eesd.errors import EesdError
from tests.certify.laws import assert_law, sequence_law
from tests.toys import exit_drafter, medusa_drafter, tiny_target

# Few tokens, so that the text repeats itself.
PROMPT = [3, 1, 4, 1, 5, 3, 1, 4, 2, 5, 3, 1]
LENGTH = 60
DRAFTERS = {
    "exit_head": lambda target: exit_drafter(target, 2),
    "deep": lambda target: exit_drafter(target, 2, lens=True, deep=True),
    "early_exit": lambda target: EarlyExitDrafter(2),
    "self_sd": lambda target: SelfSDDrafter(target, Skips({1, 2}, {3})),
    "medusa": medusa_drafter,
    "assistant": lambda target: AssistantDrafter(tiny_target(seed=5, dtype=target.dtype, vocab_size=8), target),
}


def lookup(max_ngram: int = 2, min_ngram: int = 1) -> Source:
    return Source(LookupDrafter(max_ngram, min_ngram), make_controller({"name": "hf_heuristic", "k": 3}))


def target_of_few_tokens():
    return tiny_target(dtype=torch.float64, vocab_size=8)


def decode(target, drafter, first, **options):
    controller = make_controller({"name": "static", "k": 3})
    return generate(
        target, PROMPT, drafter=drafter, controller=controller, lookup=first, max_new_tokens=LENGTH, **options
    )


@pytest.mark.parametrize("name", DRAFTERS)
def test_both_draft_and_the_output_is_vanillas(name):
    target = target_of_few_tokens()
    vanilla = generate(target, PROMPT, max_new_tokens=LENGTH).tokens
    found = decode(target, DRAFTERS[name](target), lookup(3, 3))
    assert found.tokens == vanilla
    assert {one.looked_up for one in found.rounds} == {True, False}
    assert any(one.accepted for one in found.rounds if one.looked_up)


def test_trees_give_way_too():
    target = target_of_few_tokens()
    drafter = DRAFTERS["deep"](target)
    found = decode(target, drafter, lookup(3, 3), branching=Branching(5, 2))
    assert found.tokens == generate(target, PROMPT, max_new_tokens=LENGTH).tokens
    assert {one.looked_up for one in found.rounds} == {True, False}


@pytest.mark.parametrize("name", ["exit_head", "deep", "medusa", "assistant"])
def test_what_is_drafted_depends_on_the_text_alone(name):
    """After rounds of another drafter drafts are those of a drafter that saw nothing but the text."""
    target = target_of_few_tokens()
    drafter, drafts = DRAFTERS[name](target), {}
    own = drafter.draft

    def noted(chain, pending, slot):
        states = own(chain, pending, slot)
        drafts[slot - len(PROMPT)] = list(chain.tokens)
        return states

    drafter.draft = noted
    output = decode(target, drafter, lookup(3, 3)).tokens
    expected = record_chains(target, DRAFTERS[name](target), PROMPT, output, (), 3).drafted.tolist()
    assert len(drafts) > 5
    assert all(tokens == expected[t][: len(tokens)] for t, tokens in drafts.items())


@pytest.mark.parametrize("drafter", ["exit_head", "exit_head_deep", "early_exit", "medusa", "self_sd"])
def test_sampled_outputs_keep_the_targets_law(drafter):
    """By enumeration of every outcome: copied tokens are one-hot drafts, drawn ones have their own law."""
    first, found = Source(LookupDrafter(2, 2), make_controller({"name": "static", "k": 2})), set()
    proposes = first.drafter.proposes

    def noted(pending, slot):
        found.add(proposes(pending, slot))
        return proposes(pending, slot)

    first.drafter.proposes = noted
    assert_law(*sequence_law(drafter, "static", length=4, seeds=(0,), lookup=first))
    assert found == {True, False}


def test_each_controller_learns_from_its_own_rounds():
    target, told = target_of_few_tokens(), {True: [], False: []}
    first, own = lookup(3, 3), make_controller({"name": "static", "k": 3})
    for looked_up, controller in ((True, first.controller), (False, own)):
        controller.update = lambda *learnt, into=told[looked_up]: into.append(learnt)
    found = generate(
        target, PROMPT, drafter=DRAFTERS["deep"](target), controller=own, lookup=first, max_new_tokens=LENGTH
    )
    for looked_up, learnt in told.items():
        assert learnt == [(r.drafted, r.accepted, r.stop) for r in found.rounds if r.looked_up == looked_up]


@pytest.mark.parametrize("first", [Source(EarlyExitDrafter(2), None), Source(LookupDrafter(2), None, Branching(5, 2))])
def test_only_chains_without_shared_layers_go_first(first):
    target = target_of_few_tokens()
    with pytest.raises(EesdError, match="drafts chains and shares no layers"):
        decode(target, DRAFTERS["deep"](target), first)


def test_a_lookup_alone_is_refused():
    with pytest.raises(EesdError, match="go together"):
        generate(target_of_few_tokens(), PROMPT, lookup=lookup(), max_new_tokens=4)
