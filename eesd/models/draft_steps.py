"""Steps of an exit head in one call each: embedding, the target's first layers, the exit layer, the draft head.

    steps = draft_steps(target, head, exit_layer, cache, own)   # None where the C++ engine does not take them
    if steps.begin(unseen, contexts, slot, most=8):
        logits = steps.step(token)                              # [rows], for each token in turn
        states = steps.states()                                 # [1, drafted, hidden] after the first layers

The numbers are those of `Transformer.run`, `ExitHead.step` and `ExitHead.logits`, bit for bit; between their calls lies
a tenth of a draft step of Python.
"""

from __future__ import annotations

from ctypes import addressof, byref, c_int32, c_int64, c_void_p, pointer
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eesd.models.engine import Engine, Plan
from eesd.models.kernels import structs
from eesd.models.kernels.layout import BLOCK_ROWS, fits
from eesd.models.passes import embedding_fits
from eesd.models.transformer import LayerCaches

if TYPE_CHECKING:
    from eesd.drafting.exit_head import ExitHead
    from eesd.models.cache import KVCache
    from eesd.models.transformer import Transformer

# Tokens of one draft that there is room for.
ROOM = 64


def draft_steps(
    target: Transformer, head: ExitHead, exit_layer: int, cache: KVCache, own: KVCache
) -> DraftSteps | None:
    """Steps on these caches, the target's and the head's; None where the engine does not take them."""
    engine, rows = target.engine, getattr(head.head.weight, "packed", None)
    if not isinstance(engine, Engine) or torch.is_grad_enabled() or not (head.packed and rows):
        return None
    plan = engine.plan(list(target.layers)[:exit_layer], target.dtype)
    current = head.packed.engine is rows.engine is engine and head.packed.current()
    current = current and [head.head.weight._version] == rows.versions
    laid_out = embedding_fits(target) and all(fits(one.keys, one.values, target.dtype) for one in (cache, own))
    return DraftSteps(target, head, plan, cache, own) if plan and current and laid_out else None


class DraftSteps:
    """See the module docstring; made by `draft_steps`."""

    def __init__(self, target: Transformer, head: ExitHead, plan: Plan, cache: KVCache, own: KVCache) -> None:
        engine, config, exit_layer = target.engine, target.config, len(plan.packs)
        self.library, self.deep, self.outputs = engine.library, head.deep, len(head.head.weight)
        rows, embedding = head.head.weight.packed, target.embedding.weight
        angles = engine.angles(target.rotary, cache.capacity)
        self.keep = plan, rows, head.packed, angles, embedding, cache, own  # alive as long as what points to them
        self.drafting = structs.Drafting(
            pointer(plan.shape),
            addressof(plan.pointers),
            pointer(head.packed.struct),
            pointer(rows.struct),
            embedding.data_ptr(),
            exit_layer,
        )
        caches = LayerCaches(cache.keys[:exit_layer], cache.values[:exit_layer]), LayerCaches(own.keys, own.values)
        self.first, self.last = (structs.call_on(config.window, one, angles) for one in caches)
        for call in (self.first, self.last):
            call.batch = call.seq = 1
        self.rows = torch.empty(BLOCK_ROWS + ROOM, config.hidden_size, dtype=target.dtype)
        self.estimates = torch.empty(ROOM, config.hidden_size, dtype=target.dtype)
        self.row_bytes = config.hidden_size * self.rows.element_size()
        self.width = -(-self.outputs // engine.panel) * engine.panel

    def begin(self, unseen: Tensor, contexts: Tensor | None, slot: int, most: int) -> bool:
        """Begin a draft of at most so many tokens whose first one lies at `slot`; False if there is no room for it.

        unseen [1, n, hidden]: states before it that the exit layer has yet to process; contexts [1, n + 1, hidden]:
        what a deep head reads with these and the first.
        """
        self.before, self.drafted = unseen.shape[1], 0
        if self.before >= BLOCK_ROWS or most > ROOM:
            return False
        self.rows[: self.before] = unseen[0]
        self.contexts = contexts.contiguous() if self.deep else None
        places = range(slot - self.before, slot + most)
        self.places = (c_int32 * len(places))(*places)
        return True

    def step(self, token: int) -> Tensor:
        """Draft logits [rows] of the token that follows `token`."""
        first, last, place = self.first, self.last, self.before + self.drafted
        first.output = self.rows.data_ptr() + place * self.row_bytes
        first.slots = first.positions = addressof(self.places) + 4 * place
        last.input, last.slots, last.positions = first.output, first.slots, first.positions
        last.seq, last.output = 1, self.estimates.data_ptr() + self.drafted * self.row_bytes
        context = last.output - self.row_bytes if self.deep else None
        if not self.drafted:
            last.seq = place + 1
            last.input = self.rows.data_ptr()
            last.slots = last.positions = addressof(self.places)
            context = self.contexts.data_ptr() if self.deep else None
        logits = torch.empty(self.width)
        self.library.eesd_draft_step(
            byref(self.drafting),
            c_int64(token),
            byref(first),
            byref(last),
            c_void_p(context),
            c_void_p(logits.data_ptr()),
        )
        self.drafted += 1
        return logits[: self.outputs]

    def states(self) -> Tensor:
        """States [1, drafted, hidden] of the tokens that were given, after the target's first layers."""
        return self.rows[None, self.before : self.before + self.drafted].clone()
