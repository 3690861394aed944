"""A pass in one call gives the numbers of the calls that it joins, bit for bit, and torch's choice of them."""

from __future__ import annotations

import pytest
import torch

from eesd.control import make_controller
from eesd.decoding.generate import Source, generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching
from eesd.drafting.assistant import AssistantDrafter
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.drafting.lookup import LookupDrafter
from eesd.drafting.self_sd import SelfSDDrafter, Skips
from eesd.models import passes as module
from eesd.models.engine import attach_engine
from eesd.models.kernels.layout import BLOCK_ROWS
from eesd.models.passes import FusedPasses, Passes
from tests.toys import exit_drafter, medusa_drafter, needs_compiler, tiny_target

pytestmark = needs_compiler
PROMPT = [1, 2, 3, 4, 5]


def packed(dtype=torch.float32, **changes):
    target = tiny_target(dtype=dtype, **changes)
    attach_engine(target, "cpp")
    return target


def begun(target, exit_layer=0, prompt=PROMPT, capacity=190):
    """Passes on a cache that holds the prompt."""
    cache = target.new_cache(capacity)
    target.run(target.embed(torch.tensor([prompt])), slice(None), cache)
    return Passes(target, cache, exit_layer)


def separate(target, exit_layer, tokens, slot, prompt=PROMPT):
    """States at the exit and after all layers, logits, and the cache, by separate calls."""
    passes = begun(target, 0, prompt)
    at_exit = target.run(target.embed(torch.tensor([tokens])), slice(0, exit_layer), passes.cache, *slot)
    final = target.run(at_exit, slice(exit_layer, None), passes.cache, *slot)
    return at_exit, final, target.logits(final[0]), passes.cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"tied_head": True, "hidden_size": 64}])
