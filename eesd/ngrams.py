"""Where the n-grams of a growing text first occurred: what prompt lookup copies by, live and in replay.

    known = NgramIndex(min_ngram=2, max_ngram=4)
    for token in tokens:
        known.append(token)
    known.match()        # where the text begins that followed the longest n-gram at the end when it first occurred

And how rows and replays mark a round that copied. Imports no torch, because replays and tables use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOOKED_UP = "lookup"  # fourth entry of a round that `lookup` drafted before the method's drafter, in rows and replays


def is_looked_up(one: Sequence[Any]) -> bool:
    """Whether a round, [drafted, accepted, stop] and perhaps LOOKED_UP, was drafted by lookup."""
    return list(one[3:]) == [LOOKED_UP]


class NgramIndex:
    """A text and its n-grams of `min_ngram` to `max_ngram` tokens."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self.tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # where the text after the first occurrence begins

    def append(self, token: int) -> None:
        """Add a token: only now the n-grams before it have a continuation."""
        end = len(self.tokens)
        for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
            self._following.setdefault(tuple(self.tokens[end - n :]), end)
        self.tokens.append(token)

    def match(self) -> int | None:
        """Where the text after the first occurrence of the longest known n-gram at the end begins; None without one."""
        for n in range(min(self.max_ngram, len(self.tokens) - 1), self.min_ngram - 1, -1):
            start = self._following.get(tuple(self.tokens[-n:]))
            if start is not None:
                return start
        return None
