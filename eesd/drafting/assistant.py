"""A smaller model with the target's tokenizer drafts (Leviathan et al. 2023, Chen et al. 2023).

    assistant: {drafter: assistant, assistant: smollm2-135m, controller: {name: static, k: 5}}

It shares nothing with the target: its own layers, head and cache, and verification starts at layer 0. The cache holds
accepted tokens only once a round is over: rejected ones are overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eesd.drafting.base import DRAFTERS, TEXT_BATCH, Draftable, Drafter, Prompt, Verified
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target, load_tokenizer
from eesd.models.passes import Passes
from eesd.models.transformer import Transformer


def check_same_tokenizer(model_dir: Path, assistant_dir: Path) -> None:
    """EesdError unless every token id that both models have is the same token in both."""
    ours, theirs = ({i: t for t, i in load_tokenizer(path).get_vocab().items()} for path in (model_dir, assistant_dir))
    differ = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if differ:
        token = differ[0]
        raise EesdError(
            f"{assistant_dir}: token {token} is {theirs[token]!r} here and {ours[token]!r} in {model_dir}; "
            f"{len(differ)} ids differ. An assistant needs the tokenizer of its target: choose one of the same family."
        )


@DRAFTERS.register("assistant")
class AssistantDrafter(Drafter):
    """Drafts a chain with another model, up to the end of its context or the first token it cannot read."""

    def __init__(self, assistant: Transformer, target: Transformer) -> None:
        self.assistant = assistant
        rows, tokens = assistant.config.vocab_size, target.config.vocab_size
        # Rows behind the last token pad a vocabulary: models of one family may differ in their number.
        self.rows = min(rows, tokens)
        self.vocabulary = None if self.rows == tokens else torch.arange(self.rows, device=target.device)
        self.cache: KVCache | None = None

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> AssistantDrafter:
        """Load the model in folder `assistant_path`, in the target's dtype and on its device."""
        path = Path(settings["assistant_path"])
        check_same_tokenizer(model_dir, path)
        assistant = load_target(path, str(target.dtype).removeprefix("torch."), str(target.device))
        if target.engine:
            attach_engine(assistant)
        return cls(assistant, target)

    def begin(self, prompt: Prompt) -> None:
        """Let the assistant read all of the prompt."""
        capacity = prompt.cache.capacity
        if self.cache is None or self.cache.capacity < capacity:
            self.cache = self.assistant.new_cache(capacity)
        self.unseen: list[int] = []  # settled tokens that the assistant has not read yet
        self.follows = len(prompt.tokens) <= self.assistant.config.max_positions and max(prompt.tokens) < self.rows
        if self.follows:
            self._read(prompt.tokens, 0)
        self.passes = Passes(self.assistant, self.cache)

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        """One pass of the whole assistant for every drafted token."""
        self.follows = self.follows and pending < self.rows
        self.unseen.append(pending)
        if not self.follows or chain.stop:
            return
        fresh, self.unseen = self.unseen, []
        if len(fresh) > TEXT_BATCH:  # after many rounds of another drafter; only the last one's logits matter
            self._read(fresh[:-1], slot + 1 - len(fresh))
            fresh = fresh[-1:]
        while not chain.stop and slot < self.assistant.config.max_positions:
            logits = self.passes.run(fresh, None, slot + 1 - len(fresh)).logits[-1, : self.rows]
            fresh, slot = [chain.extend(logits, self.vocabulary)], slot + 1

    def accept(self, verified: Verified) -> None:
        """The last token of a draft is the one the assistant has not read; it matters only if it was accepted. Of
        another drafter's round it has read nothing."""
        if not verified.own:
            settled = [verified.pending, *verified.drafted[: verified.accepted]]
            self.unseen += settled
            self.follows = self.follows and max(settled) < self.rows
        elif verified.drafted and verified.accepted == len(verified.drafted):
            self.unseen.append(verified.drafted[-1])

    def _read(self, tokens: Sequence[int], slot: int) -> None:
        """Run tokens at cache slots from `slot` on through all layers, for their keys and values."""
        ids = torch.tensor([tokens], device=self.assistant.device)
        self.assistant.run(self.assistant.embed(ids), slice(None), self.cache, slot)
