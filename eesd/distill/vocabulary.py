"""The draft vocabulary of a head in training: which tokens, and the row of each after every prompt of a batch.

ids = choose_vocabulary(traces, rows=2048, vocab_size=49152)      # [rows], most frequent first
words = PromptWords.of(ids, prompts, head_weight)                 # where every prompt brings tokens of its own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eesd.distill.padding import pad_rows
from eesd.distill.record import Trace
from eesd.drafting.vocabulary import prompt_vocabulary


def choose_vocabulary(traces: Sequence[Trace], rows: int | str, vocab_size: int) -> Tensor | None:
    """Token ids [rows] of the draft vocabulary, most frequent first, or None for `full`.

    The most frequent tokens of what is learnt to be predicted; where that has fewer different ones, those the teacher
    gave most mass, if it was recorded. (Drafting with frequent tokens alone: FR-Spec, arXiv 2502.14856.)
    """
    if rows == "full" or rows >= vocab_size:
        return None
    written = torch.cat([trace.tokens[trace.learnt_from :] for trace in traces])
    counts = torch.bincount(written, minlength=vocab_size).double()
    mass = torch.zeros(vocab_size, dtype=torch.float64)
    for trace in traces:
        if trace.teacher_ids is not None:
            mass.index_add_(0, trace.teacher_ids.flatten().long(), trace.teacher_probs.flatten().double())
    # A count outweighs any mass, which is below 1 once normalised.
    return (counts + mass / (mass.sum() + 1)).topk(rows).indices


def row_of_token(vocabulary: Tensor | None, vocab_size: int, device: torch.device) -> Tensor:
    """Draft row of every token [vocab], -1 for tokens the head cannot draft."""
    if vocabulary is None:
        return torch.arange(vocab_size, device=device)
    rows = torch.full((vocab_size,), -1, device=device)
    rows[vocabulary] = torch.arange(len(vocabulary), device=device)
    return rows


@dataclass(frozen=True)
class PromptWords:
    """The rows of all vocabularies of a batch together, and which of them each trace may draft.

    weight [rows, hidden]: of the target's output head, with rows of zeros behind. rows [vocab]: the row of every token,
    -1 if it has none. draftable [batch, rows].
    """

    weight: Tensor
    rows: Tensor
    draftable: Tensor

    @classmethod
    def of(cls, ranked: Tensor, prompts: Sequence[Sequence[int]], head_weight: Tensor) -> PromptWords:
        """What heads with the vocabulary `ranked` draft after each of these prompts."""
        device = head_weight.device
        vocabularies = [prompt_vocabulary(ranked, prompt) for prompt in prompts]
        union = torch.cat(vocabularies).unique()
        rows, weight = row_of_token(union, len(head_weight), device), pad_rows(head_weight[union])
        draftable = torch.zeros(len(prompts), len(weight), dtype=torch.bool, device=device)
        for row, vocabulary in enumerate(vocabularies):
            draftable[row, rows[vocabulary]] = True
        return cls(weight, rows, draftable)

    def mask(self, logits: Tensor, traces: Tensor) -> Tensor:
        """Logits [n, rows] without what the trace of each, `traces` [n], cannot draft."""
        # Finite: losses weigh some of them with zero.
        return logits.masked_fill(~self.draftable[traces], torch.finfo(logits.dtype).min)

    def rows_of(self, tokens: Tensor, traces: Tensor) -> Tensor:
        """Rows of tokens [n, ..] in logits of `traces` [n], -1 where the trace cannot draft it."""
        rows = self.rows[tokens]
        traces = traces.view(-1, *[1] * (rows.dim() - 1))
        return rows.where(self.draftable[traces, rows.clamp(min=0)] & (rows >= 0), -1)
