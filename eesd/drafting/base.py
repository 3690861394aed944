"""What a drafter is.

A drafter continues the last accepted token by a chain of tokens and hands over the states verification can go on
from. It may share the first `exit_layer` layers with the target. When to stop is decided by the chain it is given,
not by the drafter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from eesd.models.cache import KVCache
from eesd.models.transformer import Transformer
from eesd.registry import Registry


class Draftable(Protocol):
    """The chain a drafter fills: `extend` takes draft logits and returns the token drawn; `stop` ends the draft."""

    stop: str

    def extend(self, logits: Tensor, vocabulary: Tensor | None = None) -> int:
        """Add the next token; row r of the logits stands for token `vocabulary[r]`, or r itself."""


class Drafter(ABC):
    """Base of all drafters. One object serves many prompts, one at a time."""

    exit_layer: int = 0
    vocabulary: Tensor | None = None  # token id of every draft row; None: rows are token ids

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, fingerprint: str) -> Drafter:
        """The drafter that a method's settings describe, for a target whose weights have this fingerprint."""
        return cls()

    @abstractmethod
    def begin(self, target: Transformer, cache: KVCache, states: Tensor) -> None:
        """Begin a prompt. states [1, prompt, hidden]: the prompt after `exit_layer` layers."""

    @abstractmethod
    def draft(self, chain: Draftable, pending: int, slot: int) -> Tensor | None:
        """Extend the chain until it stops. `pending` is the last accepted token, at cache slot `slot`.

        Returns states [1, n, hidden] after `exit_layer` layers of `pending` and the first n - 1 drafted tokens.
        """

    def accept(self, accepted: int, states: Tensor) -> None:
        """Learn what verification kept. states [1, drafted + 1, hidden] after `exit_layer` layers."""


DRAFTERS: Registry[type[Drafter]] = Registry("drafter")
