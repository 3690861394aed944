"""The decode loop: every method goes through it, vanilla decoding being the one with nothing drafted.

    generation = generate(target, prompt_ids, drafter=drafter, controller=controller, max_new_tokens=128, eos={2})

A round drafts a chain, or with `branching` a tree, after the last accepted token, verifies it in one pass of the
target's remaining layers, and ends with one token of the target's own: a correction after a rejected token, a bonus
after an accepted chain. With `lookup` a second drafter takes the rounds for which it has something to propose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eesd.control import Controller
from eesd.decoding.chain import Chain
from eesd.decoding.clock import Clock
from eesd.decoding.sampling import Sampling, accept_greedy, accept_sampled, draw
from eesd.decoding.tree import Branching, Tree, verify_tree
from eesd.drafting import Drafter, Prompt, Verified
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.passes import Passes
from eesd.models.transformer import Transformer

GREEDY = Sampling()
OnTokens = Callable[[Sequence[int], str], None]


@dataclass(frozen=True)
class Source:
    """Who drafts, who ends its drafts, and whether these are trees instead of chains."""

    drafter: Drafter
    controller: Controller
    branching: Branching | None = None


@dataclass(frozen=True)
class Round:
    """One draft and its verification; `accepted` counts drafted tokens only, without the target's own.

    drafted: tokens that were verified, of a tree all its nodes. stop: why drafting ended, as in `Draft` and `Tree`, or
    `drafter` when it had nothing more to propose. looked_up: whether `lookup` drafted it.
    """

    drafted: int
    accepted: int
    stop: str
    looked_up: bool = False


@dataclass
class Generation:
    """What one generation leaves behind. `finish` is `eos` or `length`; `seconds` is split by part of the loop."""

    tokens: list[int]
    rounds: list[Round]
    finish: str
    seconds: dict[str, float]


@torch.inference_mode()
def generate(
    target: Transformer,
    prompt: Sequence[int],
    *,
    drafter: Drafter | None = None,
    controller: Controller | None = None,
    branching: Branching | None = None,
    lookup: Source | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 128,
    eos: Collection[int] = (),
    seed: int = 0,
    cache: KVCache | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continue `prompt` (token ids) until the first end-of-sequence token or `max_new_tokens`.

    The law of the output is the target's own whatever the drafter: token by token its argmax when greedy (unless
    `branching` asks for typical acceptance). `branching`: draft trees of this kind instead of chains. `lookup` is
    asked before the drafter, every round; its drafter shares no layers with the target. `cache` is reused if it is
    large enough. `on_tokens(ids, kind)` is told of tokens as they are settled: `target` for the target's own,
    `accepted` for drafted ones. Raises EesdError when the prompt is empty or does not fit the model's context.
    """
    _check_length(target, prompt, max_new_tokens)
    if (drafter is None) != (controller is None) or ((branching or lookup) and not drafter):
        raise EesdError("A drafter and a controller go together: give both, or neither for vanilla decoding.")
    if lookup and (lookup.branching or lookup.drafter.exit_layer):
        raise EesdError("What goes before a drafter drafts chains and shares no layers with the target.")
    generator = torch.Generator(target.device).manual_seed(seed)
    own = Source(drafter, controller, branching) if drafter else None
    sources = [source for source in (lookup, own) if source]
    for source in sources:
        source.controller.reset(seed)
    needed = len(prompt) + max_new_tokens + (branching.room(controller.k_max) if branching else 0)
    if cache is None or cache.capacity < needed:
        cache = target.new_cache(needed)
    clock = Clock(target.device)
    output = Output(max_new_tokens, frozenset(eos), on_tokens)
    passes = Passes(target, cache, drafter.exit_layer if drafter else 0)
    logits = _prefill(target, prompt, cache, sources, passes.cut)
    first = int(logits[0].argmax() if sampling.greedy else draw(sampling.probabilities(logits[0]), generator))
    clock.lap("prefill")
    output.add([first], 0)
    if on_tokens:
        clock.skip()

    rounds = []
    while not output.finish:
        slot, pending = len(prompt) + len(output.tokens) - 1, output.tokens[-1]
        source = lookup if lookup and lookup.drafter.proposes(pending, slot) else own
        asked = source.controller if source else None
        shared = (asked, output.budget - 1, sampling, generator, clock.lap, target.engine)
        draft = Tree(source.branching, pending, *shared) if source and source.branching else Chain(*shared)
        verified = _draft_and_verify(passes, source, draft, pending, slot, drafter)
        for one in sources:
            one.drafter.accept(verified if one is source else replace(verified, own=False))
        clock.lap("verify")
        stop = draft.stop or "drafter"
        if asked:
            asked.update(draft.depth, verified.accepted, stop)
        clock.lap("control")
        looked_up = source is not None and source is lookup
        rounds.append(Round(len(verified.drafted), verified.accepted, stop, looked_up))
        output.add([*verified.drafted[: verified.accepted], verified.token], verified.accepted)
        if on_tokens:
            clock.skip()
    return Generation(output.tokens, rounds, output.finish, clock.finish())


