"""Shapes are rounded up, and nothing that is learnt or measured knows."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from eesd.distill import padding
from eesd.distill import train as train_module
from eesd.distill.corpus import read_corpus
from eesd.distill.evaluate import evaluate
from eesd.distill.heads import make_student
from eesd.distill.train import batch_loss
from eesd.models.loading import load_target
from tests.distill.test_train import HEAD, MEDUSA


def test_lengths_are_multiples():
    size = padding.ROUND
    assert [padding.round_up(n) for n in (0, 1, size, size + 1)] == [0, size, size, 2 * size]
    assert [padding.round_down(n) for n in (0, size - 1, size, 2 * size - 1)] == [0, 0, size, size]


def test_what_is_padded_with_is_zero():
    parts = [torch.ones(3, 2), torch.ones(4, 2)]
    together = padding.pad_positions(parts, [1, 0], 5)
    assert together[:, :, 0].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert torch.equal(together[:, :, 0], together[:, :, 1])
    assert padding.pad_rows(parts[0]).shape == (4 * padding.ROUND, 2)
    assert padding.pad_rows(torch.ones(4 * padding.ROUND, 2)).shape == (4 * padding.ROUND, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "lens", "context": "verified", "output_head": "tied", "vocabulary": "prompt", "vocab_rows": 32},
        MEDUSA,
    ],
)
def test_rounded_shapes_change_neither_loss_nor_gradients_nor_agreement(model, corpus, changes, monkeypatch):
    settings = {**HEAD, **changes}
    target = load_target(model, "float32")
    traces = read_corpus(corpus, [2, target.config.num_layers], "train")["asdiv"]

    monkeypatch.setattr(train_module, "mixed_precision", lambda device: nullcontext())

    def measured(rounded):
        monkeypatch.setattr(padding, "ROUND", rounded)
        torch.manual_seed(0)
        student = make_student(settings, target, traces)
        loss = batch_loss(student, traces[:4])
        loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in student.parameters])
        return loss.detach(), gradients, evaluate(student, traces)

    loss, gradients, agreement = measured(1)
    for rounded in (8, 32):
        other_loss, other_gradients, other_agreement = measured(rounded)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-5 * float(gradients.abs().max()))
        assert other_agreement["top1"] == agreement["top1"]
