"""Traces as padded batches on the device, with the teacher's labels beside them.

for traces in epoch_batches(everything, batch=8, seed=epoch):
    batch = make_batch(traces, exit_layer, target)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eesd.distill.padding import pad_positions, round_up
from eesd.distill.record import Trace
from eesd.distill.vocabulary import PromptWords
from eesd.models.transformer import Transformer


@dataclass(frozen=True)
class Batch:
    """`batch` traces; a position holds one token of each and predicts the next.

    All answers begin at one position, so that what is rolled out over answers is as long as the longest of them,
    whatever the prompts: shorter ones have nothing before them.

    states [batch, seq, hidden]: after the exit layer, None for heads without one. final [batch, seq, hidden]: the
    target's, normalised. context [batch, seq, hidden]: `final` one position before, zero at the start.
    starts [batch]: the first position that holds a token. begins, ends [batch]: the first that predicts a token with a
    label, and one past the last. answer: the one that predicts the first token of every answer.
    teacher_ids, teacher_probs [batch, seq, top] and tokens [batch, seq] (the next one) hold nothing outside begins and
    ends. words: what each trace's head can draft, if its prompt decides that.
    """

    states: Tensor | None
    final: Tensor
    context: Tensor
    starts: Tensor
    begins: Tensor
    ends: Tensor
    answer: int
    teacher_ids: Tensor
    teacher_probs: Tensor
    tokens: Tensor
    words: PromptWords | None = None

    def predicting(self, depth: int) -> Tensor:
        """Where a prediction counts as the `depth`-th (1 ..) drafted token of a round: [batch, seq] booleans.

        Prompts teach first drafted tokens only: further ones cost as much and nobody drafts there.
        """
        positions = torch.arange(self.final.shape[1], device=self.final.device)
        begins = self.begins[:, None] if depth == 1 else self.answer
        return (positions >= begins + depth - 1) & (positions < self.ends[:, None])


def make_batch(traces: Sequence[Trace], exit_layer: int, target: Transformer) -> Batch:
    """Pad, move to the target's device, widen to float32. exit_layer 0: without states of one."""
    device, depth = target.device, target.config.num_layers
    answer = round_up(max(trace.prompt_tokens for trace in traces) - 1)
    starts = torch.tensor([answer - (trace.prompt_tokens - 1) for trace in traces])
    begins = starts + torch.tensor([trace.learnt_from - 1 for trace in traces])
    ends = starts + torch.tensor([len(trace.tokens) - 1 for trace in traces])
    seq = round_up(int(ends.max()))

    def padded(layer: int) -> Tensor:
        """States [batch, seq, hidden] after so many layers."""
        states = [trace.states[layer] for trace in traces]
        return pad_positions(states, starts.tolist(), seq).to(device, torch.float32)

    final = padded(depth)
    # Where tokens with labels are predicted, in the order in which the traces hold these.
    positions = torch.arange(seq)
    where = ((positions >= begins[:, None]) & (positions < ends[:, None])).nonzero(as_tuple=True)
    where = tuple(index.to(device) for index in where)

    def spread(labels: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Labels [n, ..] of every trace at their positions [batch, seq, ..], zeros elsewhere."""
        found = torch.cat(labels).to(device, dtype)
        all_positions = torch.zeros(*final.shape[:2], *found.shape[1:], dtype=dtype, device=device)
        all_positions[where] = found
        return all_positions

    with torch.no_grad():
        final = target.norm(final)
    return Batch(
        padded(exit_layer) if exit_layer else None,
        final,
        F.pad(final[:, :-1], (0, 0, 1, 0)),
        starts.to(device),
        begins.to(device),
        ends.to(device),
        answer,
        spread([trace.teacher_ids for trace in traces], torch.long),
        spread([trace.teacher_probs for trace in traces], torch.float32),
        spread([trace.tokens[trace.learnt_from :] for trace in traces], torch.long),
    )


def epoch_batches(traces: Sequence[Trace], batch: int, seed: int) -> list[list[Trace]]:
    """All traces once, in batches of answers of similar length (padding costs time) and random order.

    Traces whose prompts teach stand together, for a batch is rolled out from where the first of its traces learns; one
    batch of each pool may have both kinds.
    """
    shuffled = list(traces)
    rng = random.Random(seed)
    rng.shuffle(shuffled)
    pool = 8 * batch
    batches = []
    for i in range(0, len(shuffled), pool):
        alike = sorted(shuffled[i : i + pool], key=lambda trace: (trace.prompt_teaches, _size(trace)))
        batches += [alike[j : j + batch] for j in range(0, len(alike), batch)]
    rng.shuffle(batches)
    return batches


def in_order(traces: Sequence[Trace], batch: int) -> Iterator[list[Trace]]:
    """All traces once, by what they cost: what measuring needs."""
    alike = sorted(traces, key=_size)
    for i in range(0, len(alike), batch):
        yield alike[i : i + batch]


def _size(trace: Trace) -> tuple[int, int]:
    """What a trace costs in a batch: first of all its answer, over which drafts are rolled out."""
    return round_up(trace.answer_tokens), trace.prompt_tokens
