"""Early exit without training: the target's own first layers and head, nothing computed twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.drafting import DRAFTERS
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.errors import EesdError
from tests.toys import tiny_target

PROMPT = [3, 1, 4, 1, 5]


def run(target, exit_layer, k=3, temperature=0.0, new=41):
    controller = make_controller({"name": "static", "k": k})
    drafter = EarlyExitDrafter(exit_layer)
    sampling = Sampling(temperature)
    return generate(target, PROMPT, drafter=drafter, controller=controller, sampling=sampling, max_new_tokens=new)


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_greedy_early_exit_is_lossless(exit_layer):
    target = tiny_target()
    assert run(target, exit_layer).tokens == generate(target, PROMPT, max_new_tokens=41).tokens
    assert len(run(target, exit_layer, temperature=1.0).tokens) == 41


def test_layers_that_change_nothing_are_always_accepted_and_never_run_twice(monkeypatch):
    """With an identity as last layer the exit is the target itself: anything stale would cost an acceptance."""
    target = tiny_target()
    for weight in (target.layers[3].o.weight, target.layers[3].down.weight):
        weight.data.zero_()
    runs = dict.fromkeys(range(4), 0)
    for index, layer in enumerate(target.layers):

        def counted(hidden, *rest, index=index, forward=layer.forward):
            runs[index] += hidden.shape[1]
            return forward(hidden, *rest)

        monkeypatch.setattr(layer, "forward", counted)
    found = run(target, 3)
    assert [(r.drafted, r.accepted) for r in found.rounds] == [(3, 3)] * 10
    assert runs == dict.fromkeys(range(4), len(PROMPT) + 40)


def test_drafts_are_the_argmax_after_the_exit():
    target = tiny_target(seed=2)
    found = run(target, 2, k=1)
    tokens, accepted = [*PROMPT, *found.tokens], 0
    slot = len(PROMPT)
    for number, one in enumerate(found.rounds[:-1]):
        states = target.run(target.embed(torch.tensor([tokens[: slot + 1]])), slice(0, 2))
        drafted = int(target.logits(states[0, -1]).argmax())
        assert (drafted == tokens[slot + 1]) == bool(one.accepted), number
        slot, accepted = slot + 1 + one.accepted, accepted + one.accepted


def test_an_exit_behind_the_last_layer_is_refused():
    with pytest.raises(EesdError):
        DRAFTERS["early_exit"].build({"exit_layer": 4}, tiny_target(), Path("x"))
