"""A smaller model drafts: its cache follows the accepted tokens, and its tokenizer has to be the target's."""

from __future__ import annotations

import json

import pytest
import torch

from eesd.bench.methods import build_method
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.drafting.assistant import AssistantDrafter, check_same_tokenizer
from eesd.errors import EesdError
from eesd.models.loading import load_target
from tests.toys import tiny_target, write_tiny_model

PROMPT = [3, 1, 4, 1, 5]


def run(target, assistant, controller=None, temperature=0.0, new=41):
    return generate(
        target,
        PROMPT,
        drafter=AssistantDrafter(assistant, target),
        controller=make_controller(controller or {"name": "static", "k": 3}),
        sampling=Sampling(temperature),
        max_new_tokens=new,
    )


def test_the_target_as_its_own_assistant_is_always_accepted():
    """Any stale or missing entry of the assistant's cache would cost an acceptance."""
    target = tiny_target()
    assert [(r.drafted, r.accepted) for r in run(target, target).rounds] == [(3, 3)] * 10


@pytest.mark.parametrize("controller", [{"name": "static", "k": 4}, {"name": "beta_ts"}], ids=str)
@pytest.mark.parametrize("rows", [30, 50, 64])
def test_any_assistant_is_lossless_whatever_its_vocabulary(controller, rows):
    target, assistant = tiny_target(), tiny_target(seed=5, num_layers=2, hidden_size=16, vocab_size=rows)
    vanilla = generate(target, PROMPT, max_new_tokens=41).tokens
    assert run(target, assistant, controller).tokens == vanilla
    assert len(run(target, assistant, controller, temperature=1.0).tokens) == 41


def test_what_is_drafted_is_the_assistants_argmax_after_any_acceptance():
    """A target that agrees now and then: after every round the assistant drafts as if it had read only what is kept."""
    target, assistant = tiny_target(seed=3), tiny_target(seed=3, num_layers=3)
    assistant.load_state_dict({k: v for k, v in target.state_dict().items() if not k.startswith("layers.3.")})
    assistant.head_weight.data.add_(0.05)
    drafter, drafts = AssistantDrafter(assistant, target), {}
    original = drafter.draft
    drafter.draft = lambda chain, pending, slot: (original(chain, pending, slot), drafts.update({slot: chain.tokens}))[
        0
    ]
    found = generate(
        target, PROMPT, drafter=drafter, controller=make_controller({"name": "static", "k": 3}), max_new_tokens=60
    )
    tokens = [*PROMPT, *found.tokens]
    assert 0 < sum(r.accepted for r in found.rounds) < sum(r.drafted for r in found.rounds)
    for slot, drafted in drafts.items():
        prefix = tokens[: slot + 1]
        for token in drafted:
            hidden = assistant.run(assistant.embed(torch.tensor([prefix])), slice(None))
            assert token == int(assistant.logits(hidden[0, -1]).argmax())
            prefix = [*prefix, token]


def test_beyond_its_context_an_assistant_has_nothing_to_propose():
    target, assistant = tiny_target(), tiny_target(max_positions=20)
    found = run(target, assistant)
    assert found.tokens == generate(target, PROMPT, max_new_tokens=41).tokens
    assert found.rounds[-2].stop == "drafter"
    assert sum(r.drafted for r in found.rounds) == 12  # slots 5 to 19, but for those of the target's own tokens
    assert not any(r.drafted for r in run(target, tiny_target(max_positions=3)).rounds)


def test_an_assistant_is_loaded_by_its_folder(tmp_path):
    model, small = write_tiny_model(tmp_path / "model"), write_tiny_model(tmp_path / "small", seed=1)
    target = load_target(model, "float32", "cpu")
    settings = {"drafter": "assistant", "assistant_path": str(small), "controller": {"name": "static", "k": 2}}
    outputs = [
        build_method("x", s, target, model, Sampling(), ())(PROMPT, seed=0, max_new_tokens=20) for s in ({}, settings)
    ]
    assert outputs[0].tokens == outputs[1].tokens
    file = small / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(EesdError, match=r"2 ids differ\. An assistant needs the tokenizer of its target"):
        check_same_tokenizer(model, small)
