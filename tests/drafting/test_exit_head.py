"""The exit head step by step equals the exit head over a sequence, and drafts only tokens of its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eesd.decoding.chain import Chain
from eesd.decoding.sampling import Sampling
from eesd.distill.rollout import rollout
from eesd.drafting import DRAFTERS, Prompt
from eesd.drafting.exit_head import ExitHeadDrafter
from eesd.errors import EesdError
from eesd.models.engine import attach_engine
from eesd.models.transformer import LayerCaches
from tests.toys import VOCAB, exit_drafter, needs_compiler, tiny_head, tiny_target

GREEDY = Sampling()


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 3, 2], [10]])
@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, False), (False, True), (True, True)])
def test_steps_equal_the_whole_sequence(pieces, lens, deep):
    target = tiny_target()
    head = tiny_head(target, rows=20, lens=lens, deep=deep)
    states, context = torch.randn(2, 1, 10, target.config.hidden_size)
    whole = rollout(head, states, context, target.rotary, depth=1, first=0, later=0)[0]
    cache, slot = target.new_cache(10, num_layers=1), 0
    for piece, before in zip(states.split(pieces, 1), context.split(pieces, 1), strict=True):
        estimate = head.step(piece, before if deep else None, target.rotary, cache, slot)
        slot += piece.shape[1]
        torch.testing.assert_close(estimate[:, 0], whole[:, slot - 1], rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_engine_runs_whole_steps(dtype, lens, deep):
    """torch's numbers within rounding, and the same bit for bit in pieces, of a text longer than one block of rows."""
    target = tiny_target()
    head = tiny_head(target, rows=20, lens=lens, deep=deep)
    for weight in head.parameters():
        weight.copy_(weight.bfloat16())
    target, head = target.to(dtype), head.to(dtype)
    states, context = torch.randn(2, 1, 90, target.config.hidden_size).to(dtype)
    context = context if deep else None

    def steps(pieces):
        cache, found, slot = target.new_cache(90, num_layers=1), [], 0
        for size in pieces:
            part = slice(slot, slot + size)
            before = None if context is None else context[:, part]
            found.append(head.step(states[:, part], before, target.rotary, cache, slot, last=min(size, 70)))
            slot += size
        return torch.cat(found, 1)

    with torch.inference_mode():
        plain = steps([90])
        head.pack(attach_engine(target, "cpp"))
        whole = steps([90])
        assert plain.shape == whole.shape == (1, 70, target.config.hidden_size)
        assert (whole - plain).abs().mean() < (1e-5 if dtype == torch.float32 else 0.02)
        assert torch.equal(steps([20, 1, 3, 66])[:, -70:], whole)
    with torch.no_grad():
        head.norm.weight.mul_(2)
        cache = target.new_cache(90, num_layers=1)
        caches = LayerCaches(cache.keys, cache.values)
        changed = head.packed.engine.exit_step(head.packed, target.rotary, states, context, caches, 0, None, None, 1)
    assert changed is None, "weights that changed after packing must not be used as they were"


@pytest.mark.parametrize("lens", [False, True])
def test_training_sees_the_estimates_that_decoding_makes(lens):
    """The estimates of a draft that follows the text are those of the rollout, depth by depth, at every position."""
    target = tiny_target(seed=2)
    head = tiny_head(target, lens=lens, deep=True)
    tokens = torch.randint(0, VOCAB, (1, 14))
    states = target.run(target.embed(tokens), slice(0, 2))
    final = target.run(states, slice(2, None))
    context = F.pad(target.norm(final)[:, :-1], (0, 0, 1, 0))
    first, later = 1, 3
    rolled = rollout(head, states, context, target.rotary, depth=4, first=first, later=later)
    assert [x.shape[1] for x in rolled] == [13, 11, 11, 11]
    for begin in range(4, 10):
        cache, drafter = target.new_cache(32), ExitHeadDrafter(head, 2)
        early = target.run(target.embed(tokens[:, :begin]), slice(0, 2), cache)
        late = target.run(early, slice(2, None), cache)
        drafter.begin(Prompt(target, cache, tokens[0, :begin].tolist(), early, late))
        chain = Scripted(tokens[0, begin + 1 : begin + 5].tolist(), head)
        drafter.draft(chain, int(tokens[0, begin]), begin)
        for depth, found in enumerate(chain.seen):
            expected = head.logits(rolled[depth][0, begin + depth - (later if depth else first)])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, True)])
