"""What a drafter is.

A drafter continues the last accepted token by a chain of tokens, or by a tree if it can, and hands over the states
verification can go on from. It may share the first `exit_layer` layers with the target. When to stop is decided by the
chain or tree it is given, not by the drafter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.transformer import Transformer
from eesd.registry import Registry

# Slots after a known text that its drafts may use.
DRAFT_ROOM = 64
# Positions of a text drafted from at once.
TEXT_BATCH = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt of P tokens that the target has processed.

    cache: the target's, holding the prompt. states [1, P, hidden]: after the drafter's `exit_layer` layers. final
    [1, P, hidden]: after all layers, before the last norm.
    """

    target: Transformer
    cache: KVCache
    tokens: Sequence[int]
    states: Tensor
    final: Tensor


@dataclass(frozen=True)
class Verified:
    """A round that the target has verified: the last settled token, then n drafted ones, went through all layers.

    pending: that settled token. own: whether the drafter that is told drafted them, and not another one. drafted: the
    n drafted tokens, of which the first `accepted` are kept (of a tree, the accepted path comes first, then all
    others). token: the target's own, which follows.
    states [1, n + 1, hidden]: after the drafter's `exit_layer` layers. final [1, n + 1, hidden]: after all layers,
    before the last norm.
    """

    pending: int
    drafted: Sequence[int]
    accepted: int
    token: int
    states: Tensor
    final: Tensor
    own: bool = True


class Draftable(Protocol):
    """The chain a drafter fills: `extend` takes draft logits and returns the token drawn; `stop` ends the draft.

    limit: the most tokens that it takes.
    """

    limit: int
    stop: str
    tokens: list[int]

    def extend(self, logits: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Add the next token; row r of the logits stands for token `vocabulary[r]`, or r itself.

        The token comes as a scalar on the device; reading it (`int`) would wait for the GPU.
        """

    def copy(self, token: int) -> int:
        """Add a token that is certain: its draft law is one-hot."""


class Growable(Protocol):
    """The tree a drafter grows: `grow` adds the level below the nodes of `frontier`; `stop` ends the draft.

    Node 0 is the last settled token. tokens, parents: of every node. linear: no node has a sibling.
    """

    stop: str
    frontier: list[int]
    tokens: list[int]
    parents: list[int]
    linear: bool

    def grow(self, logits: Tensor, vocabulary: Tensor | None = None) -> None:
        """Choose the next level from draft logits [n, rows] of the n frontier nodes, or [1, rows] for all of them."""

    def place(
        self, nodes: Sequence[int], slot: int, target: Transformer
    ) -> tuple[int | Tensor, Tensor | None, Tensor | None]:
        """Cache slots, positions and mask of these nodes, as `Transformer.run` takes them; node 0 has slot `slot`."""


class Drafter(ABC):
    """Base of all drafters. One object serves many prompts, one at a time."""

    exit_layer: int = 0
    vocabulary: Tensor | None = None  # token id of every draft row; None: rows are token ids
    card: Mapping[str, Any] | None = None  # of its trained head

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> Drafter:
        """The drafter that a method's settings describe, for the target loaded from this folder."""
        return cls()

    @abstractmethod
    def begin(self, prompt: Prompt) -> None:
        """Begin a prompt, which all layers of the target have processed."""

    def proposes(self, pending: int, slot: int) -> bool:
        """Whether it has anything to draft after the last settled token `pending`, at cache slot `slot`."""
        return True

    @abstractmethod
    def draft(self, chain: Draftable, pending: int, slot: int) -> Tensor | None:
        """Extend the chain until it stops, or less far if there is nothing to propose.

        `pending` is the last settled token, at cache slot `slot`.
        Returns states [1, n, hidden] after `exit_layer` layers of `pending` and the first n - 1 drafted tokens.
        """

    def draft_tree(self, tree: Growable, slot: int) -> Tensor | None:
        """Grow the tree until it stops, or less far; its node 0, the last settled token, is at cache slot `slot`.

        Returns states [1, n, hidden] after `exit_layer` layers of all nodes that were in the frontier, in that order;
        None where nothing is shared with verification.
        """
        raise EesdError(f"{type(self).__name__} drafts chains, no trees. Remove `tree` from the method.")

    def accept(self, verified: Verified) -> None:
        """Learn what verification kept, of its own draft or of another drafter's."""

    def draft_text(
        self, target: Transformer, tokens: Sequence[int], prompt_tokens: int, chains: Sequence[Draftable]
    ) -> None:
        """Draft after all output tokens of a text but the last: chains[t] begins after tokens[prompt_tokens + t].

        This walks through the text one token at a time, each a round of which nothing was accepted.
        """
        cache = target.new_cache(len(tokens) + DRAFT_ROOM)

        def process(part: Sequence[int], slot: int) -> tuple[Tensor, Tensor]:
            states = target.embed(torch.tensor([part], device=target.device))
            states = target.run(states, slice(0, self.exit_layer), cache, slot)
            return states, target.run(states, slice(self.exit_layer, None), cache, slot)

        prompt = tokens[:prompt_tokens]
        self.begin(Prompt(target, cache, prompt, *process(prompt, 0)))
        for slot, chain in enumerate(chains, prompt_tokens):
            self.draft(chain, tokens[slot], slot)
            # Rows of rejected tokens mean nothing; the settled token's stand in for them.
            rows = [states.expand(1, len(chain.tokens) + 1, -1) for states in process([tokens[slot]], slot)]
            self.accept(Verified(tokens[slot], chain.tokens, 0, tokens[slot + 1], *rows))


DRAFTERS: Registry[type[Drafter]] = Registry("drafter")