@pytest.mark.parametrize("exit_layer", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_pass_is_bit_for_bit_that_of_separate_calls(dtype, changes, exit_layer, count):
    target, tokens = packed(dtype, **changes), [7 + i for i in range(count)]
    for prompt in (PROMPT, PROMPT * 12):  # the longer one ends before the border of a chunk of the cache
        with torch.inference_mode():
            at_exit, final, logits, cache = separate(target, exit_layer, tokens, (len(prompt),), prompt)
            for done in sorted({0, count - 1, count}):
                passes = begun(target, exit_layer, prompt)
                fed = [torch.tensor(token) if token % 2 else token for token in tokens]
                given = at_exit[:, :done] if done else None
                if done:  # which has filled the first layers' cache
                    embedded = target.embed(torch.tensor([tokens[:done]]))
                    target.run(embedded, slice(0, exit_layer), passes.cache, len(prompt))
                found = passes.fused.run(fed, given, len(prompt), None, None)
                assert torch.equal(found.states, at_exit)
                assert torch.equal(found.final, final)
                assert torch.equal(found.logits, logits)
                assert found.choices() == logits.argmax(-1).tolist()
                assert torch.equal(passes.cache.keys, cache.keys)
                assert torch.equal(passes.cache.values, cache.values)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_numbers_do_not_depend_on_threads(threads):
    target = packed(torch.bfloat16)
    with torch.inference_mode():
        expected = begun(target, 2).run([7, 8, 9], None, len(PROMPT))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = begun(target, 2).run([7, 8, 9], None, len(PROMPT))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("done", [0, 2])
def test_nodes_of_a_tree_have_places_of_their_own(done):
    """Two branches of two tokens each after a first one."""
    target, slot = packed(torch.bfloat16), len(PROMPT)
    slots = torch.tensor([[slot, slot + 1, slot + 2, slot + 3, slot + 4]])
    positions = torch.tensor([[slot, slot + 1, slot + 1, slot + 2, slot + 2]])
    mask = torch.ones(1, 1, 5, slot + 5, dtype=torch.bool)
    mask[0, 0, :, slot:] = torch.eye(5, dtype=torch.bool)
    mask[..., slot] = mask[0, 0, 3, slot + 1] = mask[0, 0, 4, slot + 2] = True
    place = slots, positions, mask
    with torch.inference_mode():
        at_exit, final, logits, _ = separate(target, 2, [7, 8, 9, 10, 11], place)
        passes = begun(target, 2)
        first = slots[:, :done], positions[:, :done], mask[..., :done, :]
        if done:
            target.run(target.embed(torch.tensor([[7, 8]])), slice(0, 2), passes.cache, *first)
        found = passes.fused.run([7, 8, 9, 10, 11], at_exit[:, :done] if done else None, *place)
        assert torch.equal(found.states, at_exit)
        assert torch.equal(found.final, final)
        assert torch.equal(found.logits, logits)


@pytest.mark.parametrize("vocab_size", [40, 2000, 5001])
def test_of_equal_logits_the_first_is_chosen_and_what_is_no_number_before_all(vocab_size):
    target, last = tiny_target(vocab_size=vocab_size), vocab_size - 1
    rows = target.head_weight
    with torch.no_grad():
        # Four rows that are each the greatest for some states, and equal to two others.
        rows[:4] = 60 * torch.randn(4, target.config.hidden_size).sign()
        rows[last - 4 : last] = rows[last // 2 - 4 : last // 2] = rows[:4]
    for strange in ([], [last], [last // 2, last], [5, last // 2]):
        rows.data[strange] = float("nan")
        attach_engine(target, "cpp")
        with torch.inference_mode():
            found = begun(target).run([7, 8, 9, 10, 11, 12], None, len(PROMPT))
        assert found.best == found.logits.argmax(-1).tolist()
        if strange:
            assert set(found.best) == {strange[0]}
        else:
            top = found.logits.max(-1, keepdim=True).values
            assert max((found.logits == top).sum(-1).tolist()) == 3


def head_drafter(target):
    drafter = exit_drafter(target, 2, rows=20, lens=True, deep=True)
    drafter.head.pack(target.engine)
    return drafter


def assistant(target):
    other = tiny_target(seed=1, dtype=target.dtype)
    attach_engine(other, "cpp")
    return AssistantDrafter(other, target)


TREE = {"branching": Branching(nodes=6, width=3)}
METHODS = {
    "vanilla": lambda target: {},
    "exit_head": lambda target: {"drafter": head_drafter(target)},
    "exit_head_tree": lambda target: {"drafter": head_drafter(target), **TREE},
    "medusa": lambda target: {"drafter": medusa_drafter(target)},
    "medusa_tree": lambda target: {"drafter": medusa_drafter(target), **TREE},
    "early_exit": lambda target: {"drafter": EarlyExitDrafter(2)},
    "self_sd": lambda target: {"drafter": SelfSDDrafter(target, Skips({1, 2}, {3}))},
    "assistant": lambda target: {"drafter": assistant(target)},
    "lookup_first": lambda target: {
        "drafter": head_drafter(target),
        "lookup": Source(LookupDrafter(3), make_controller({"name": "static", "k": 3})),
    },
}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_takes_one_call_a_pass_and_says_the_same(name, sampling, monkeypatch):
    target = packed(torch.bfloat16)
    method = METHODS[name](target)
    if method:
        method["controller"] = make_controller({"name": "static", "k": 4})

    def decode():
        return generate(target, PROMPT * 3, **method, sampling=sampling, seed=3, max_new_tokens=40)

    made, run = [], FusedPasses.run
    monkeypatch.setattr(FusedPasses, "run", lambda *given: made.append(run(*given)) or made[-1])
    fused = decode()
    drafted = sum(one.drafted for one in fused.rounds)
    drafts_by_passes = name in ("early_exit", "self_sd", "assistant")
    assert len(made) == len(fused.rounds) + (drafted if drafts_by_passes else 0)
    assert None not in made
    monkeypatch.setattr(module, "fused_passes", lambda *_: None)
    plain = decode()
    assert (fused.tokens, fused.rounds) == (plain.tokens, plain.rounds)


def test_what_does_not_fit_is_left_to_separate_calls():
    target = packed()
    with torch.inference_mode():
        fused = begun(target, capacity=BLOCK_ROWS + 10).fused
        assert fused.run([1] * BLOCK_ROWS, None, 10, None, None)
        assert fused.run([1] * BLOCK_ROWS, None, 11, None, None) is None, "the cache ends"
        assert fused.run([1] * (BLOCK_ROWS + 1), None, 5, None, None) is None
        assert Passes(target, target.new_cache(20), target.config.num_layers).fused is None, "nothing left to run"
        with pytest.raises(IndexError):
            begun(target).run([1, target.config.vocab_size], None, 5)
    assert Passes(target, target.new_cache(20)).fused is None, "autograd is on"


@pytest.mark.parametrize("what", ["layer", "head"])
def test_weights_that_changed_since_they_were_packed_are_not_used(what):
    target = packed()
    with torch.no_grad():
        assert Passes(target, target.new_cache(20)).fused
        {"layer": target.layers[1].o.weight, "head": target.head_weight}[what].mul_(2)
        assert Passes(target, target.new_cache(20)).fused is None


def test_models_of_other_types_are_left_to_torch():
    target = packed()
    with torch.no_grad():
        assert Passes(target.double(), target.new_cache(20)).fused is None
        target = packed(torch.bfloat16)
        target.embedding.float()
        assert Passes(target, target.new_cache(20)).fused is None


def test_without_the_engine_there_is_no_one_call():
    target = tiny_target()
    attach_engine(target, "torch")
    with torch.no_grad():
        assert Passes(target, target.new_cache(20)).fused is None


def test_a_model_whose_head_is_not_packed_is_left_to_torch():
    target = packed()
    target.head_weight.packed = None
    with torch.no_grad():
        assert Passes(target, target.new_cache(20)).fused is None
