"""What a view notes of drafts is what drafter and target gave them."""

from __future__ import annotations

import pytest
import torch

from eesd.bench.trace import record_chains
from eesd.bench.view import Drafted, Watched
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.tree import Branching
from tests.toys import exit_drafter, tiny_target

PROMPT, NEW, K = [3, 1, 4, 1, 5], 30, 3
EXACT = 1e-4  # shares are noted with four digits


def watched(target, drafter, branching=None) -> tuple[list[int], list[tuple[list[Drafted], int]]]:
    seen, controller = Watched(drafter, target), make_controller({"name": "static", "k": K})
    made = generate(target, PROMPT, drafter=seen, controller=controller, branching=branching, max_new_tokens=NEW)
    return made.tokens, seen.rounds


def share(target, text: list[int], token: int) -> float:
    """The target's probability of a token after a text, in one pass without a cache."""
    hidden = target.run(target.embed(torch.tensor([text])), slice(0, None))
    return float(target.logits(hidden[0, -1]).softmax(-1)[token])


def test_shares_of_a_chain():
    target = tiny_target(seed=3)
    drafter = exit_drafter(target, exit_layer=2, rows=40, lens=True, deep=True)
    tokens, rounds = watched(target, drafter)
    chains = record_chains(target, drafter, PROMPT, tokens, [], K)
    text = [tokens[0]]
    assert {accepted for _, accepted in rounds} >= {0, 1}
    for drafts, accepted in rounds:
        for i, draft in enumerate(drafts):
            before = [*text, *(one.token for one in drafts[:i])]
            assert draft.p == pytest.approx(share(target, [*PROMPT, *before], draft.token), abs=EXACT)
            assert draft.q == pytest.approx(float(chains.confidence[len(text) - 1, i]), abs=EXACT)
        text = tokens[: len(text) + accepted + 1]


def test_shares_of_a_tree():
    target = tiny_target(seed=3)
    tokens, rounds = watched(target, exit_drafter(target, exit_layer=2, rows=40), Branching(6, 2))
    text, accepted_some = [tokens[0]], 0
    for drafts, accepted in rounds:
        path = [one.token for one in drafts[:accepted]]
        accepted_some += accepted
        # Accepted tokens come first, each after the one before; siblings of the first follow the text as it does.
        for i, draft in enumerate(drafts[:accepted]):
            assert draft.p == pytest.approx(share(target, [*PROMPT, *text, *path[:i]], draft.token), abs=EXACT)
        first = [
            draft
            for draft in drafts
            if draft.p == pytest.approx(share(target, [*PROMPT, *text], draft.token), abs=EXACT)
        ]
        assert len(first) >= min(2, len(drafts)) and sum(draft.q for draft in first[:2]) <= 1 + EXACT
        text = tokens[: len(text) + accepted + 1]
    assert accepted_some
