"""A tree of drafted tokens: several guesses at every depth, verified in one pass, of which one path is accepted.

    tree = Tree(Branching(nodes=12, width=4), pending, controller, budget, sampling, generator)
    states = drafter.draft_tree(tree, slot)
    verified = verify_tree(passes, tree, states, slot)          # the accepted path first, then the rest

Nodes are numbered as they are made, node 0 being the last settled token; node i lies in cache slot `slot` + i at the
position of its depth, and sees the settled text and its ancestors (tree attention: SpecInfer, arXiv 2305.09781; Medusa,
arXiv 2401.10774). The tree grows level by level, best first: of all candidates for a level the `width` most probable,
and of all levels the `nodes` most probable, by the product of draft probabilities along the path (EAGLE-2, arXiv
2406.16858). A fixed tree (`paths`) takes the candidates of the ranks it names instead. The controller sees a level as
it sees a token of a chain, by its most probable node, and what was accepted of it as the accepted depth.

Candidates are chosen without a random number, so their draft law is one-hot. Multi-round rejection (accept child x with
probability p(x), else remove x from p and renormalise) then is the same as drawing one token from p and following the
child that has it, if any: what comes out follows p whatever the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eesd.control import Controller, Signal
from eesd.decoding.chain import Draft, read_signal
from eesd.decoding.sampling import Sampling, draw, probabilities
from eesd.drafting import Verified
from eesd.models.passes import Pass, Passes
from eesd.models.transformer import Transformer

if TYPE_CHECKING:
    from eesd.models.engine import Engine
    from eesd.models.graphs import GraphEngine

Path = tuple[int, ...]


@dataclass(frozen=True)
class Typical:
    """Typical acceptance of Medusa, which changes the output's law.

    A token passes if p(x) > min(epsilon, delta exp(-H)), with H the entropy of p in nats. Of the paths whose tokens all
    pass, the longest is accepted, the most probable of equally long ones. Greedy decoding accepts what is the target's
    own choice, as everywhere.
    """

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Branching:
    """Which trees are drafted, and how they are accepted.

    nodes: drafted tokens that are verified at most. width: new nodes of a level at most. paths: a fixed tree instead;
    node (0, 2) continues the best first candidate with the third candidate of the second level. typical: None for
    lossless acceptance.
    """

    nodes: int
    width: int = 1
    paths: tuple[Path, ...] = ()
    typical: Typical | None = None

    def room(self, levels: int) -> int:
        """Cache slots that a draft of so many levels may take."""
        return len(self.paths) or self.width * levels

    @cached_property
    def ranks(self) -> Mapping[Path, list[int]]:
        """Of a fixed tree: the ranks of every node's children."""
        found: dict[Path, list[int]] = {}
        for path in sorted(self.paths):
            found.setdefault(path[:-1], []).append(path[-1])
        return found


class Candidate(NamedTuple):
    """A token that may become a node.

    share: its q. score: log of the product of q from the root. rank: among its parent's candidates. row: of the logits.
    """

    score: float
    share: float
    parent: int
    token: int
    rank: int
    row: int


