"""The decode loop on toy models: rounds, losslessness, ends, lengths, timing."""

from __future__ import annotations

import pytest
import torch

from eesd.bench.trace import record_chains
from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from tests.toys import ScriptedDrafter, SilentDrafter, exit_drafter, needs_compiler, tiny_target

PROMPT = [3, 1, 4, 1, 5]
CONTROLLERS = [
    {"name": "static", "k": 1},
    {"name": "static", "k": 5},
    {"name": "beta_ts"},
    {"name": "beta_ts", "k_max": 2},
]


def static(k: int):
    return make_controller({"name": "static", "k": k})


def test_drafter_that_is_always_right_gives_k_plus_one_tokens_a_round():
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=26).tokens
    found = generate(target, PROMPT, drafter=ScriptedDrafter(PROMPT, vanilla), controller=static(4), max_new_tokens=26)
    assert found.tokens == vanilla
    # The first token comes from the prefill, the other 25 from five rounds of 4 + 1.
    assert [(r.drafted, r.accepted) for r in found.rounds] == [(4, 4)] * 5


def test_drafter_that_is_always_wrong_gives_one_token_a_round():
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=20).tokens
    drafter = ScriptedDrafter(PROMPT, vanilla, error=1)
    found = generate(target, PROMPT, drafter=drafter, controller=static(3), max_new_tokens=20)
    assert found.tokens == vanilla
    assert len(found.rounds) == 19
    assert all(r.accepted == 0 for r in found.rounds)


def test_drafter_with_nothing_to_propose_is_vanilla():
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=6)
    found = generate(target, PROMPT, drafter=SilentDrafter(), controller=static(3), max_new_tokens=6)
    assert found.tokens == vanilla.tokens
    # For the last token there is no room for a draft.
    assert [(r.drafted, r.accepted, r.stop) for r in found.rounds] == [(0, 0, "drafter")] * 4 + [(0, 0, "none")]


def test_a_drafter_is_told_what_verification_found():
    target = tiny_target(dtype=torch.float64)
    vanilla = generate(target, PROMPT, max_new_tokens=13).tokens
    drafter = ScriptedDrafter(PROMPT, vanilla[:6])  # past the script it is wrong
    told, prompts = [], []
    drafter.accept = told.append
    begin = drafter.begin
    drafter.begin = lambda prompt: prompts.append(prompt) or begin(prompt)
    found = generate(target, PROMPT, drafter=drafter, controller=static(3), max_new_tokens=13)
    assert found.tokens == vanilla
    hidden = target.run(target.embed(torch.tensor([[*PROMPT, *vanilla]])), slice(None))
    prompt = prompts[0]
    assert prompt.tokens == PROMPT
    torch.testing.assert_close(prompt.final, hidden[:, : len(PROMPT)])
    slot, settled = len(PROMPT), vanilla[:1]
    for verified in told:
        kept = verified.accepted + 1
        torch.testing.assert_close(verified.final[:, :kept], hidden[:, slot : slot + kept])
        assert verified.final.shape == verified.states.shape == (1, len(verified.drafted) + 1, hidden.shape[-1])
        settled += [*verified.drafted[: verified.accepted], verified.token]
        slot += kept
    assert settled[:13] == vanilla


def test_vanilla_is_the_loop_without_a_drafter():
    target = tiny_target()
    found = generate(target, PROMPT, max_new_tokens=6)
    tokens = list(PROMPT)
    for _ in range(6):
        hidden = target.run(target.embed(torch.tensor([tokens])), slice(None))
        tokens.append(int(target.logits(hidden[0, -1]).argmax()))
    assert found.tokens == tokens[len(PROMPT) :]
    assert [(r.drafted, r.accepted, r.stop) for r in found.rounds] == [(0, 0, "none")] * 5


@pytest.mark.parametrize("controller", CONTROLLERS, ids=str)
@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize("rows", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deep", [False, True])
def test_greedy_exit_head_is_lossless(controller, exit_layer, rows, dtype, deep):
    target = tiny_target(dtype=dtype)
    drafter = exit_drafter(target, exit_layer, rows, lens=deep, deep=deep)
    for seed in range(5):
        prompt = [seed, 7, 2 * seed, 11]
        vanilla = generate(target, prompt, max_new_tokens=40)
        found = generate(
            target, prompt, drafter=drafter, controller=make_controller(controller), max_new_tokens=40, seed=seed
        )
        assert found.tokens == vanilla.tokens


def test_exit_head_equal_to_the_target_is_always_accepted():
    """Layers 0-2 and a copy of layer 3 are the target: any stale state or cache entry would cost an acceptance."""
    target = tiny_target()
    found = generate(target, PROMPT, drafter=exit_drafter(target), controller=static(3), max_new_tokens=41)
    assert [(r.drafted, r.accepted) for r in found.rounds] == [(3, 3)] * 10


def test_no_layer_runs_twice_on_an_accepted_token(monkeypatch):
    target = tiny_target()
    runs = dict.fromkeys(range(4), 0)
    for index, layer in enumerate(target.layers):
        forward = layer.forward

        def counted(hidden, *rest, index=index, forward=forward):
            runs[index] += hidden.shape[1]
            return forward(hidden, *rest)

        monkeypatch.setattr(layer, "forward", counted)
    generate(target, PROMPT, drafter=exit_drafter(target), controller=static(3), max_new_tokens=41)
    # The prompt, then 10 rounds of 4 tokens: the last token of the output is never fed.
    assert runs == dict.fromkeys(range(4), len(PROMPT) + 40)


@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_is_drafted_depends_on_the_accepted_prefix_alone(lens, deep):
    """Replay rests on this: a round cut elsewhere leaves the same drafter state behind."""
    target = tiny_target(seed=3)
    vanilla = generate(target, PROMPT, max_new_tokens=30).tokens

    def drafts(k: int) -> dict[int, list[int]]:
        drafter, seen = exit_drafter(target, 2, None, lens, deep), {}
        original = drafter.draft

        def noting(chain, pending, slot):
            states = original(chain, pending, slot)
            seen[slot] = list(chain.tokens)
            return states

        drafter.draft = noting
        found = generate(target, PROMPT, drafter=drafter, controller=static(k), max_new_tokens=30)
        assert found.tokens == vanilla
        assert 0 < sum(r.accepted for r in found.rounds) < sum(r.drafted for r in found.rounds)
        return seen

    short, long = drafts(2), drafts(5)
    common = set(short) & set(long)
    assert len(common) > 5
    for slot in common:
        length = min(len(short[slot]), len(long[slot]))
        assert short[slot][:length] == long[slot][:length]


@pytest.mark.parametrize("position", [1, 2, 3, 7])
def test_stops_after_the_first_eos_even_inside_an_accepted_draft(position):
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=20).tokens
    eos = vanilla[position]
    expected = vanilla[: vanilla.index(eos) + 1]
    for drafter in (None, ScriptedDrafter(PROMPT, vanilla)):
        controller = static(5) if drafter else None
        found = generate(target, PROMPT, drafter=drafter, controller=controller, max_new_tokens=20, eos={eos})
        assert found.tokens == expected
        assert found.finish == "eos"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 11])
