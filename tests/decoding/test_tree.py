"""Trees of drafted tokens: a chain is one of width 1, nothing is lost, and rejected branches leave nothing behind."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eesd.control import make_controller
from eesd.decoding import generate as generate_module
from eesd.decoding import tree as tree_module
from eesd.decoding.generate import GREEDY, generate
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching, Tree, follow, verify_tree
from eesd.drafting import Prompt
from eesd.drafting.exit_head import ExitHead, ExitHeadDrafter
from eesd.errors import EesdError
from eesd.models.cache import read
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target
from eesd.models.passes import Passes
from eesd.models.transformer import Transformer
from tests.toys import ScriptedDrafter, exit_drafter, medusa_drafter, planted_tree, tiny_target

PROMPT = [3, 1, 4, 1, 5]
FIXED = ((0,), (1,), (2,), (0, 0), (0, 1), (2, 1), (0, 0, 0), (2, 1, 0))
TREES = [Branching(3, 2), Branching(12, 3), Branching(30, 8), Branching(len(FIXED), paths=FIXED)]


def static(k: int):
    return make_controller({"name": "static", "k": k})


def confident(tau: float):
    return make_controller({"name": "confidence", "tau": tau, "k_max": 6})


# ---- the chain among the trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["torch", None])
@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, True)])
def test_a_tree_of_width_one_is_the_chain(dtype, engine, lens, deep):
    """Tokens, rounds and reasons, also under rules that look at signals and learn from rounds."""
    target = tiny_target(dtype=dtype)
    attach_engine(target, engine)
    drafter = exit_drafter(target, 2, 40, lens, deep)
    drafter.head.pack(target.engine)
    rules = [{"name": "static", "k": 5}, {"name": "beta_ts"}, {"name": "svip"}, {"name": "draft_verify", "k_max": 5}]
    for seed, rule in product(range(2), rules):
        controller = make_controller(rule)
        decode = {"drafter": drafter, "controller": controller, "max_new_tokens": 40, "seed": seed}
        chain = generate(target, [seed, *PROMPT], **decode)
        tree = generate(target, [seed, *PROMPT], branching=Branching(controller.k_max), **decode)
        assert (tree.tokens, tree.rounds) == (chain.tokens, chain.rounds)


def test_medusa_chains_are_trees_of_first_candidates():
    target = tiny_target()
    decode = {"drafter": medusa_drafter(target), "controller": static(3), "max_new_tokens": 40}
    chain = generate(target, PROMPT, **decode)
    for branching in (Branching(3), Branching(3, paths=((0,), (0, 0), (0, 0, 0)))):
        tree = generate(target, PROMPT, branching=branching, **decode)
        assert (tree.tokens, tree.rounds) == (chain.tokens, chain.rounds)


# ---- nothing is lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branching", TREES, ids=str)
@pytest.mark.parametrize("kind", ["exit", "lens", "deep", "medusa"])
@pytest.mark.parametrize("changes", [{}, {"window": 6}, {"qk_norm": True}], ids=str)
def test_greedy_output_is_the_targets(branching, kind, changes):
    target = tiny_target(dtype=torch.float64, **changes)
    for seed, rows in enumerate((None, 30, 40)):
        drafter = (
            medusa_drafter(target, rows)
            if kind == "medusa"
            else exit_drafter(target, seed + 1, rows, kind != "exit", kind == "deep")
        )
        prompt = [seed, 7, 2 * seed, 11]
        vanilla = generate(target, prompt, max_new_tokens=40)
        for controller in (static(5), make_controller({"name": "beta_ts"}), confident(0.3)):
            found = generate(
                target,
                prompt,
                drafter=drafter,
                controller=controller,
                branching=branching,
                max_new_tokens=40,
                seed=seed,
            )
            assert found.tokens == vanilla.tokens
            assert max(r.drafted for r in found.rounds) <= branching.nodes


def test_siblings_save_rounds():
    target = tiny_target()
    decode = {"drafter": exit_drafter(target, 2), "controller": static(4), "max_new_tokens": 100}
    rounds = [len(generate(target, PROMPT, branching=Branching(12, width), **decode).rounds) for width in (1, 3, 6)]
    assert rounds[0] > rounds[1] > rounds[2]


def every_output(run: Callable[[], list[int]]) -> dict[tuple[int, ...], float]:
    """The exact law of what `run` returns: it is run once for every outcome of its draws."""
    law, scripts = defaultdict(float), [()]
    while scripts:
        script, seen = scripts.pop(), []

        def draw(weights: Tensor, _, script=script, seen=seen) -> Tensor:
            seen.append(weights.double() / weights.double().sum())
            return torch.tensor(script[len(seen) - 1] if len(seen) <= len(script) else 0)

        with pytest.MonkeyPatch.context() as patch:
            for module in (generate_module, tree_module):
                patch.setattr(module, "draw", draw)
            output = run()
        if len(seen) > len(script):
            scripts += [(*script, token) for token in seen[len(script)].nonzero()[:, 0].tolist()]
        else:
            law[tuple(output)] += math.prod(float(p[token]) for p, token in zip(seen, script, strict=True))
    return law


def targets_law(
    target: Transformer, prompt: list[int], length: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    law = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, share in law.items():
            hidden = target.run(target.embed(torch.tensor([[*prompt, *tokens]])), slice(None))
            following = sampling.probabilities(target.logits(hidden[0, -1]))
            longer |= {(*tokens, x): share * float(p) for x, p in enumerate(following) if p > 0}
        law = longer
    return law


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=2), Sampling(1.5, top_p=0.8)], ids=str)
@pytest.mark.parametrize("kind", ["exit", "deep", "medusa"])
@pytest.mark.parametrize(
    "branching", [Branching(3), Branching(5, 2), Branching(3, paths=((0,), (1,), (1, 0)))], ids=str
)
def test_sampled_output_has_exactly_the_targets_law(sampling, kind, branching):
    """Four tokens, enumerated over all draws of whole generations."""
    target = tiny_target(dtype=torch.float64, vocab_size=3, num_layers=2)
    drafter = medusa_drafter(target, 2, 2) if kind == "medusa" else exit_drafter(target, 1, 2, False, kind == "deep")
    accepted = Counter()

    def run() -> list[int]:
        found = generate(
            target,
            [1, 2],
            drafter=drafter,
            controller=static(3),
            branching=branching,
            sampling=sampling,
            max_new_tokens=4,
        )
        accepted[found.rounds[0].accepted] += 1
        return found.tokens

    law, expected = every_output(run), targets_law(target, [1, 2], 4, sampling)
    assert law.keys() == expected.keys()
    for tokens, share in expected.items():
        assert law[tokens] == pytest.approx(share, abs=1e-12)
    assert len(accepted) > 1


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.permutations(range(5)), st.integers(0, 5))
def test_following_a_drawn_token_is_multi_round_rejection(weights, order, children):
    """Accept child x with probability p(x), else take x out of p: the same law over children and others as one draw."""
    p = torch.tensor(weights, dtype=torch.float64) + 1e-3
    p = p / p.sum()
    tree = planted_tree([(0, token) for token in order[:children]])
    one_draw = defaultdict(float)
    for token in range(5):
        drawn = iter([token, 5])  # 5 is no child's token
        path, own = follow(tree, lambda _, drawn=drawn: next(drawn))
        one_draw[tree.tokens[path[0]] if path else own] += float(p[token])
    rejection, left, rest = defaultdict(float), 1.0, p.clone()
    for token in order[:children]:
        rejection[token] += left * float(rest[token])
        left *= 1 - float(rest[token])
        rest[token] = 0
        rest = rest / rest.sum() if rest.sum() > 0 else rest
    for token in range(5):
        rejection[token] += left * float(rest[token])
        assert rejection[token] == pytest.approx(one_draw[token], abs=1e-12)


# ---- rejected branches leave nothing behind -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exit", "deep", "medusa"])
@pytest.mark.parametrize("engine", ["torch", None])
def test_the_cache_is_that_of_a_fresh_prefill(kind, engine):
    target = tiny_target()
    attach_engine(target, engine)
    drafter = medusa_drafter(target) if kind == "medusa" else exit_drafter(target, 2, None, True, kind == "deep")
    cache = target.new_cache(len(PROMPT) + 60 + 40)
    found = generate(
        target,
        PROMPT,
        drafter=drafter,
        controller=static(4),
        branching=Branching(14, 5),
        max_new_tokens=60,
        cache=cache,
    )
    assert 0 < sum(r.accepted for r in found.rounds) < sum(r.drafted for r in found.rounds)
    text = [*PROMPT, *found.tokens[:-1]]
    fresh = target.new_cache(len(text))
    target.run(target.embed(torch.tensor([text])), slice(None), fresh)
    for i in range(target.config.num_layers):
        ours, theirs = (read(held.layer(i), len(text)) for held in (cache, fresh))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_is_drafted_depends_on_the_accepted_prefix_alone(lens, deep):
    """Every tree of a generation is the one that a drafter makes which has read the prefix as a prompt."""
    target = tiny_target(seed=3, dtype=torch.float64)
    drafter, seen = exit_drafter(target, 2, None, lens, deep), []
    original = drafter.draft_tree

    def noting(tree, slot):
        states = original(tree, slot)
        seen.append((slot, tree))
        return states

    drafter.draft_tree = noting
    branching = Branching(9, 3)
    found = generate(
        target, PROMPT, drafter=drafter, controller=confident(0.05), branching=branching, max_new_tokens=40
    )
    assert len({r.accepted for r in found.rounds}) > 2
    text = [*PROMPT, *found.tokens]
    for slot, tree in seen:
        cache = target.new_cache(slot + 40)
        states = target.run(target.embed(torch.tensor([text[:slot]])), slice(0, 2), cache)
        fresh = exit_drafter(target, 2, None, lens, deep)
        fresh.begin(Prompt(target, cache, text[:slot], states, target.run(states, slice(2, None), cache)))
        again = Tree(branching, text[slot], confident(0.05), tree.limit, GREEDY, None)
        fresh.draft_tree(again, slot)
        assert (again.tokens, again.parents, again.kept) == (tree.tokens, tree.parents, tree.kept)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cut", [0, 2])
def test_a_node_sees_its_ancestors_and_no_sibling(window, cut):
    """Final states of every node are those of its path run alone; `cut` layers have run on some nodes before."""
    target = tiny_target(dtype=torch.float64, window=window)
    tree = planted_tree([(0, 7), (0, 8), (1, 9), (1, 10), (2, 9), (5, 11), (3, 12), (0, 13)])
    tree.kept = [1, 2, 3, 5, 6, 7]  # two branches end early
    tree.expanded = [0, 1, 2, 5]
    slot, cache = len(PROMPT), target.new_cache(40)
    target.run(target.embed(torch.tensor([PROMPT])), slice(None), cache)
    states = None
    if cut:
        parts = []
        for nodes in ([0], [1, 2], [5]):
            ids = torch.tensor([[tree.tokens[node] for node in nodes]])
            parts.append(target.run(target.embed(ids), slice(0, cut), cache, *tree.place(nodes, slot, target)))
        states = torch.cat(parts, 1)
    # Those that drafting has run on come first.
    found, order = {}, [0, 1, 2, 5, 3, 6, 7] if cut else [0, *tree.kept]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "accept_path", lambda tree, nodes, _: found.update(rows=nodes) or ([], 0))
        verified = verify_tree(Passes(target, cache, cut), tree, states, slot)
    assert found["rows"] == order
    for row, node in enumerate([0, *tree.kept]):
        path = [tree.tokens[ancestor] for ancestor in tree.lines[node]]
        alone = target.run(target.embed(torch.tensor([[*PROMPT, *path]])), slice(None))
        torch.testing.assert_close(verified.final[0, row], alone[0, -1])


def test_no_layer_runs_twice_on_a_node(monkeypatch):
    target = tiny_target()
    runs = dict.fromkeys(range(4), 0)
    for index, layer in enumerate(target.layers):
        forward = layer.forward

        def counted(hidden, *rest, index=index, forward=forward):
            runs[index] += hidden.shape[1]
            return forward(hidden, *rest)

        monkeypatch.setattr(layer, "forward", counted)
    found = generate(
        target,
        PROMPT,
        drafter=exit_drafter(target, 2),
        controller=static(3),
        branching=Branching(99, 3),
        max_new_tokens=30,
    )
    verified = len(PROMPT) + len(found.rounds) + sum(r.drafted for r in found.rounds)
    # 99 nodes keep whatever was made, so what ran in the first layers is what is verified.
    assert runs == dict.fromkeys(range(4), verified)


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 2, 3, 7])
def test_stops_after_the_first_eos_inside_an_accepted_path(position):
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=20).tokens
    eos = vanilla[position]
    found = generate(
        target,
        PROMPT,
        drafter=exit_drafter(target),
        controller=static(5),
        branching=Branching(15, 3),
        max_new_tokens=20,
        eos={eos},
    )
    assert (found.tokens, found.finish) == (vanilla[: vanilla.index(eos) + 1], "eos")


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 11])
def test_gives_exactly_max_new_tokens_otherwise(limit):
    target = tiny_target()
    vanilla = generate(target, PROMPT, max_new_tokens=20).tokens
    for drafter in (exit_drafter(target), medusa_drafter(target)):
        found = generate(
            target, PROMPT, drafter=drafter, controller=static(4), branching=Branching(20, 4), max_new_tokens=limit
        )
        assert (found.tokens, found.finish) == (vanilla[:limit], "length")
        assert all(r.stop in ("length", "none") for r in found.rounds[-1:])


def test_trees_fit_behind_the_end_of_the_models_context():
    """Slots of siblings may lie beyond the last position; their positions do not."""
    target = tiny_target(max_positions=24)
    decode = {"drafter": exit_drafter(target, 2), "controller": static(6), "branching": Branching(30, 6)}
    found = generate(target, PROMPT, max_new_tokens=19, **decode)
    assert found.tokens == generate(target, PROMPT, max_new_tokens=19).tokens


def test_drafters_of_chains_say_so():
    target = tiny_target()
    drafter = ScriptedDrafter(PROMPT, [1, 2, 3])
    with pytest.raises(EesdError, match="ScriptedDrafter drafts chains, no trees"):
        generate(target, PROMPT, drafter=drafter, controller=static(3), branching=Branching(5, 2))


# ---- the real model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_engine_and_torch_decode_the_same_trees_on_the_embedded_model(embedded_model: Path):
    target = load_target(embedded_model, "float32")
    torch.manual_seed(0)
    # An untrained head near the target's own: its last layer, norm and head on the states after layer 26.
    head = ExitHead(target.config, torch.arange(target.config.vocab_size))
    head.layer.load_state_dict(target.layers[-1].state_dict())
    head.norm.load_state_dict(target.norm.state_dict())
    head.head.weight = target.head_weight
    drafter = ExitHeadDrafter(head.requires_grad_(False).eval(), 26)
    prompt = [504, 3575, 282, 4649, 314]
    found = []
    for engine in ("torch", "auto"):
        attach_engine(target, engine)
        decode = {"max_new_tokens": 24}
        vanilla = generate(target, prompt, **decode).tokens
        tree = generate(target, prompt, drafter=drafter, controller=static(3), branching=Branching(8, 3), **decode)
        assert tree.tokens == vanilla
        assert sum(r.accepted for r in tree.rounds) > 0
        found.append((tree.tokens, tree.rounds))
    assert found[0] == found[1]
