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
from eesd.models.transformer import Transformer
from eesd.models.verify_steps import Pass, verify_steps

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
    verifier = Verifier(target, cache, drafter)
    logits = _prefill(target, prompt, cache, sources, verifier.cut)
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
        verified = verifier.draft_and_verify(source, draft, pending, slot)
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


class Verifier:
    """Passes of a target over drafted tokens, from the exit of `drafter` on."""

    def __init__(self, target: Transformer, cache: KVCache, drafter: Drafter | None) -> None:
        self.target, self.cache, self.drafter = target, cache, drafter
        self.cut = drafter.exit_layer if drafter else 0
        self.steps = verify_steps(target, self.cut, cache)

    def draft_and_verify(self, source: Source | None, draft: Chain | Tree, pending: int, slot: int) -> Verified:
        """Let a source fill a draft, None leaving it empty, and verify it."""
        if isinstance(draft, Tree):
            states = source.drafter.draft_tree(draft, slot)
            draft.lap("draft")
            return verify_tree(self.target, draft, states, slot, self.cache, self.drafter)
        states = source.drafter.draft(draft, pending, slot) if source else None
        draft.lap("draft")
        return self._verify_chain(draft, pending, states, slot)

    def _verify_chain(self, chain: Chain, pending: int, states: Tensor | None, slot: int) -> Verified:
        """One pass over the last settled token and a chain, and what of the chain the target accepts."""
        found = self.run([pending, *(chain.tokens if self.steps else chain.ids)], states, slot)
        if chain.sampling.greedy:
            best = chain.read(found.choices()) if found.best is None else found.best
            accepted, token = accept_greedy(chain.tokens, best)
        else:
            laws, vocabulary = chain.sampling.probabilities(found.logits), self.drafter and self.drafter.vocabulary
            accepted, token = accept_sampled(chain.tokens, chain.laws, vocabulary, laws, chain.generator)
        return Verified(pending, chain.tokens, accepted, token, found.states, found.final)

    def run(self, tokens: Sequence[int | Tensor], states: Tensor | None, slot: int) -> Pass:
        """The layers that tokens, numbers or scalars on the device, have not had yet, and logits after each.

        states [1, n, hidden]: those of the first tokens at the exit; slot: of the first token.
        """
        if self.steps and (found := self.steps.verify(tokens, states, slot)):
            return found
        done = 0 if states is None else states.shape[1]
        if done < len(tokens):
            rest = self.target.embed(_on_device(tokens, self.target.device)[None, done:])
            rest = self.target.run(rest, slice(0, self.cut), self.cache, slot + done)
            states = rest if states is None else torch.cat((states, rest), 1)
        final = self.target.run(states, slice(self.cut, None), self.cache, slot)
        return Pass(states, final, self.target.logits(final[0]))


def _on_device(tokens: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """Tokens [n], of which some may be scalars on the device already."""
    if len(tokens) > 1 and all(isinstance(token, int) for token in tokens):
        return torch.tensor(tokens, device=device)
    # A number that is filled in, unlike one that is copied, does not make the host wait for the device.
    scalars = [token if isinstance(token, Tensor) else torch.full((), token, device=device) for token in tokens]
    return torch.stack(scalars)
