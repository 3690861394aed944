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

from eesd.distill.record import Trace
from eesd.models.transformer import Transformer


@dataclass(frozen=True)
class Batch:
    """`batch` traces of at most `seq` + 1 tokens; position i has seen token i and predicts token i + 1.

    states [batch, seq, hidden]: after the exit layer, None for heads without one. final [batch, seq, hidden]: the
    target's, normalised.
    context [batch, seq, hidden]: `final` one position before, zero at the start. first: no generated token is predicted
    before this position. begins, ends [batch]: the first position that predicts a generated token, and one past the
    last. teacher_ids, teacher_probs [batch, seq, top] and tokens [batch, seq] (the next one) hold nothing elsewhere.
    """

    states: Tensor | None
    final: Tensor
    context: Tensor
    first: int
    begins: Tensor
    ends: Tensor
    teacher_ids: Tensor
    teacher_probs: Tensor
    tokens: Tensor

    def predicting(self, depth: int) -> Tensor:
        """Where a prediction counts as the `depth`-th (1 ..) drafted token of a round: [batch, seq] booleans."""
        positions = torch.arange(self.final.shape[1], device=self.final.device)
        return (positions >= self.begins[:, None] + depth - 1) & (positions < self.ends[:, None])


def make_batch(traces: Sequence[Trace], exit_layer: int, target: Transformer) -> Batch:
    """Pad, move to the target's device, widen to its type. exit_layer 0: without states of one."""
    device, depth = target.device, target.config.num_layers
    lengths = [len(trace.tokens) - 1 for trace in traces]
    shape = (len(traces), max(lengths))
    final = torch.zeros(*shape, target.config.hidden_size, device=device)
    states = torch.zeros_like(final) if exit_layer else None
    top = traces[0].teacher_ids.shape[1]
    ids, probs = torch.zeros(*shape, top, dtype=torch.long, device=device), torch.zeros(*shape, top, device=device)
    tokens = torch.zeros(shape, dtype=torch.long)
    for row, (trace, length) in enumerate(zip(traces, lengths, strict=True)):
        if states is not None:
            states[row, :length] = trace.states[exit_layer]
        final[row, :length] = trace.states[depth]
        begin = trace.prompt_tokens - 1
        ids[row, begin:length] = trace.teacher_ids
        probs[row, begin:length] = trace.teacher_probs
        tokens[row, begin:length] = trace.tokens[begin + 1 :]
    with torch.no_grad():
        final = target.norm(final)
    begins = torch.tensor([trace.prompt_tokens - 1 for trace in traces], device=device)
    return Batch(
        states,
        final,
        F.pad(final[:, :-1], (0, 0, 1, 0)),
        int(begins.min()),
        begins,
        torch.tensor(lengths, device=device),
        ids,
        probs,
        tokens.to(device),
    )


def epoch_batches(traces: Sequence[Trace], batch: int, seed: int) -> list[list[Trace]]:
    """All traces once, in batches of similar length (padding costs time) and random order."""
    shuffled = list(traces)
    rng = random.Random(seed)
    rng.shuffle(shuffled)
    pool = 8 * batch
    batches = []
    for i in range(0, len(shuffled), pool):
        alike = sorted(shuffled[i : i + pool], key=lambda trace: len(trace.tokens))
        batches += [alike[j : j + batch] for j in range(0, len(alike), batch)]
    rng.shuffle(batches)
    return batches


def in_order(traces: Sequence[Trace], batch: int) -> Iterator[list[Trace]]:
    """All traces once, by length: what measuring needs."""
    alike = sorted(traces, key=lambda trace: len(trace.tokens))
    for i in range(0, len(alike), batch):
        yield alike[i : i + batch]
