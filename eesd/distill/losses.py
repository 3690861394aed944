"""Losses of a draft head against the teacher's recorded top probabilities; log_q [n, rows] is the draft law.

teacher_rows [n, top]: draft row of each recorded token, -1 where the draft vocabulary lacks it, most probable first.
teacher_probs [n, top]. text_rows [n]: row of the token that the text goes on with. Missing mass is left out, not
rescaled: a position the head cannot draft teaches less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def soft_cross_entropy(log_q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """Cross-entropy -sum_x p(x) log q(x) with the teacher's soft labels [n] (Hinton et al. 2015)."""
    kept = teacher_probs * (teacher_rows >= 0)
    return -(kept * log_q.gather(1, teacher_rows.clamp(min=0))).sum(1)


def hard_cross_entropy(log_q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """-log q(x) of the teacher's most probable token x [n]: what greedy verification compares with."""
    best = teacher_rows[:, :1]
    return (-log_q.gather(1, best.clamp(min=0)) * (best >= 0))[:, 0]


def total_variation(log_q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """1 - sum_x min(p(x), q(x)) [n]: the rate at which sampled verification rejects (Leviathan et al. 2023)."""
    return 1 - expected_acceptance(log_q.exp(), teacher_rows, teacher_probs)


LOSSES: dict[str, Loss] = {"soft": soft_cross_entropy, "hard": hard_cross_entropy, "tv": total_variation}


def mixed_loss(
    weights: Mapping[str, float], log_q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor, text_rows: Tensor
) -> Tensor:
    """The weighted sum of losses [n]; `text` is cross-entropy with the text itself, without a teacher."""
    total = torch.zeros_like(log_q[:, 0])
    for name, weight in weights.items():
        if name == "text":
            total = total + weight * hard_cross_entropy(log_q, text_rows[:, None], teacher_probs)
        elif weight:
            total = total + weight * LOSSES[name](log_q, teacher_rows, teacher_probs)
    return total


def expected_acceptance(q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """sum_x min(p(x), q(x)) at each position [n]: the chance that sampled verification accepts the drafted token.

    q [n, rows]. The teacher's mass beyond its recorded top tokens is left out: a lower bound.
    """
    covered = q.gather(1, teacher_rows.clamp(min=0)).minimum(teacher_probs)
    return (covered * (teacher_rows >= 0)).sum(1)