class Output:
    """Settled tokens with the one rule of ending: the first end-of-sequence token, else exactly `limit` tokens."""

    def __init__(self, limit: int, eos: frozenset[int], on_tokens: OnTokens | None) -> None:
        self.limit, self.eos, self.on_tokens = limit, eos, on_tokens
        self.tokens: list[int] = []
        self.finish = ""

    @property
    def budget(self) -> int:
        """Tokens that may still come."""
        return self.limit - len(self.tokens)

    def add(self, tokens: list[int], accepted: int) -> None:
        """Append a round's tokens, the first `accepted` of them drafted, and cut after an end of sequence."""
        end = next((i for i, token in enumerate(tokens) if token in self.eos), None)
        kept = tokens if end is None else tokens[: end + 1]
        self.tokens += kept
        if end is not None:
            self.finish = "eos"
        elif self.budget <= 0:
            self.finish = "length"
        if self.on_tokens:
            for part, kind in ((kept[:accepted], "accepted"), (kept[accepted:], "target")):
                if part:
                    self.on_tokens(part, kind)


def _check_length(target: Transformer, prompt: Sequence[int], max_new_tokens: int) -> None:
    if not prompt or max_new_tokens < 1:
        raise EesdError("Decoding needs a prompt of at least one token and max_new_tokens of at least 1.")
    limit = target.config.max_positions
    if len(prompt) + max_new_tokens > limit:
        raise EesdError(
            f"The prompt has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that exceeds the model's "
            f"context of {limit}. Shorten the prompt or lower max_new_tokens."
        )


def _prefill(target: Transformer, prompt: Sequence[int], cache: KVCache, sources: Sequence[Source], cut: int) -> Tensor:
    """Run the prompt through all layers, the drafter's exit at `cut`; logits [1, vocab] after its last token."""
    states = target.embed(torch.tensor([prompt], device=target.device))
    states = target.run(states, slice(0, cut), cache)
    final = target.run(states, slice(cut, None), cache)
    for source in sources:
        source.drafter.begin(Prompt(target, cache, prompt, states, final))
    return target.logits(final[0, -1:])


def _draft_and_verify(
    passes: Passes, source: Source | None, draft: Chain | Tree, pending: int, slot: int, drafter: Drafter | None
) -> Verified:
    """Let a source fill a draft, None leaving it empty, and verify it from the exit of `drafter` on."""
    if isinstance(draft, Tree):
        states = source.drafter.draft_tree(draft, slot)
        draft.lap("draft")
        return verify_tree(passes, draft, states, slot)
    states = source.drafter.draft(draft, pending, slot) if source else None
    draft.lap("draft")
    return _verify_chain(passes, draft, pending, states, slot, drafter and drafter.vocabulary)


def _verify_chain(
    passes: Passes, chain: Chain, pending: int, states: Tensor | None, slot: int, vocabulary: Tensor | None
) -> Verified:
    """One pass over the last settled token and a chain, and what of the chain the target accepts."""
    # Where a pass is one call it takes numbers; else they stay on the device, to be read once with the verdict.
    found = passes.run([pending, *(chain.tokens if passes.fused else chain.ids)], states, slot)
    if chain.sampling.greedy:
        best = found.choices()
        best = chain.read(best) if isinstance(best, Tensor) else best
        accepted, token = accept_greedy(chain.tokens, best)
    else:
        laws = chain.sampling.probabilities(found.logits)
        accepted, token = accept_sampled(chain.tokens, chain.laws, vocabulary, laws, chain.generator)
    return Verified(pending, chain.tokens, accepted, token, found.states, found.final)
