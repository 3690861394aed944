"""The exit head step by step equals the exit head over a sequence, and drafts only tokens of its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eesd.decoding.chain import Chain
from eesd.decoding.sampling import Sampling
from eesd.drafting import DRAFTERS, Prompt
from eesd.errors import EesdError
from eesd.models.transformer import head_logits
from tests.toys import exit_drafter, tiny_head, tiny_target

GREEDY = Sampling()


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 3, 2], [10]])
def test_steps_equal_the_whole_sequence(pieces):
    target = tiny_target()
    head = tiny_head(target, rows=20)
    states = torch.randn(1, 10, target.config.hidden_size)
    whole = head_logits(head(states, target.rotary)[0], head.norm, head.head.weight)
    cache, slot = target.new_cache(10, num_layers=1), 0
    for piece in states.split(pieces, 1):
        logits = head.step(piece, target.rotary, cache, slot)
        slot += piece.shape[1]
        torch.testing.assert_close(logits, whole[slot - 1])


def test_drafted_tokens_are_in_the_draft_vocabulary():
    from eesd.control import make_controller

    target = tiny_target()
    drafter = exit_drafter(target, exit_layer=2, rows=5)
    cache = target.new_cache(64)
    states = target.run(target.embed(torch.tensor([[1, 2, 3]])), slice(0, 2), cache)
    drafter.begin(Prompt(target, cache, [1, 2, 3], states, target.run(states, slice(2, None), cache)))
    chain = Chain(make_controller({"name": "static", "k": 8}), 8, GREEDY, None)
    drafted = drafter.draft(chain, 4, 3)
    assert drafted.shape == (1, 8, target.config.hidden_size)
    assert max(chain.tokens) < 5
    assert chain.stop == "k_max"


def test_a_budget_below_the_cap_ends_a_draft_by_length():
    from eesd.control import make_controller

    chain = Chain(make_controller({"name": "static", "k": 8}), 2, GREEDY, None)
    while not chain.stop:
        chain.extend(torch.tensor([0.0, 1.0]))
    assert (chain.tokens, chain.stop) == ([1, 1], "length")
    assert Chain(None, 5, GREEDY, None).stop == "none"


def test_a_certain_token_has_confidence_one_and_no_law():
    from eesd.control import make_controller

    controller, seen = make_controller({"name": "beta_ts"}), []
    controller.keep_drafting = lambda signal: seen.append(signal) or len(seen) < 3
    chain = Chain(controller, 9, Sampling(1.0), torch.Generator().manual_seed(0))
    chain.extend(torch.tensor([0.0, 1.0]))
    while not chain.stop:
        chain.copy(7)
    assert (chain.tokens[1:], chain.laws[1:], chain.stop) == ([7, 7], [None, None], "controller")
    assert [(s.position, s.confidence, s.probability, s.entropy) for s in seen[1:]] == [(2, 1, 1, 0), (3, 1, 1, 0)]


def test_settings_without_a_head_are_refused():
    with pytest.raises(EesdError, match="needs a trained head"):
        DRAFTERS["exit_head"].build({}, tiny_target(), Path("x"))
    with pytest.raises(EesdError, match="Did you mean 'exit_head'"):
        DRAFTERS["exit_haed"]