@pytest.mark.parametrize("window", [None, 3])
def test_where_a_text_begins_in_its_batch_does_not_matter(lens, deep, window):
    """Texts of 6 and 9 positions whose last 5 are the answers: each as if it were alone."""
    target = tiny_target(window=window)
    head = tiny_head(target, lens=lens, deep=deep)
    texts = [torch.randn(2, 1, n, target.config.hidden_size) for n in (6, 9)]
    starts = torch.tensor([3, 0])
    states, context = torch.cat(
        [F.pad(text, (0, 0, int(start), 0)) for text, start in zip(texts, starts, strict=True)], 1
    )
    together = rollout(head, states, context, target.rotary, depth=3, first=2, later=4, starts=starts)
    assert all(estimates.isfinite().all() for estimates in together)
    for row, text in enumerate(texts):
        later = text.shape[2] - 5
        alone = rollout(head, *text, target.rotary, depth=3, first=later, later=later)
        for estimates, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(estimates[row, -5:], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lens", "deep"), [(False, False), (True, True)])
def test_products_in_bfloat16_change_little(lens, deep):
    target = tiny_target(qk_norm=True)
    head = tiny_head(target, lens=lens, deep=deep)
    states, context = torch.randn(2, 3, 40, target.config.hidden_size)
    starts = torch.tensor([0, 7, 20])
    exact = rollout(head, states, context, target.rotary, 3, 20, 20, starts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rollout(head, states, context, target.rotary, 3, 20, 20, starts)
    for found, expected in zip(rounded, exact, strict=True):
        assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()


class Scripted:
    """A chain that follows a text and keeps the draft logits it was offered."""

    def __init__(self, tokens, head):
        self.tokens, self.seen, self.stop, self.limit = tokens, [], "", len(tokens)

    def extend(self, logits, vocabulary=None):
        self.seen.append(logits)
        self.stop = "k_max" if len(self.seen) == len(self.tokens) else ""
        return torch.tensor(self.tokens[len(self.seen) - 1])


def test_drafted_tokens_are_in_the_draft_vocabulary():
    from eesd.control import make_controller

    target = tiny_target()
    drafter = exit_drafter(target, exit_layer=2, rows=5)
    cache = target.new_cache(64)
    states = target.run(target.embed(torch.tensor([[1, 2, 3]])), slice(0, 2), cache)
    drafter.begin(Prompt(target, cache, [1, 2, 3], states, target.run(states, slice(2, None), cache)))
    chain = Chain(make_controller({"name": "static", "k": 8}), 8, GREEDY, None)
    drafted = drafter.draft(chain, 4, 3)
    assert drafted.shape == (1, 8, target.config.hidden_size)
    assert max(chain.tokens) < 5
    assert chain.stop == "k_max"


def test_a_budget_below_the_cap_ends_a_draft_by_length():
    from eesd.control import make_controller

    chain = Chain(make_controller({"name": "static", "k": 8}), 2, GREEDY, None)
    while not chain.stop:
        chain.extend(torch.tensor([0.0, 1.0]))
    assert (chain.tokens, chain.stop) == ([1, 1], "length")
    assert Chain(None, 5, GREEDY, None).stop == "none"


def test_a_certain_token_has_confidence_one_and_no_law():
    from eesd.control import make_controller

    controller, seen = make_controller({"name": "beta_ts"}), []
    controller.keep_drafting = lambda signal: seen.append(signal) or len(seen) < 3
    chain = Chain(controller, 9, Sampling(1.0), torch.Generator().manual_seed(0))
    chain.extend(torch.tensor([0.0, 1.0]))
    while not chain.stop:
        chain.copy(7)
    assert (chain.tokens[1:], chain.laws[1:], chain.stop) == ([7, 7], [None, None], "controller")
    assert [(s.position, s.confidence, s.probability, s.entropy) for s in seen[1:]] == [(2, 1, 1, 0), (3, 1, 1, 0)]


def test_settings_without_a_head_are_refused():
    with pytest.raises(EesdError, match="needs a trained head"):
        DRAFTERS["exit_head"].build({}, tiny_target(), Path("x"))
    with pytest.raises(EesdError, match="Did you mean 'exit_head'"):
        DRAFTERS["exit_haed"]
