"""The tree that Medusa heads draft: fixed, chosen from how often each candidate of each head was right.

    paths = choose_tree(accuracies, nodes=15)           # ((0,), (1,), (0, 0), ...): ranks of candidates, head by head
    nodes = best_nodes(accuracies, verify_s, draft_s)   # what pays on a machine, by its cost table

accuracies[j][i], measured on calibration prompts (`candidate_accuracies`) and kept in the card of the heads, is the
share of positions where candidate i of head j is the target's token. Heads are taken as independent, as in the paper: a
node is accepted with the product of the accuracies along its path, and a tree yields the sum over its nodes. As no
node is more probable than its parent, the most probable nodes are a tree, and no tree of as many nodes yields more.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eesd.errors import EesdError

Accuracies = Sequence[Sequence[float]]


def ranked(accuracies: Accuracies, nodes: int) -> list[tuple[tuple[int, ...], float]]:
    """The `nodes` paths of greatest expected acceptance, with it, greatest first; fewer where there are no more."""
    found: list[tuple[tuple[int, ...], float]] = []
    waiting = [(-share, (rank,)) for rank, share in enumerate(accuracies[0])] if accuracies else []
    heapq.heapify(waiting)
    while waiting and len(found) < nodes:
        negative, path = heapq.heappop(waiting)
        found.append((path, -negative))
        if len(path) < len(accuracies):
            for rank, share in enumerate(accuracies[len(path)]):
                heapq.heappush(waiting, (negative * share, (*path, rank)))
    return found


def choose_tree(accuracies: Accuracies, nodes: int) -> tuple[tuple[int, ...], ...]:
    """The tree of `nodes` nodes that is expected to yield most tokens."""
    return tuple(path for path, _ in ranked(accuracies, nodes))


def best_nodes(accuracies: Accuracies, verify_s: Sequence[float], draft_s: float) -> int:
    """The number of nodes that gives most tokens per second, at least 1.

    verify_s[n]: seconds of verifying n nodes and the last settled token. draft_s: of a draft, however large.
    """
    tokens, best, most = 1.0, 1, -math.inf
    for n, (_, share) in enumerate(ranked(accuracies, len(verify_s) - 1), 1):
        tokens += share
        speed = tokens / (draft_s + verify_s[n])
        if speed > most:
            best, most = n, speed
    return best


def accuracies_of(card: Mapping[str, Any] | None, where: Path | str) -> Accuracies:
    """The accuracies in the card of Medusa heads; EesdError that says `where` if there are none."""
    found = (card or {}).get("accuracies")
    shares = [share for head in found for share in head] if isinstance(found, list) and all(found) else []
    if not shares or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        raise EesdError(
            f"{where}: no accuracies of the candidates of these heads, which a tree is chosen by. Train them again."
        )
    return found
