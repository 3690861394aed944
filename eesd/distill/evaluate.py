"""How good a head is: agreement with the target by draft position, and how far a greedy chain gets.

found = evaluate(student, traces)
found["top1"][0], found["chain_length"]        # 0.55, 1.3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eesd.distill.batches import Batch, in_order
from eesd.distill.heads import Student
from eesd.distill.losses import expected_acceptance
from eesd.distill.record import Trace

POSITIONS = 6  # draft positions that agreement is reported for
CANDIDATES = 10  # most probable tokens of a draft position whose accuracy is measured
CHAIN = 8  # longest chain, K_max
BATCH = 8


@torch.inference_mode()
def evaluate(student: Student, traces: Sequence[Trace], depth: int = CHAIN) -> dict[str, Any]:
    """Agreement with the target's greedy choice, rolled out to this depth as in decoding along the text.

    top1 and expected_acceptance (sum_x min(p, q)) by draft position, of at most 6, over `positions` first drafted
    tokens; chain_length: drafted tokens, of at most `depth`, that match before the first miss, over rounds with as many
    tokens to come, None if there is no such round. The first token of an answer counts nowhere (`_drafts`).
    """
    hits, overlaps = ([0.0] * POSITIONS for _ in range(2))
    counts, chains, rounds = [0] * POSITIONS, 0, 0
    for batch in _batches(student, traces):
        alive = None
        positions = torch.arange(batch.final.shape[1], device=student.target.device)
        for step, (where, logits) in enumerate(_drafts(student, batch, depth)):
            rows = student.rows_of(batch.teacher_ids[where], batch, where)
            right = torch.zeros_like(where)
            right[where] = logits.argmax(-1) == rows[:, 0]
            if step < POSITIONS:
                hits[step] += float(right.sum())
                overlaps[step] += float(expected_acceptance(logits.softmax(-1), rows, batch.teacher_probs[where]).sum())
                counts[step] += len(rows)
            # Position i at this depth belongs to the round that began at i - step.
            alive = right if alive is None else right & _back(alive)
            chains += int((alive & (positions - step + depth <= batch.ends[:, None])).sum())
        rounds += int((batch.ends - batch.answer - depth).clamp(min=0).sum())
    return {
        "top1": [hit / count for hit, count in zip(hits, counts, strict=True) if count],
        "expected_acceptance": [part / count for part, count in zip(overlaps, counts, strict=True) if count],
        "chain_length": chains / rounds if rounds else None,
        "positions": counts[0],
    }


@torch.inference_mode()
def confidences(student: Student, traces: Sequence[Trace]) -> tuple[Tensor, Tensor]:
    """max q, and whether the target agreed, of every drafted token of greedy chains up to the first miss: two [n]."""
    found = []
    for batch in _batches(student, traces):
        alive = None
        for where, logits in _drafts(student, batch, POSITIONS):
            right = torch.zeros_like(where)
            right[where] = logits.argmax(-1) == student.rows_of(batch.teacher_ids[where][:, 0], batch, where)
            drafted = where if alive is None else where & _back(alive)
            confidence = logits.softmax(-1).amax(-1)[drafted[where]]
            found.append((confidence.cpu(), right[drafted].cpu()))
            alive = right & drafted
    scores, agreed = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(agreed)


@torch.inference_mode()
def candidate_accuracies(student: Student, traces: Sequence[Trace]) -> list[list[float]]:
    """How often the target's choice is the first, second .. of the ten best candidates, by draft position.

    Rolled out along the text, as `evaluate` does: whether the tokens before would have been accepted plays no part.
    """
    hits = torch.zeros(POSITIONS, CANDIDATES, dtype=torch.float64)
    counts = [0] * POSITIONS
    for batch in _batches(student, traces):
        for step, (where, logits) in enumerate(_drafts(student, batch, POSITIONS)):
            rows = student.rows_of(batch.teacher_ids[where][:, 0], batch, where)
            best = logits.topk(min(CANDIDATES, logits.shape[-1]), -1).indices
            hits[step, : best.shape[1]] += (best == rows[:, None]).sum(0).cpu()
            counts[step] += len(rows)
    return [[float(hit) / count for hit in row] for row, count in zip(hits, counts, strict=True) if count]


def _batches(student: Student, traces: Sequence[Trace]) -> Iterator[Batch]:
    return (student.batch(part) for part in in_order(traces, BATCH))


def _drafts(student: Student, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's predictions where decoding drafts: in answers, in rounds that begin after their first token.

    The pass over the prompt writes that one.
    """
    positions = torch.arange(batch.final.shape[1], device=student.target.device)
    for step, (where, logits) in enumerate(student.predictions(batch, depth)):
        live = where & (positions - step > batch.answer)
        yield live, logits[live[where]]


def _back(x: Tensor) -> Tensor:
    """x [batch, seq] as seen from the position after."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))
