"""The early-exit head and drafter of EESD (arXiv 2406.03853): the target's first N layers, one trained layer, a head.

Drafting runs the first N target layers on every drafted token and keeps their states, so verification starts at layer
N and no layer runs twice on a token; of a tree, all nodes of a level at once. The exit layer has a key-value cache of
its own; it holds states of accepted tokens only once a round is over, so what is drafted depends on the accepted prefix
alone.

Two additions of ours. A *lens*: the layer's output is only a correction to a linear map, fitted in closed form, from
the state at the exit to the target's final state. *Deep context*: layer and lens also read the final state of the
position before, which verification leaves behind for free; later in a draft the head's own estimate stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eesd.drafting.base import DRAFT_ROOM, DRAFTERS, TEXT_BATCH, Draftable, Drafter, Growable, Prompt, Verified
from eesd.drafting.stored import fill_head, read_head
from eesd.drafting.vocabulary import prompt_vocabulary
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.config import ModelConfig
from eesd.models.draft_steps import draft_steps
from eesd.models.special import fingerprint
from eesd.models.transformer import Layer, LayerCaches, RMSNorm, Rotary, Transformer, head_logits, linear, run_layers

if TYPE_CHECKING:
    from eesd.models.engine import Engine, Packed
    from eesd.models.graphs import GraphEngine


class ExitHead(nn.Module):
    """One transformer layer and an output head over `rows` tokens; all state arguments are [batch, seq, hidden].

    token_ids [rows]: the token of every row, most frequent first; None means all tokens in their own order.
    lens: estimate the final state by a linear map of the state at the exit, the context and the layer's output,
    instead of the layer's output alone. deep: read a context, the normalised final state of the position before.
    """

    packed: Packed | None = None  # set by `pack`: the engine that runs whole steps
    follows_prompt = False  # its rarest rows give way to tokens of the prompt; its rows are the target's own

    def __init__(self, config: ModelConfig, token_ids: Tensor | None, lens: bool = False, deep: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.lens, self.deep = lens, deep
        self.layer = Layer(config)
        self.norm = RMSNorm(size, config.norm_eps)
        self.head = nn.Linear(size, config.vocab_size if token_ids is None else len(token_ids), bias=False)
        if deep:
            self.fuse = nn.Linear(size, size, bias=False)
        if lens:
            self.estimate = nn.Linear((3 if deep else 2) * size, size)
        self.register_buffer("token_ids", token_ids)

    def enter(self, states: Tensor, context: Tensor | None) -> Tensor:
        """What the layer reads: the states at the exit, with the context mixed in."""
        return states + linear(context, self.fuse.weight) if self.deep else states

    def leave(self, states: Tensor, context: Tensor | None, hidden: Tensor) -> Tensor:
        """The estimate of the target's normalised final states, given the layer's output `hidden`."""
        if not self.lens:
            return self.norm(hidden)
        return linear(self.parts(states, context, hidden), self.estimate.weight) + self.estimate.bias

    def parts(self, states: Tensor, context: Tensor | None, hidden: Tensor) -> Tensor:
        """What the lens maps [batch, seq, inputs]: states at the exit, context if there is one, and the layer's output,
        each normalised."""
        parts = [F.rms_norm(states, states.shape[-1:], eps=self.norm.eps), context, self.norm(hidden)]
        return torch.cat([part for part in parts if part is not None], -1)

    def logits(self, estimate: Tensor) -> Tensor:
        """Draft logits [.., rows] of estimated final states."""
        return head_logits(estimate, None, self.head.weight)

    def begin(self, prompt: Sequence[int], target: Transformer) -> Tensor | None:
        """Make the rows those for drafts after this prompt; the token of every row, None: all in their own order."""
        if not self.follows_prompt:
            return self.token_ids
        ids = prompt_vocabulary(self.token_ids, prompt)
        self.head.weight.copy_(target.head_weight[ids])
        if target.engine:
            target.engine.repack(self.head.weight)
        return ids

    def pack(self, engine: Engine | GraphEngine | None) -> None:
        """Let the target's engine, if it has one, take over the head's weights."""
        if engine:
            engine.pack(self.layer)
            engine.pack(self.head.weight)
            self.packed = engine.pack_exit(
                self.layer, self.norm, self.fuse if self.deep else None, self.estimate if self.lens else None
            )

    def step(
        self,
        states: Tensor,
        context: Tensor | None,
        rotary: Rotary,
        cache: KVCache,
        slots: int | Tensor = 0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int = 1,
    ) -> Tensor:
        """Process states at cache slots from `slots` on; the estimates [batch, last, hidden] at the last of them.

        slots, positions, mask: as in `Transformer.run`.
        """
        if self.packed:
            caches = LayerCaches(cache.keys, cache.values)
            done = self.packed.engine.exit_step(
                self.packed, rotary, states, context, caches, slots, positions, mask, last
            )
            if done is not None:
                return done
        entered = self.enter(states, context)
        hidden = run_layers([self.layer], rotary, entered, [cache.layer(0)], slots, positions, mask)
        kept = slice(states.shape[1] - last, None)
        return self.leave(states[:, kept], None if context is None else context[:, kept], hidden[:, kept])


def load_exit_head(path: Path | str, target: Transformer, model: str) -> tuple[ExitHead, dict[str, Any]]:
    """The head in a folder and its card, ready to draft for this target; EesdError as in `read_head`."""
    card, tensors = read_head(path, "exit_layer", target, model)
    target.config.check_exit_layer(card["exit_layer"])
    with torch.device("meta"):
        ids, lens, deep = tensors.get("token_ids"), "estimate.weight" in tensors, "fuse.weight" in tensors
        head = ExitHead(target.config, ids, lens, deep)
    if "head.weight" not in tensors:  # tied: the target's own rows
        tensors["head.weight"] = target.head_weight if ids is None else target.head_weight[ids]
    fill_head(head, tensors, target, path)
    head.follows_prompt = card["settings"].get("vocabulary") == "prompt" and ids is not None
    head.pack(target.engine)
    return head, card


@DRAFTERS.register("exit_head")
class ExitHeadDrafter(Drafter):
    """Drafts a chain or a tree with a trained exit head on the target's first `exit_layer` layers."""

    branched = False  # the last draft was a tree, whose entries in the exit layer's cache are not where a chain's are

    def __init__(self, head: ExitHead, exit_layer: int, card: Mapping[str, Any] | None = None) -> None:
        self.head = head
        self.exit_layer, self.card = exit_layer, card
        self.vocabulary = head.token_ids
        self.cache: KVCache | None = None

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> ExitHeadDrafter:
        """Load the head in folder `head_path`; its card says at which layer it exits."""
        if "head_path" not in settings:
            raise EesdError("Drafter exit_head needs a trained head. Add `head: <name of a head>` to the method.")
        head, card = load_exit_head(settings["head_path"], target, fingerprint(model_dir))
        return cls(head, card["exit_layer"], card)

    def begin(self, prompt: Prompt) -> None:
        """Choose the draft vocabulary and fill the exit layer's cache with the prompt."""
        self.target, self.target_cache = prompt.target, prompt.cache
        self.vocabulary = self.head.begin(prompt.tokens, prompt.target)
        if self.cache is None or self.cache.capacity < prompt.cache.capacity:
            self.cache = prompt.target.new_cache(prompt.cache.capacity, num_layers=1)
        # Of accepted tokens that the exit layer has not processed as verified: states [1, n, hidden], and contexts
        # [1, n + 1, hidden] for them and the pending token.
        self.unseen, self.contexts = prompt.states[:, :0], None
        before = None
        if self.head.deep:
            after = self.target.norm(prompt.final)
            before, self.contexts = F.pad(after[:, :-1], (0, 0, 1, 0)), after[:, -1:]
        self.head.step(prompt.states, before, self.target.rotary, self.cache, last=0)
        self.steps = draft_steps(self.target, self.head, self.exit_layer, self.target_cache, self.cache)

    def draft(self, chain: Draftable, pending: int, slot: int) -> Tensor | None:
        """One target pass of N layers and one exit-layer step for every drafted token."""
        self.branched = False
        if not chain.stop and self.steps and self.steps.begin(self.unseen, self.contexts, slot, chain.limit):
            while not chain.stop:
                pending = int(chain.extend(self.steps.step(pending), self.vocabulary))
            return self.steps.states()
        # Filled on the device: copying a number there would wait for it.
        states, token = [], torch.full((1, 1), pending, device=self.target.device)
        fresh, context = self.unseen, self.contexts
        while not chain.stop:
            state = self.target.run(self.target.embed(token), slice(0, self.exit_layer), self.target_cache, slot)
            states.append(state)
            fresh = torch.cat((fresh, state), 1)
            estimate = self.head.step(fresh, context, self.target.rotary, self.cache, slot + 1 - fresh.shape[1])
            token, slot = chain.extend(self.head.logits(estimate)[0, 0], self.vocabulary).view(1, 1), slot + 1
            fresh, context = state[:, :0], estimate if self.head.deep else None
        return torch.cat(states, 1) if states else None

    def draft_tree(self, tree: Growable, slot: int) -> Tensor | None:
        """One target pass of N layers and one exit-layer step for every level; a node's context is its parent's
        estimate."""
        target, states, seen = self.target, [], []
        estimates = self.contexts
        while not tree.stop:
            nodes = tree.frontier
            place = tree.place(nodes, slot, target)
            tokens = torch.tensor([[tree.tokens[node] for node in nodes]], device=target.device)
            fresh = target.run(target.embed(tokens), slice(0, self.exit_layer), self.target_cache, *place)
            states.append(fresh)
            context = estimates
            if not seen:  # before the settled token come those that the exit layer has not processed as verified
                fresh, place = torch.cat((self.unseen, fresh), 1), (slot - self.unseen.shape[1],)
            elif self.head.deep:
                context = estimates[:, [seen.index(tree.parents[node]) for node in nodes]]
            estimates = self.head.step(fresh, context, target.rotary, self.cache, *place, last=len(nodes))
            tree.grow(self.head.logits(estimates)[0], self.vocabulary)
            seen, estimates = nodes, estimates if self.head.deep else None
        self.branched = not tree.linear
        return torch.cat(states, 1) if states else None

    def draft_text(
        self, target: Transformer, tokens: Sequence[int], prompt_tokens: int, chains: Sequence[Draftable]
    ) -> None:
        """As in the base class, with the chains of many positions in one batch; a row's numbers stay its own."""
        text, device = torch.tensor([tokens], device=target.device), target.device
        self.vocabulary = self.head.begin(tokens[:prompt_tokens], target)
        cache = target.new_cache(len(tokens) + DRAFT_ROOM, num_layers=self.exit_layer)
        own = target.new_cache(len(tokens) + DRAFT_ROOM, num_layers=1)
        states = target.run(target.embed(text), slice(0, self.exit_layer), cache)
        context = None
        if self.head.deep:
            final = target.run(states, slice(self.exit_layer, None), target.new_cache(len(tokens)))
            context = F.pad(target.norm(final)[:, :-1], (0, 0, 1, 0))
        estimates = self.head.step(states, context, target.rotary, own, last=len(tokens) - prompt_tokens)[0]
        for first in range(0, len(chains), TEXT_BATCH):
            block = chains[first : first + TEXT_BATCH]
            rows = torch.zeros(len(block), dtype=torch.long, device=device)
            block_cache, block_own = copy(cache), copy(own)
            block_cache.take_rows(rows)
            block_own.take_rows(rows)
            last = estimates[first : first + len(block), None]
            slots = torch.arange(first, first + len(block), device=device)[:, None] + prompt_tokens
            while True:
                logits = self.head.logits(last)[:, 0]
                drafted = [chain.extend(row, self.vocabulary) for chain, row in zip(block, logits, strict=True)]
                if block[0].stop:
                    break
                slots = slots + 1
                ids = torch.stack(drafted)[:, None]
                states = target.run(target.embed(ids), slice(0, self.exit_layer), block_cache, slots)
                context = last if self.head.deep else None
                last = self.head.step(states, context, target.rotary, block_own, slots)

    def accept(self, verified: Verified) -> None:
        """Note what the exit layer still has to process: after estimated contexts, or at slots of a tree, all accepted
        tokens again; of another drafter's round all; else the last drafted token, which it never saw."""
        drafted, accepted = len(verified.drafted) if verified.own else 0, verified.accepted
        if drafted:
            self.unseen = verified.states[:, :0]
        first = min(drafted, 1) if self.head.deep or self.branched else drafted
        self.unseen = torch.cat((self.unseen, verified.states[:, first : accepted + 1]), 1)
        if self.head.deep:
            kept = self.target.norm(verified.final[:, : accepted + 1])
            self.contexts = kept if drafted else torch.cat((self.contexts, kept), 1)