class Tree(Draft):
    """Handed to the drafter, which calls `grow` with draft logits of the `frontier` until `stop` is set.

    tokens, parents, depths, scores: of every node that was made. lines: every node's ancestors and itself, from the
    root. kept: the nodes that are verified, in increasing order, without the root. expanded: all frontiers so far.
    stop: as of a chain, or `nodes` when no further level could be among the best `nodes`.
    """

    def __init__(
        self,
        branching: Branching,
        pending: int,
        controller: Controller,
        budget: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        lap: Callable[[str], None] = lambda part: None,
        engine: Engine | GraphEngine | None = None,
    ) -> None:
        super().__init__(controller, budget, sampling, generator, lap, engine)
        self.branching = branching
        self.tokens, self.parents, self.depths, self.scores = [pending], [-1], [0], [0.0]
        self.lines: list[Path] = [(0,)]
        self.ranks: list[Path] = [()]
        self.frontier, self.expanded, self.kept = [0], [], []
        self.linear = True

    @property
    def depth(self) -> int:
        """Levels that are verified."""
        return max((self.depths[node] for node in self.kept), default=0)

    def grow(self, logits: Tensor, vocabulary: Tensor | None = None) -> None:
        """Add the level below the frontier; row r of the logits stands for token `vocabulary[r]`, or r itself.

        logits [n, rows] of the n frontier nodes, or [1, rows] for all of them. The candidates are read from the device:
        once for every level.
        """
        level = self.depths[self.frontier[0]] + 1
        laws = probabilities(logits) if self.sampling.greedy else self.sampling.probabilities(logits)
        chosen = self._choose(self._candidates(logits, laws, vocabulary))
        self.expanded += self.frontier
        made = [self._add(candidate) for candidate in chosen]
        self.kept = self._best()
        self.frontier = [node for node in made if node in self.kept and self._may_have_children(node)]
        if level < self.limit and not self._may_grow():
            self.stop = "nodes"
            return
        self._ask(level, lambda: self._signal(level, chosen[0], logits, laws))

    def place(
        self, nodes: Sequence[int], slot: int, target: Transformer
    ) -> tuple[int | Tensor, Tensor | None, Tensor | None]:
        """Cache slots [1, n], positions [1, n] and mask [1, 1, n, live] of these nodes.

        The first slot alone where all nodes made so far are a chain: what is computed then is what chains compute, in
        the same order.
        """
        if self.linear and list(nodes) == list(range(nodes[0], nodes[-1] + 1)):
            return slot + nodes[0], None, None
        count = max(nodes) + 1
        seen = torch.ones(len(nodes), slot + count, dtype=torch.bool)
        seen[:, slot:] = torch.tensor([[other in self.lines[node] for other in range(count)] for node in nodes])
        slots = torch.tensor([[slot + node for node in nodes]])
        positions = torch.tensor([[slot + self.depths[node] for node in nodes]])
        if target.config.window is not None:
            keys = torch.tensor([*range(slot), *(slot + depth for depth in self.depths[:count])])
            seen &= keys > positions[0, :, None] - target.config.window
        return slots.to(target.device), positions.to(target.device), seen[None, None].to(target.device)

    def _candidates(self, logits: Tensor, laws: Tensor, vocabulary: Tensor | None) -> list[Candidate]:
        """The most probable tokens after every frontier node, as many as the level could take."""
        fixed = [self.branching.ranks.get(self.ranks[node], []) for node in self.frontier]
        count = 1 + max(map(max, filter(None, fixed))) if self.branching.paths else self.branching.width
        count = min(count, logits.shape[-1])
        # Of several greatest logits topk may give any; one candidate is the one that chains take.
        rows = logits.argmax(-1, keepdim=True) if count == 1 else logits.topk(count).indices
        ids = rows if vocabulary is None else vocabulary[rows]
        ids, shares = torch.stack((ids.double(), laws.gather(-1, rows).double())).tolist()
        found = []
        for i, node in enumerate(self.frontier):
            row = i if len(logits) > 1 else 0
            for rank, (token, share) in enumerate(zip(ids[row], shares[row], strict=True)):
                score = self.scores[node] + (math.log(min(share, 1.0)) if share > 0 else -math.inf)
                if not self.branching.paths or rank in fixed[i]:
                    found.append(Candidate(score, share, node, int(token), rank, row))
        return found

    def _choose(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that become nodes, the most probable first."""
        ordered = sorted(candidates, key=lambda candidate: -candidate.score)
        if self.branching.paths:
            return ordered
        # Sampling settings may leave a token no probability.
        return [candidate for candidate in ordered[: self.branching.width] if candidate.score > -math.inf]

    def _add(self, candidate: Candidate) -> int:
        node, parent = len(self.tokens), candidate.parent
        self.linear = self.linear and parent == node - 1
        self.tokens.append(candidate.token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(candidate.score)
        self.lines.append((*self.lines[parent], node))
        self.ranks.append((*self.ranks[parent], candidate.rank))
        return node

    def _best(self) -> list[int]:
        """The `nodes` most probable nodes; earlier ones among equals, so that no node is kept without its parent."""
        made = sorted(range(1, len(self.tokens)), key=lambda node: -self.scores[node])
        return sorted(made if self.branching.paths else made[: self.branching.nodes])

    def _may_have_children(self, node: int) -> bool:
        return not self.branching.paths or self.ranks[node] in self.branching.ranks

    def _may_grow(self) -> bool:
        """Whether a node of another level could be kept: no node is more probable than its parent."""
        if not self.frontier or self.branching.paths or len(self.kept) < self.branching.nodes:
            return bool(self.frontier)
        return max(self.scores[node] for node in self.frontier) > min(self.scores[node] for node in self.kept)

    def _signal(self, level: int, best: Candidate, logits: Tensor, laws: Tensor) -> Signal:
        """What the controller may look at: the level's most probable node, and the law it is from."""
        if not self.controller.uses_signal:
            return Signal(level, math.nan, math.nan, math.nan)
        law = None if self.sampling.greedy else laws[best.row]
        confidence, greatest, entropy = read_signal(logits[best.row], logits[best.row].argmax(), law, self.engine)
        # The best node is its law's greatest but for the fixed trees that leave it out.
        share = greatest if law is None and best.rank == 0 else best.share
        return Signal(level, confidence, share, entropy)


def verify_tree(passes: Passes, tree: Tree, states: Tensor | None, slot: int) -> Verified:
    """Run the layers that the kept nodes have not had yet, accept one path, move its entries to where a chain's are.

    states [1, n, hidden]: of `tree.expanded` after the drafter's exit layer, None where none were computed.
    """
    ran = [] if states is None else [node for node in tree.expanded if node == 0 or node in tree.kept]
    nodes = [*ran, *(node for node in (0, *tree.kept) if node not in ran)]
    if ran and ran != tree.expanded:
        states = states[:, [tree.expanded.index(node) for node in ran]]
    tokens = [tree.tokens[node] for node in nodes]
    found = passes.run(tokens, states, *tree.place(nodes, slot, passes.model))
    path, token = accept_path(tree, nodes, found)
    if path != list(range(1, len(path) + 1)):
        passes.cache.move([slot + node for node in path], slot + 1)
    order = [0, *path, *(node for node in tree.kept if node not in path)]
    rows = slice(None) if order == nodes else [nodes.index(node) for node in order]
    drafted = [tree.tokens[node] for node in order[1:]]
    return Verified(tree.tokens[0], drafted, len(path), token, found.states[:, rows], found.final[:, rows])


def accept_path(tree: Tree, nodes: Sequence[int], found: Pass) -> tuple[list[int], int]:
    """The accepted nodes from the first level on, and the target's token after them.

    found: of these nodes, the root first and none before its parent.
    """
    sampling, row = tree.sampling, {node: i for i, node in enumerate(nodes)}
    if sampling.greedy:
        best = found.choices()
        best = best.tolist() if isinstance(best, Tensor) else best
        return follow(tree, lambda node: best[row[node]])

    def choose(node: int) -> int:
        return int(draw(sampling.probabilities(found.logits[row[node]]), tree.generator))

    typical = tree.branching.typical
    if typical is None:
        return follow(tree, choose)
    path = typical_path(tree, nodes, sampling.probabilities(found.logits), typical)
    return path, choose(path[-1] if path else 0)


def follow(tree: Tree, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Go from the root to the child that has the token the target chooses, as long as there is one."""
    children = {(tree.parents[node], tree.tokens[node]): node for node in tree.kept}
    path, node = [], 0
    while True:
        token = choose(node)
        child = children.get((node, token))
        if child is None:
            return path, token
        path.append(child)
        node = child


def typical_path(tree: Tree, nodes: Sequence[int], laws: Tensor, typical: Typical) -> list[int]:
    """The path that typical acceptance keeps; laws [n, vocab]: p after each node, in an order as for `accept_path`."""
    if len(nodes) == 1:
        return []
    entropy = torch.special.entr(laws).sum(-1)
    least = (typical.delta * torch.exp(-entropy)).clamp(max=typical.epsilon)
    row = {node: i for i, node in enumerate(nodes)}
    parents = torch.tensor([row[tree.parents[node]] for node in nodes[1:]], device=laws.device)
    tokens = torch.tensor([tree.tokens[node] for node in nodes[1:]], device=laws.device)
    shares = laws[parents, tokens]
    passed, logs = (shares > least[parents]).tolist(), shares.log().tolist()
    accepted = {0: 0.0}  # log of the product of p
    for node, good, log in zip(nodes[1:], passed, logs, strict=True):
        if good and tree.parents[node] in accepted:
            accepted[node] = accepted[tree.parents[node]] + log
    best = max(accepted, key=lambda node: (tree.depths[node], accepted[node]))
    return list(tree.lines[best][1:])
