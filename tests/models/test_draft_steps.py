"""Draft steps in one call give the numbers of the calls that they join, bit for bit."""

from __future__ import annotations

import pytest
import torch

from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.drafting.exit_head import ExitHeadDrafter
from eesd.models.draft_steps import ROOM, DraftSteps, draft_steps
from eesd.models.engine import attach_engine
from eesd.models.kernels.layout import BLOCK_ROWS
from tests.toys import needs_compiler, tiny_head, tiny_target

pytestmark = needs_compiler
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def packed(dtype, lens=False, deep=False):
    target = tiny_target(dtype=dtype)
    head = tiny_head(target, rows=20, lens=lens, deep=deep)
    head.pack(attach_engine(target, "cpp"))
    return target, head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lens", "deep"), KINDS)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_steps_are_bit_for_bit_those_of_separate_calls(dtype, lens, deep, before):
    target, head = packed(dtype, lens, deep)
    text, tokens = torch.randint(0, 40, (1, 12)), [7, 11, 3]
    slot = text.shape[1]
    with torch.inference_mode():
        cache, own = target.new_cache(40), target.new_cache(40, num_layers=1)
        states = target.run(target.embed(text), slice(0, 2), cache)
        contexts = torch.randn_like(states)
        seen = slot - before
        head.step(states[:, :seen], contexts[:, :seen] if deep else None, target.rotary, own, last=0)
        unseen, context = states[:, seen:], contexts[:, : before + 1]

        steps = draft_steps(target, head, 2, cache, own)
        assert steps.begin(unseen, context if deep else None, slot, len(tokens))
        fused = [steps.step(token) for token in tokens]

        expected, after, fresh, context = [], [], unseen, context if deep else None
        for place, token in enumerate(tokens):
            state = target.run(target.embed(torch.tensor([[token]])), slice(0, 2), cache, slot + place)
            fresh = torch.cat((fresh, state), 1)
            estimate = head.step(fresh, context, target.rotary, own, slot + place + 1 - fresh.shape[1])
            expected.append(head.logits(estimate)[0, 0])
            after.append(state)
            fresh, context = state[:, :0], estimate if deep else None
        assert torch.equal(torch.stack(fused), torch.stack(expected))
        assert torch.equal(steps.states(), torch.cat(after, 1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_decoding_drafts_in_one_call_a_token_and_says_the_same(sampling, monkeypatch):
    target, head = packed(torch.bfloat16, True, True)

    def decode():
        drafter, controller = ExitHeadDrafter(head, 2), make_controller({"name": "static", "k": 4})
        how = {"sampling": sampling, "seed": 3, "max_new_tokens": 40}
        return generate(target, [1, 2, 3, 4], drafter=drafter, controller=controller, **how)

    calls, step = [], DraftSteps.step
    monkeypatch.setattr(DraftSteps, "step", lambda self, token: calls.append(token) or step(self, token))
    fused = decode()
    assert len(calls) == sum(one.drafted for one in fused.rounds) > 10
    monkeypatch.setattr("eesd.drafting.exit_head.draft_steps", lambda *_: None)
    plain = decode()
    assert (fused.tokens, fused.rounds) == (plain.tokens, plain.rounds)


def test_what_does_not_fit_is_left_to_separate_calls():
    target, head = packed(torch.float32)
    with torch.inference_mode():
        cache, own = target.new_cache(200), target.new_cache(200, num_layers=1)
        steps = draft_steps(target, head, 2, cache, own)
        many = torch.zeros(1, BLOCK_ROWS, target.config.hidden_size)
        assert steps.begin(many[:, 1:], None, BLOCK_ROWS, ROOM)
        assert not steps.begin(many, None, BLOCK_ROWS, 1)
        assert not steps.begin(many[:, :0], None, 0, ROOM + 1)
    assert draft_steps(target, head, 2, cache, own) is None, "autograd is on"


@pytest.mark.parametrize("what", ["layer", "norm", "head"])
def test_weights_that_changed_since_they_were_packed_are_not_used(what):
    target, head = packed(torch.float32)
    with torch.no_grad():
        cache, own = target.new_cache(20), target.new_cache(20, num_layers=1)
        assert draft_steps(target, head, 2, cache, own)
        changed = {"layer": target.layers[1].o.weight, "norm": head.norm.weight, "head": head.head.weight}[what]
        changed.mul_(2)
        assert draft_steps(target, head, 2, cache, own) is None


def test_without_the_engine_there_are_no_steps():
    target = tiny_target()
    head = tiny_head(target)
    attach_engine(target, "torch")
    head.pack(target.engine)
    with torch.no_grad():
        assert draft_steps(target, head, 2, target.new_cache(20), target.new_cache(20, num_layers=1)) is None
