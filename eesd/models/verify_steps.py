"""A pass of the target over a few tokens in one call: embedding, layers, norm, head and the greedy choice.

    steps = verify_steps(target, exit_layer, cache)     # None where the C++ engine does not take them
    found = steps.verify([5, 7], states, slot)           # of tokens that lie from `slot` on
    found.logits, found.best

The numbers are those of `Transformer.embed`, `run` and `logits`, bit for bit; between their calls lies a tenth of a
vanilla token of Python, whose own data the weights have driven out of the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int32, c_int64, c_void_p, pointer
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eesd.models.engine import Engine, Plan
from eesd.models.kernels import structs
from eesd.models.kernels.layout import BLOCK_ROWS, fits
from eesd.models.kernels.packing import vector
from eesd.models.transformer import LayerCaches

if TYPE_CHECKING:
    from eesd.models.cache import KVCache
    from eesd.models.transformer import Transformer


class Pass(NamedTuple):
    """States [1, n, hidden] at the exit and after all layers, and logits [n, vocab], which the next pass overwrites.

    best: the token of the greatest logit of every row, where it is known already.
    """

    states: Tensor
    final: Tensor
    logits: Tensor
    best: list[int] | None = None

    def choices(self) -> list[int] | Tensor:
        """The token of the greatest logit of every row; a tensor [n] where nobody has waited for the device yet."""
        return self.logits.argmax(-1) if self.best is None else self.best


def verify_steps(target: Transformer, exit_layer: int, cache: KVCache) -> VerifySteps | None:
    """Passes on this cache, from the exit on for tokens that have states there; None where the engine takes none."""
    engine, rows = target.engine, getattr(target.head_weight, "packed", None)
    if not isinstance(engine, Engine) or torch.is_grad_enabled() or not (rows and rows.engine is engine):
        return None
    plan = engine.plan(list(target.layers), target.dtype)
    current = [target.head_weight._version] == rows.versions
    current = current and exit_layer < len(target.layers)
    laid_out = fits(cache.keys, cache.values, target.dtype)
    return VerifySteps(target, plan, exit_layer, cache) if plan and current and laid_out else None


class VerifySteps:
    """See the module docstring; made by `verify_steps`."""

    def __init__(self, target: Transformer, plan: Plan, exit_layer: int, cache: KVCache) -> None:
        engine, rows, embedding = target.engine, target.head_weight.packed, target.embedding.weight
        self.library, self.vocab, self.capacity = engine.library, len(target.head_weight), cache.capacity
        angles, norm = engine.angles(target.rotary, cache.capacity), vector(target.norm.weight)
        self.places = (c_int32 * cache.capacity)(*range(cache.capacity))
        self.keep = plan, rows, angles, norm, embedding, cache  # alive as long as what points to them
        self.verifying = structs.Verifying(
            pointer(plan.shape),
            addressof(plan.pointers),
            pointer(rows.struct),
            norm.data_ptr(),
            target.norm.eps,
            embedding.data_ptr(),
            len(plan.packs),
            exit_layer,
        )
        self.call = structs.call_on(target.config.window, LayerCaches(cache.keys, cache.values), angles)
        self.call.batch = 1
        self.states = torch.empty(1, 0, target.config.hidden_size, dtype=target.dtype)
        self.logits = torch.empty(0, -(-self.vocab // engine.panel) * engine.panel)

    def verify(self, tokens: Sequence[int], states: Tensor | None, slot: int) -> Pass | None:
        """One pass over tokens that lie from `slot` on; None if these are too many for it.

        states [1, done, hidden]: those of the first tokens at the exit, if they have been there.
        """
        count, done = len(tokens), 0 if states is None else states.shape[1]
        if count > BLOCK_ROWS or slot + count > self.capacity:
            return None
        at_exit, final = (self.states.new_empty(1, count, self.states.shape[2]) for _ in range(2))
        if done:
            at_exit[:, :done] = states
        if count > len(self.logits):
            self.logits = self.logits.new_empty(count, self.logits.shape[1])
        call, best = self.call, (c_int64 * count)()
        call.seq, call.output = count, final.data_ptr()
        call.slots = call.positions = addressof(self.places) + 4 * slot
        self.library.eesd_verify(
            byref(self.verifying),
            (c_int64 * count)(*tokens),
            c_int32(done),
            byref(call),
            c_void_p(at_exit.data_ptr()),
            c_void_p(self.logits.data_ptr()),
            best,
        )
        return Pass(at_exit, final, self.logits[:count, : self.vocab], list(best))
