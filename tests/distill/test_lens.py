"""The lens recovers a linear relation; evaluation and calibration count what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eesd.distill.batches import make_batch
from eesd.distill.calibrate import expected_calibration_error, reliability
from eesd.distill.evaluate import CHAIN, confidences, evaluate
from eesd.distill.lens import fit_lens
from eesd.distill.record import Trace, record_batch
from eesd.distill.train import check_held_out
from eesd.errors import EesdError
from tests.toys import VOCAB, tiny_head, tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def traces(target):
    prompts = torch.randint(0, VOCAB, (40, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return record_batch(target, prompts, [2, 4], 24, [0.0], set(), 0)


def test_a_linear_relation_is_recovered(target):
    size, generator = target.config.hidden_size, torch.Generator().manual_seed(0)
    truth, shift = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
    states = torch.randn(4000, size, generator=generator)
    # Final states whose norm is a linear image cannot be made to order: undo the norm instead.
    image = F.rms_norm(states, (size,), eps=target.norm.eps) @ truth.T + shift
    scaled = image / image.pow(2).mean(-1, keepdim=True).sqrt()
    trace = Trace(1, torch.zeros(4001), {2: states, 4: scaled}, torch.zeros(1), torch.zeros(1))
    weight, bias = fit_lens([trace], 2, target, deep=False)
    found = F.rms_norm(states, (size,), eps=target.norm.eps) @ weight.T + bias
    wanted = target.norm(scaled)
    assert F.mse_loss(found, wanted) < 0.15 * wanted.var()


@torch.no_grad()
@pytest.mark.parametrize("deep", [False, True])
def test_a_trained_head_maps_texts_as_if_each_were_alone(target, deep, monkeypatch):
    prompts = [torch.arange(n) % VOCAB for n in (3, 9, 20, 5)]
    texts = record_batch(target, [prompt.tolist() for prompt in prompts], [2, 4], 24, [0.0], set(), 0)
    head = tiny_head(target, lens=True, deep=deep)
    head.layer.qkv.weight.mul_(10)
    together = fit_lens(texts, 2, target, deep, head=head)
    monkeypatch.setattr("eesd.distill.lens.CHUNK", 1)
    monkeypatch.setattr("eesd.distill.padding.ROUND", 1)
    for found, expected in zip(together, fit_lens(texts, 2, target, deep, head=head), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_deep_context_explains_more(target, traces):
    def error(deep):
        weight, bias = fit_lens(traces, 2, target, deep)
        batch = make_batch(traces, 2, target)
        early = F.rms_norm(batch.states, batch.states.shape[-1:], eps=target.norm.eps)
        inputs = torch.cat([early, batch.context], -1) if deep else early
        where = batch.predicting(1)
        return float(F.mse_loss((inputs @ weight.T + bias)[where], batch.final[where]))

    assert error(True) < error(False)


class Prophet:
    """A head that is right up to a fixed depth of every round and wrong after it."""

    def __init__(self, target, right_for):
        self.target, self.right_for = target, right_for
        self.exit_layer = 2

    def batch(self, traces):
        return make_batch(traces, self.exit_layer, self.target)

    def rows_of(self, tokens, batch, where):
        return tokens

    def predictions(self, batch, depth):
        for step in range(1, depth + 1):
            where = batch.predicting(step)
            token = batch.teacher_ids[where][:, 0] + (0 if step <= self.right_for else 1)
            yield where, 9.0 * F.one_hot(token % VOCAB, VOCAB).float()


@pytest.mark.parametrize("right_for", [0, 1, 3, CHAIN])
def test_evaluation_counts_chains_up_to_the_first_miss(target, traces, right_for):
    found = evaluate(Prophet(target, right_for), traces)
    assert found["chain_length"] == right_for
    assert found["top1"] == [float(position < right_for) for position in range(6)]
    # The first token of an answer is written by the pass over its prompt.
    lengths = [len(trace.teacher_ids) - 1 for trace in traces]
    assert found["positions"] == sum(lengths)
    scores, agreed = confidences(Prophet(target, right_for), traces)
    # Each round contributes its hits and one miss.
    drafted = sum(max(0, n - step) for n in lengths for step in range(min(right_for + 1, 6)))
    assert (len(scores), int(agreed.sum())) == (drafted, sum(n - s for n in lengths for s in range(min(right_for, 6))))


def test_answers_shorter_than_a_chain_have_no_chain_length(target):
    short = record_batch(target, [[3, 1, 4]] * 2, [2, 4], CHAIN - 1, [0.0], set(), 0)
    found = evaluate(Prophet(target, CHAIN), short)
    assert found["top1"][0] == 1.0 and found["chain_length"] is None


def test_answers_of_one_token_are_refused_before_training(target):
    short, long = ({"asdiv": record_batch(target, [[3, 1, 4]] * 2, [2, 4], n, [0.0], set(), 0)} for n in (1, 2))
    check_held_out("corpus", {"calibration": long, "evaluation": long})
    with pytest.raises(EesdError, match=r"corpus: no answer of two tokens or more of asdiv \(evaluation\): heads"):
        check_held_out("corpus", {"calibration": long, "evaluation": short})
    with pytest.raises(EesdError, match=r"of all tasks \(calibration\): heads"):
        check_held_out("corpus", {"calibration": short, "evaluation": long})


def test_calibration_error_by_hand():
    predicted, agreed = np.array([0.15, 0.15, 0.95, 0.95]), np.array([False, True, True, True])
    assert [b["tokens"] for b in reliability(predicted, agreed)] == [2, 2]
    assert expected_calibration_error(predicted, agreed) == pytest.approx((0.35 * 2 + 0.05 * 2) / 4)
