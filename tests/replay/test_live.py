"""Replay of a recorded trace gives the rounds of live decoding, for every controller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eesd.bench.trace import continuation, record_chains
from eesd.control import CONTROLLERS, make_controller
from eesd.decoding.generate import generate
from eesd.drafting import Drafter
from eesd.replay.loop import equip_for, replay
from eesd.replay.trace import Trace, TracedItem, TraceFacts, read_trace, write_trace
from tests.control.test_rules import COSTS
from tests.toys import ScriptedDrafter, exit_drafter, medusa_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5], [2, 7, 1], [9, 9, 8, 7]]
LIMIT, K = 40, 6
HEADS = {"plain": {}, "lens": {"lens": True}, "deep": {"lens": True, "deep": True}}
FACTS = TraceFacts("toy", "w", "t", "d", "h", 2, "float32", K, "s", {"x": [0.0, 0.5, 1.0], "y": [0.05, 0.6, 0.95]})
SETTINGS = [
    *({"name": name, **({"k": 3} if name == "static" else {"k_max": K})} for name in CONTROLLERS.names()),
    {"name": "static", "k": 6},
    {"name": "beta_ts", "reset_on": "never", "k_max": 5, "prior": [4, 1]},
    {"name": "cost_ts", "reset_on": "never", "k_max": 4, "memory": 0.5},
    {"name": "ucb", "reset_on": "never", "k_max": 5},
    {"name": "exp3", "reset_on": "never", "k_max": 5},
    {"name": "confidence", "tau": 0.9, "k_max": 6},
]


class Brief(ScriptedDrafter):
    """Certain of a few tokens at a time, of none at some slots, and wrong now and then."""

    def draft(self, chain, pending, slot):
        for _ in range(slot % 4):
            if not chain.stop:
                slot += 1
                chain.copy(self.script[slot] if slot < len(self.script) and slot % 7 else 0)


class Stumbling(ScriptedDrafter):
    """Right on most slots, wrong on every fifth."""

    def draft(self, chain, pending, slot):
        while not chain.stop:
            slot += 1
            token = self.script[slot] if slot < len(self.script) and slot % 5 else 0
            logits = torch.linspace(0, 1, self.vocab_size)
            logits[token] = 2.0 + slot % 7
            chain.extend(logits)


def texts(target, eos, prompts=PROMPTS) -> list[list[int]]:
    return [generate(target, prompt, max_new_tokens=LIMIT, eos=eos).tokens for prompt in prompts]


def recorded_items(target, drafters: list[Drafter], eos, prompts=PROMPTS) -> list[TracedItem]:
    items = []
    for seed, (prompt, output, drafter) in enumerate(zip(prompts, texts(target, eos, prompts), drafters, strict=True)):
        beyond = continuation(target, prompt, output, K) if output[-1] in eos else []
        chains = record_chains(target, drafter, prompt, output, beyond, K)
        items.append(TracedItem(f"item-{seed}", seed, tuple(prompt), LIMIT, tuple(output), chains, tuple(beyond)))
    return items


def drafters_of(kind: str, target) -> list[Drafter]:
    if kind in HEADS:
        return [exit_drafter(target, exit_layer=2, rows=40, **HEADS[kind])] * len(PROMPTS)
    if kind == "medusa":
        return [medusa_drafter(target, rows=40, heads=4)] * len(PROMPTS)
    beyond = [generate(target, prompt, max_new_tokens=LIMIT + K).tokens for prompt in PROMPTS]
    kinds = {"stumbling": Stumbling, "brief": Brief}
    return [kinds[kind](prompt, text) for prompt, text in zip(PROMPTS, beyond, strict=True)]


@pytest.fixture(scope="module", params=[*HEADS, "medusa", "stumbling", "brief"])
def case(request):
    target = tiny_target(seed=3)
    # A token that ends one of the outputs early, inside what may be an accepted draft.
    eos = {texts(target, ())[1][17]}
    drafters = drafters_of(request.param, target)
    return target, eos, drafters, Trace(FACTS, tuple(recorded_items(target, drafters, eos)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rounds_are_those_of_live_decoding(case, settings):
    target, eos, drafters, trace = case
    live, again = make_controller(settings), make_controller(settings)
    for controller in (live, again):
        equip_for(controller, trace, COSTS)
    found = replay(again, trace)
    for item, prompt, drafter, rounds in zip(trace.items, PROMPTS, drafters, found, strict=True):
        made = generate(target, prompt, drafter=drafter, controller=live, max_new_tokens=LIMIT, eos=eos, seed=item.seed)
        assert tuple(made.tokens) == item.output
        assert [(r.drafted, r.accepted, r.stop) for r in made.rounds] == rounds


@pytest.mark.parametrize("case", HEADS, indirect=True)
def test_a_batch_of_positions_drafts_what_one_at_a_time_does(case):
    target, _, drafters, trace = case
    for item, prompt, drafter in zip(trace.items, PROMPTS, drafters, strict=True):

        class OneByOne(type(drafter)):
            draft_text = Drafter.draft_text

        slow = OneByOne(drafter.head, drafter.exit_layer)
        chains = record_chains(target, slow, prompt, item.output, item.beyond, K)
        assert (chains.drafted == item.chains.drafted).all()
        assert (chains.match == item.chains.match).all()
        for name in ("confidence", "probability", "entropy"):
            assert getattr(chains, name) == pytest.approx(getattr(item.chains, name), abs=1e-5)


def test_traces_survive_the_disk(case, tmp_path: Path):
    trace = case[-1]
    write_trace(trace, tmp_path / "trace.safetensors")
    again = read_trace(tmp_path / "trace.safetensors")
    assert again.facts == trace.facts
    for one, other in zip(again.items, trace.items, strict=True):
        assert (one.prompt, one.output, one.beyond) == (other.prompt, other.output, other.beyond)
        for name, values in vars(other.chains).items():
            if hasattr(values, "dtype"):
                np.testing.assert_array_equal(getattr(one.chains, name), values)
