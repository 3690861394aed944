"""The tree of Medusa heads: the best of its size by brute force, the size that pays, and cards without accuracies."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eesd.drafting.medusa_tree import accuracies_of, best_nodes, choose_tree, ranked
from eesd.errors import EesdError

SHARE = st.floats(0, 1)


def expected(accuracies, paths) -> float:
    total = 0.0
    for path in paths:
        share = 1.0
        for head, rank in enumerate(path):
            share *= accuracies[head][rank]
        total += share
    return total


@given(st.lists(st.lists(SHARE, min_size=2, max_size=2), min_size=2, max_size=2), st.integers(1, 5))
def test_no_tree_of_as_many_nodes_yields_more(accuracies, nodes):
    every = [path for depth in (1, 2) for path in product(range(2), repeat=depth)]
    trees = [
        tree
        for tree in combinations(every, nodes)
        if all(len(path) == 1 or path[:-1] in tree for path in tree)  # a node needs its parent, not its elder siblings
    ]
    chosen = choose_tree(accuracies, nodes)
    assert len(set(chosen)) == nodes
    assert all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    best = max(expected(accuracies, tree) for tree in trees)
    assert expected(accuracies, chosen) == pytest.approx(best)
    assert sum(share for _, share in ranked(accuracies, nodes)) == pytest.approx(best)


def test_small_trees_are_the_beginning_of_larger_ones():
    accuracies = [[0.5, 0.2, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.0]]
    trees = [choose_tree(accuracies, nodes) for nodes in range(1, 12)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in pairwise(trees))
    assert trees[3] == ((0,), (0, 0), (1,), (0, 1))
    assert choose_tree([[0.5]], 4) == ((0,),)


def test_the_number_of_nodes_is_what_gives_most_tokens_per_second():
    accuracies = [[0.5, 0.25, 0.1]]
    # 1.5 tokens in 2 + 10, 1.75 in 2 + 11, 1.85 in 2 + 12 seconds.
    assert best_nodes(accuracies, [9.0, 10.0, 11.0, 12.0], 2.0) == 2
    assert best_nodes(accuracies, [9.0, 10.0, 10.1, 10.2], 2.0) == 3
    assert best_nodes(accuracies, [9.0, 10.0, 15.0, 20.0], 2.0) == 1
    # Dear drafts are spread over more nodes.
    assert best_nodes(accuracies, [9.0, 10.0, 11.0, 12.0], 20.0) == 3


@pytest.mark.parametrize("card", [None, {}, {"accuracies": []}, {"accuracies": [[]]}, {"accuracies": [[0.5], [1.5]]}])
def test_cards_without_accuracies_are_refused(card):
    with pytest.raises(
        EesdError, match=r"card\.json: no accuracies of the candidates of these heads.*Train them again"
    ):
        accuracies_of(card, Path("card.json"))
    assert accuracies_of({"accuracies": [[0.5, 0.5], [1, 0]]}, "x") == [[0.5, 0.5], [1, 0]]
