"""Losses of a draft head against the teacher's recorded top probabilities."""

from __future__ import annotations

from torch import Tensor


def soft_cross_entropy(log_q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """Mean cross-entropy -sum_x p(x) log q(x) of the draft law with the teacher's soft labels (Hinton et al. 2015).

    log_q [n, rows]; teacher_rows [n, top] row of each recorded token, -1 where the draft vocabulary lacks it;
    teacher_probs [n, top]. Missing mass is left out, not rescaled: a position the head cannot draft teaches less.
    """
    kept = teacher_probs * (teacher_rows >= 0)
    return -(kept * log_q.gather(1, teacher_rows.clamp(min=0))).sum(1).mean()


def expected_acceptance(q: Tensor, teacher_rows: Tensor, teacher_probs: Tensor) -> Tensor:
    """sum_x min(p(x), q(x)) at each position [n]: the chance that sampled verification accepts the drafted token.

    Arguments as above with q [n, rows]. The teacher's mass beyond its recorded top tokens is left out: a lower bound.
    """
    covered = q.gather(1, teacher_rows.clamp(min=0)).minimum(teacher_probs)
    return (covered * (teacher_rows >= 0)).sum(1)
