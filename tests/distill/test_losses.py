"""Losses on hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from eesd.distill.losses import LOSSES, expected_acceptance, mixed_loss, soft_cross_entropy

Q = torch.tensor([[0.5, 0.25, 0.25]])
ROWS = torch.tensor([[0, 2, -1]])  # the third recorded token is outside the draft vocabulary
P = torch.tensor([[0.6, 0.1, 0.3]])


def test_soft_cross_entropy_by_hand():
    expected = -(0.6 * math.log(0.5) + 0.1 * math.log(0.25))
    assert float(soft_cross_entropy(Q.log(), ROWS, P)) == pytest.approx(expected)


def test_other_losses_by_hand():
    assert float(LOSSES["hard"](Q.log(), ROWS, P)) == pytest.approx(-math.log(0.5))
    assert float(LOSSES["hard"](Q.log(), ROWS[:, [2, 1]], P[:, [2, 1]])) == 0  # the head cannot draft that token
    assert float(LOSSES["tv"](Q.log(), ROWS, P)) == pytest.approx(1 - 0.6)
    mixed = mixed_loss({"soft": 2.0, "tv": 1.0, "text": 0.5}, Q.log(), ROWS, P, torch.tensor([1]))
    soft = -(0.6 * math.log(0.5) + 0.1 * math.log(0.25))
    assert float(mixed) == pytest.approx(2 * soft + 0.4 - 0.5 * math.log(0.25))


def test_expected_acceptance_by_hand():
    assert expected_acceptance(Q, ROWS, P).tolist() == pytest.approx([0.5 + 0.1])
