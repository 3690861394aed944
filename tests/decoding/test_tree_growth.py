"""How trees grow, what controllers hear of them, and typical acceptance, on laws made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from eesd.control import Signal, make_controller
from eesd.decoding.generate import GREEDY, generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching, Tree, Typical, accept_path, typical_path
from eesd.models.passes import Pass
from tests.toys import exit_drafter, planted_tree, tiny_target

PROMPT = [3, 1, 4, 1, 5]


def static(k: int):
    return make_controller({"name": "static", "k": k})


# ---- growing --------------------------------------------------------------------------------------------------------


def grown(laws: Sequence[Sequence[Sequence[float]]], branching: Branching, controller=None) -> Tree:
    """A tree grown from draft laws by hand: of every level, one law for each frontier node or one for all."""
    tree = Tree(branching, 0, controller or static(len(laws)), 99, GREEDY, None)
    for level in laws:
        if tree.stop:
            break
        tree.grow(torch.tensor(level, dtype=torch.float64).log())
    return tree


def test_the_most_probable_paths_are_kept():
    first = [[0.6, 0.3, 0.1]]
    second, third = [[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]], [0.4, 0.3, 0.3]
    tree = grown([first, second], Branching(4, 2))
    # Paths of two tokens: 0.6 * 0.5 = 0.3 and 0.3 * 0.9 = 0.27 before 0.6 * 0.4 = 0.24.
    assert [(tree.parents[node], tree.tokens[node]) for node in tree.kept] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert grown([first, second], Branching(3, 2)).kept == [1, 2, 3]
    assert grown([first, [*second, third]], Branching(4, 3)).kept == [1, 2, 4, 5]


def test_a_level_that_cannot_be_among_the_best_is_not_drafted():
    tree = grown([[[0.5, 0.4, 0.1]], [[0.4, 0.3, 0.3]] * 2, [[1.0, 0, 0]]], Branching(2, 2))
    # After the first level both nodes are kept; the second, at most 0.2, comes too late for both.
    assert (tree.stop, tree.kept, tree.depth) == ("nodes", [1, 2], 1)


def test_a_fixed_tree_takes_the_ranks_it_names():
    paths = ((0,), (2,), (0, 1), (2, 0))
    tree = grown([[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]], Branching(4, paths=paths))
    # The third candidate is 2 at first; below, 2 is the first (0.2 * 0.7) and 1 the second (0.5 * 0.2).
    assert [(tree.parents[node], tree.tokens[node]) for node in tree.kept] == [(0, 0), (0, 2), (2, 2), (1, 1)]
    assert tree.stop == "k_max"
    deeper = grown([[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]], Branching(4, paths=paths), static(9))
    assert (deeper.stop, deeper.depth) == ("nodes", 2)


def test_the_controller_is_asked_once_a_level_about_its_best_node():
    controller, seen = make_controller({"name": "confidence", "tau": 0.0, "k_max": 3}), []
    keep = controller.keep_drafting
    controller.keep_drafting = lambda signal: seen.append(signal) or keep(signal)
    law = [0.6, 0.4]
    tree = grown([[law], [law, [0.95, 0.05]], [law, law]], Branching(6, 2), controller)
    entropies = [-sum(p * math.log(p) for p in part) for part in (law, [0.95, 0.05])]
    # 0.4 * 0.95 is more than 0.6 * 0.6.
    assert seen == [
        Signal(1, pytest.approx(0.6), pytest.approx(0.6), pytest.approx(entropies[0])),
        Signal(2, pytest.approx(0.95), pytest.approx(0.95), pytest.approx(entropies[1])),
    ]
    assert (tree.stop, tree.depth) == ("k_max", 3)


def test_controllers_learn_levels_not_nodes():
    target, controller, told = tiny_target(), static(3), []
    controller.update = lambda *learnt: told.append(learnt)
    found = generate(
        target,
        PROMPT,
        drafter=exit_drafter(target, 2),
        controller=controller,
        branching=Branching(9, 3),
        max_new_tokens=30,
    )
    assert {r.drafted for r in found.rounds[:-3]} == {9}
    assert max(drafted for drafted, *_ in told) <= 3
    assert [learnt[1:] for learnt in told] == [(r.accepted, r.stop) for r in found.rounds]


# ---- typical acceptance ---------------------------------------------------------------------------------------------


def test_typical_acceptance_by_hand():
    sure, unsure = [0.9, 0.06, 0.04], [0.4, 0.35, 0.25]
    laws = torch.tensor([unsure, sure, unsure, sure], dtype=torch.float64)
    entropy = -sum(p * math.log(p) for p in unsure)
    typical = Typical(epsilon=0.3, delta=0.9)
    least = min(0.3, 0.9 * math.exp(-entropy))
    assert 0.25 < least < 0.35
    # Node 1 (p 0.35) and node 3 (0.06 after it, of at least 0.3); node 2 (0.25); node 4 below node 3.
    tree = planted_tree([(0, 1), (0, 2), (1, 1), (3, 0)])
    assert typical_path(tree, [0, 1, 2, 3, 4], torch.cat((laws, laws[:1])), typical) == [1]
    # Equal depth: the more probable of two that pass.
    tree = planted_tree([(0, 1), (0, 0), (1, 0), (2, 0)])
    assert typical_path(tree, [0, 1, 2, 3, 4], laws[[0, 1, 1, 0, 0]], typical) == [2, 4]
    assert typical_path(tree, [0], laws[:1], typical) == []


def test_typical_acceptance_takes_more_and_is_greedy_at_temperature_zero():
    target = tiny_target()
    decode = {"drafter": exit_drafter(target, 2), "controller": static(4), "max_new_tokens": 100, "seed": 1}
    exact, typical = Branching(12, 3), Branching(12, 3, typical=Typical(0.01, 0.1))
    rounds = [
        len(generate(target, PROMPT, branching=branching, sampling=Sampling(1.0), **decode).rounds)
        for branching in (exact, typical)
    ]
    assert rounds[1] < rounds[0]
    vanilla = generate(target, PROMPT, max_new_tokens=100).tokens
    assert generate(target, PROMPT, branching=typical, **decode).tokens == vanilla


def test_the_own_token_after_a_typical_path_follows_its_end():
    tree = planted_tree([(0, 1), (1, 2)], Sampling(1.0), typical=Typical(0.3, 0.9))
    logits = torch.full((3, 4), -40.0)
    for row, token in enumerate([1, 2, 3]):
        logits[row, token] = 40.0
    assert accept_path(tree, [0, 1, 2], Pass(logits, logits, logits)) == ([1, 2], 3)