def test_gives_exactly_max_new_tokens_otherwise(limit):
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=20).tokens
    drafter = ScriptedDrafter(PROMPT, vanilla)
    found = generate(target, PROMPT, drafter=drafter, controller=static(4), max_new_tokens=limit)
    assert found.tokens == vanilla[:limit]
    assert found.finish == "length"


def test_sampled_output_is_reproducible_and_follows_its_seed():
    target = tiny_target()
    drafter = exit_drafter(target, exit_layer=1, rows=30)

    def sample(seed):
        return generate(
            target,
            PROMPT,
            drafter=drafter,
            controller=static(3),
            sampling=Sampling(1.0),
            max_new_tokens=30,
            seed=seed,
        ).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("engine", ["torch", None])
def test_a_reused_cache_changes_nothing(engine):
    target = tiny_target()
    attach_engine(target, engine)
    cache = target.new_cache(64)
    cache.keys.normal_()
    cache.values.normal_()
    fresh = generate(target, PROMPT, max_new_tokens=20).tokens
    assert generate(target, PROMPT, max_new_tokens=20, cache=cache).tokens == fresh


def test_seconds_add_up_and_tokens_are_streamed():
    target = tiny_target()
    told: list[tuple[list[int], str]] = []
    found = generate(
        target,
        PROMPT,
        drafter=exit_drafter(target),
        controller=make_controller({"name": "beta_ts"}),
        max_new_tokens=20,
        on_tokens=lambda tokens, kind: told.append((list(tokens), kind)),
    )
    assert [token for tokens, _ in told for token in tokens] == found.tokens
    assert sum(len(tokens) for tokens, kind in told if kind == "accepted") == sum(r.accepted for r in found.rounds)
    parts = {part: s for part, s in found.seconds.items() if part != "total"}
    assert sum(parts.values()) == pytest.approx(found.seconds["total"])
    assert min(parts.values()) >= 0


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [([], 5, "at least one token"), ([1], 0, "at least 1"), ([1] * 200, 100, "exceeds the model's context of 256")],
)
def test_impossible_lengths_are_refused(prompt, limit, message):
    with pytest.raises(EesdError, match=message):
        generate(tiny_target(), prompt, max_new_tokens=limit)


def test_drafter_without_controller_is_refused():
    target = tiny_target()
    with pytest.raises(EesdError, match="go together"):
        generate(target, PROMPT, drafter=exit_drafter(target))


@needs_compiler
@pytest.mark.parametrize("branching", [None, Branching(nodes=3)])
def test_controllers_and_traces_are_shown_the_numbers_of_the_engine(monkeypatch, branching):
    """Live chains, trees and traces alike: what the engine says of a law is all that a controller hears of it."""
    target, heard = tiny_target(), []
    attach_engine(target, "cpp")
    told = iter([0.5 + i / 1000 for i in range(400)])
    monkeypatch.setattr(target.engine, "softmax_statistics", lambda logits: (next(told), 2.0))
    controller = make_controller({"name": "confidence", "k_max": 3, "tau": 0.1})
    monkeypatch.setattr(controller, "keep_drafting", lambda signal: heard.append(signal) or True)
    options = {"controller": controller, "branching": branching, "max_new_tokens": 9}
    generate(target, PROMPT, drafter=exit_drafter(target, 2), **options)
    assert [signal.confidence for signal in heard] == [0.5 + i / 1000 for i in range(len(heard))]
    assert {signal.entropy for signal in heard} == {2.0}
    assert all(signal.probability == signal.confidence for signal in heard)
    with torch.inference_mode():
        chains = record_chains(target, exit_drafter(target, 2), PROMPT, [7, 8, 9], (), 3)
    assert (chains.entropy == 2.0).all()


def test_time_spent_telling_tokens_is_nobodys(monkeypatch):
    from time import sleep

    target = tiny_target()
    found = generate(target, PROMPT, max_new_tokens=5, on_tokens=lambda *_: sleep(0.05))
    assert found.seconds["total"] < 0.2  # five calls took 0.25 s
