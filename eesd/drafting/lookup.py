"""Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): copies what followed the same tokens.

The last n tokens are looked up in prompt and output, n from `max_ngram` down to `min_ngram`, and what follows their
first occurrence is the draft: with `min_ngram` 1 the rule of Hugging Face's `prompt_lookup_num_tokens`, whose number of
tokens is our controller `static`. Nothing is computed, so the draft ends where the copied text does.

    lookup: {drafter: lookup, max_ngram: 2, controller: {name: static, k: 10}}

Before another drafter it takes the rounds in which it finds something, under a controller of its own; the other one
drafts the rest. SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (arXiv 2411.04975) join retrieval and a
drafter in this way.

    eesd_lookup: {drafter: exit_head, head: deep1, controller: {name: draft_verify}, lookup: {min_ngram: 2}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eesd.drafting.base import DRAFTERS, Draftable, Drafter, Prompt, Verified
from eesd.models.transformer import Transformer
from eesd.ngrams import NgramIndex


@DRAFTERS.register("lookup")
class LookupDrafter(Drafter):
    """Copies the continuation of the first occurrence of the longest matching n-gram."""

    def __init__(self, max_ngram: int, min_ngram: int = 1) -> None:
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> LookupDrafter:
        """Needs `max_ngram`, the longest sequence of tokens that is looked up; takes `min_ngram`, the shortest."""
        return cls(settings["max_ngram"], settings.get("min_ngram", 1))

    def begin(self, prompt: Prompt) -> None:
        """Index the prompt."""
        self.known = NgramIndex(self.min_ngram, self.max_ngram)
        for token in prompt.tokens:
            self.known.append(token)

    def proposes(self, pending: int, slot: int) -> bool:
        """Whether the n-gram at the end occurred before."""
        return self._find(pending, slot) is not None

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        """Copy until the chain stops or the known text ends."""
        start = self._find(pending, slot)
        for token in () if start is None else self.known.tokens[start:]:
            if chain.stop:
                break
            chain.copy(token)

    def accept(self, verified: Verified) -> None:
        """Index accepted tokens; the target's own comes with the next draft."""
        for token in verified.drafted[: verified.accepted]:
            self.known.append(token)

    def _find(self, pending: int, slot: int) -> int | None:
        """Where what is copied after the last settled token begins; looked up once a round."""
        if len(self.known.tokens) == slot:
            self.known.append(pending)
            self.start = self.known.match()
        return self.start
