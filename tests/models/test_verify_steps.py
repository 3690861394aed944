"""A pass in one call gives the numbers of the calls that it joins, bit for bit, and torch's choice of them."""

from __future__ import annotations

import pytest
import torch

import eesd.decoding.generate as decoding
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.models.engine import attach_engine
from eesd.models.kernels.layout import BLOCK_ROWS
from eesd.models.verify_steps import VerifySteps, verify_steps
from tests.toys import exit_drafter, needs_compiler, tiny_target

pytestmark = needs_compiler
PROMPT = [1, 2, 3, 4, 5]


def begun(target, exit_layer=0, capacity=90):
    """Steps on a cache that holds the prompt."""
    cache = target.new_cache(capacity)
    target.run(target.embed(torch.tensor([PROMPT])), slice(None), cache)
    return verify_steps(target, exit_layer, cache)


def packed(dtype=torch.float32, **changes):
    target = tiny_target(dtype=dtype, **changes)
    attach_engine(target, "cpp")
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"tied_head": True, "hidden_size": 64}])
@pytest.mark.parametrize("exit_layer", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_pass_is_bit_for_bit_that_of_separate_calls(dtype, changes, exit_layer, count):
    target, tokens, slot = packed(dtype, **changes), [7 + i for i in range(count)], len(PROMPT)
    with torch.inference_mode():
        for done in sorted({0, count - 1, count}):
            cache = target.new_cache(90)
            target.run(target.embed(torch.tensor([PROMPT])), slice(None), cache)
            embedded = target.embed(torch.tensor([tokens]))
            at_exit = target.run(embedded, slice(0, exit_layer), cache, slot)
            final = target.run(at_exit, slice(exit_layer, None), cache, slot)

            steps = begun(target, exit_layer)
            given = target.run(embedded[:, :done], slice(0, exit_layer), steps.keep[-1], slot) if done else None
            found = steps.verify(tokens, given, slot)
            assert torch.equal(found.states, at_exit)
            assert torch.equal(found.final, final)
            assert torch.equal(found.logits, target.logits(final[0]))
            assert found.best == target.logits(final[0]).argmax(-1).tolist()
            assert torch.equal(steps.keep[-1].keys, cache.keys)
            assert torch.equal(steps.keep[-1].values, cache.values)


@pytest.mark.parametrize("vocab_size", [40, 2000, 5001])
def test_of_equal_logits_the_first_is_chosen_and_what_is_no_number_before_all(vocab_size):
    target, last = tiny_target(vocab_size=vocab_size), vocab_size - 1
    rows = target.head_weight
    rows.data[3] = rows.data[last] = rows.data[last // 2] = 50 * rows.data[[0]].sign()
    for strange in ([], [last], [last // 2, last], [5, last // 2]):
        rows.data[strange] = float("nan")
        attach_engine(target, "cpp")
        with torch.inference_mode():
            found = begun(target).verify([7, 8, 9, 10], None, len(PROMPT))
            assert found.best == found.logits.argmax(-1).tolist()
            assert not strange or set(found.best) == {strange[0]}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
@pytest.mark.parametrize("drafts", [True, False])
def test_decoding_verifies_in_one_call_a_round_and_says_the_same(sampling, drafts, monkeypatch):
    target = tiny_target(dtype=torch.bfloat16)
    drafter = exit_drafter(target, 2, rows=20, lens=True, deep=True)
    drafter.head.pack(attach_engine(target, "cpp"))
    method = {"drafter": drafter, "controller": make_controller({"name": "static", "k": 4})} if drafts else {}

    def decode():
        return generate(target, PROMPT, **method, sampling=sampling, seed=3, max_new_tokens=40)

    calls, verify = [], VerifySteps.verify
    monkeypatch.setattr(VerifySteps, "verify", lambda *given: calls.append(given) or verify(*given))
    fused = decode()
    assert len(calls) == len(fused.rounds) > 5
    monkeypatch.setattr(decoding, "verify_steps", lambda *_: None)
    plain = decode()
    assert (fused.tokens, fused.rounds) == (plain.tokens, plain.rounds)


def test_what_does_not_fit_is_left_to_separate_calls():
    target = packed()
    with torch.inference_mode():
        steps = begun(target, capacity=BLOCK_ROWS + 10)
        assert steps.verify([1] * BLOCK_ROWS, None, 10)
        assert steps.verify([1] * BLOCK_ROWS, None, 11) is None, "the cache ends"
        assert steps.verify([1] * (BLOCK_ROWS + 1), None, 5) is None
        assert verify_steps(target, target.config.num_layers, target.new_cache(20)) is None, "nothing left to run"
    assert verify_steps(target, 0, target.new_cache(20)) is None, "autograd is on"


@pytest.mark.parametrize("what", ["layer", "head"])
def test_weights_that_changed_since_they_were_packed_are_not_used(what):
    target = packed()
    with torch.no_grad():
        assert verify_steps(target, 0, target.new_cache(20))
        {"layer": target.layers[1].o.weight, "head": target.head_weight}[what].mul_(2)
        assert verify_steps(target, 0, target.new_cache(20)) is None


def test_without_the_engine_there_are_no_steps():
    target = tiny_target()
    attach_engine(target, "torch")
    with torch.no_grad():
        assert verify_steps(target, 0, target.new_cache(20)) is None
