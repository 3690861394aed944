"""Prompt lookup before the drafter of a trace: what it would copy after every output token, found without a model.

    lookup = Lookup.of({"min_ngram": 2, "max_ngram": 4, "controller": {"name": "hf_heuristic"}})
    lookup.copies(item).lengths[5]      # tokens that could be copied after output token 5; 0 leaves it to the drafter

What is copied depends on the text alone, so a trace of any drafter serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eesd.control import Controller, make_controller
from eesd.errors import EesdError
from eesd.ngrams import NgramIndex
from eesd.replay.trace import TracedItem, matching


@dataclass(frozen=True)
class Copies:
    """After every output token but the last: tokens that could be copied, and how many of them are the target's."""

    lengths: list[int]
    matches: list[int]


@dataclass(frozen=True)
class Lookup:
    """`lookup` of a method: how n-grams are looked up, and the controller that says how much is copied."""

    controller: Controller
    min_ngram: int
    max_ngram: int

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Lookup | None:
        """From `lookup` of a method with its defaults filled in, None if it has none; the controller is a fresh one."""
        if settings is None:
            return None
        missing = [key for key in ("min_ngram", "max_ngram", "controller") if key not in settings]
        if missing:
            raise EesdError(f"lookup without {', '.join(missing)}. Give it, as rows of the bench do.")
        return cls(make_controller(settings["controller"]), settings["min_ngram"], settings["max_ngram"])

    def copies(self, item: TracedItem) -> Copies:
        """Copies of one output, as long as the controller may ask for; searched once for all replays of the item."""
        key = (self.min_ngram, self.max_ngram, self.controller.k_max)
        if key not in item.copied:
            item.copied[key] = _search(item, *key)
        return item.copied[key]


def _search(item: TracedItem, min_ngram: int, max_ngram: int, k_max: int) -> Copies:
    known, text = NgramIndex(min_ngram, max_ngram), [*item.output, *item.beyond]
    for token in item.prompt:
        known.append(token)
    lengths, matches = [], []
    for t, token in enumerate(item.output[:-1], 1):
        known.append(token)
        start = known.match()
        found = [] if start is None else known.tokens[start : start + k_max]
        lengths.append(len(found))
        matches.append(matching(found, text[t : t + len(found)]))
    return Copies(lengths, matches)
