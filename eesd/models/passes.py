"""Passes of a model over a few tokens: embedding, layers, norm and head, on a CPU in one call of the engine.

    passes = Passes(target, cache, exit_layer)
    found = passes.run([5, 7], states, slot)     # tokens that lie from `slot` on; states: of what has been at the exit
    found.logits, found.choices()

One call gives the numbers of `Transformer.embed`, `run` and `logits`, bit for bit. Between those lies a tenth of a
vanilla token: of Python, whose own data the weights have driven out of the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int32, c_int64, c_void_p, pointer
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eesd.models.engine import DTYPES, Engine, Plan
from eesd.models.kernels import structs
from eesd.models.kernels.layout import BLOCK_ROWS, fits, places
from eesd.models.kernels.packing import vector
from eesd.models.transformer import Layer, LayerCaches, Transformer, run_layers

if TYPE_CHECKING:
    from eesd.models.cache import KVCache


# Numbers that are put on a device one by one.
FEW = 4


class Pass(NamedTuple):
    """States [1, n, hidden] at the exit and after all layers, and logits [n, vocab].

    best: the token of the greatest logit of every row, where it is known already.
    """

    states: Tensor
    final: Tensor
    logits: Tensor
    best: list[int] | None = None

    def choices(self) -> list[int] | Tensor:
        """The token of the greatest logit of every row; a tensor [n] where nobody has waited for the device yet."""
        return self.logits.argmax(-1) if self.best is None else self.best


class Passes:
    """Passes of a model whose keys and values lie in `cache`.

    exit_layer: tokens may have been through so many layers before. layers: instead of all of the model's.
    fused: how the engine runs them in one call, None where it does not. Weights are looked at when this is made, not
    with every pass: who changes them makes another.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, exit_layer: int = 0, layers: Sequence[Layer] | None = None
    ) -> None:
        self.model, self.cache, self.cut = model, cache, exit_layer
        self.layers = list(model.layers if layers is None else layers)
        self.fused = fused_passes(model, cache, exit_layer, self.layers)

    def run(
        self,
        tokens: Sequence[int | Tensor],
        states: Tensor | None = None,
        slots: int | Tensor = 0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Pass:
        """Run the layers that tokens, numbers or scalars on the device, have not had yet; logits after each of them.

        states [1, n, hidden]: of the first n tokens at the exit. Places of all tokens as in `Transformer.run`.
        """
        if self.fused and (found := self.fused.run(tokens, states, slots, positions, mask)):
            return found
        done = 0 if states is None else states.shape[1]
        if done < len(tokens):
            rest = self.model.embed(on_device(tokens, self.model.device)[None, done:])
            rest = self._layers(slice(0, self.cut), rest, *_behind(done, slots, positions, mask))
            states = rest if states is None else torch.cat((states, rest), 1)
        final = self._layers(slice(self.cut, len(self.layers)), states, slots, positions, mask)
        return Pass(states, final, self.model.logits(final[0]))

    def _layers(self, part: slice, states: Tensor, *place: int | Tensor | None) -> Tensor:
        caches = LayerCaches(self.cache.keys[part], self.cache.values[part])
        return run_layers(self.layers[part], self.model.rotary, states, caches, *place)


def _behind(
    done: int, slots: int | Tensor, positions: Tensor | None, mask: Tensor | None
) -> tuple[int | Tensor, Tensor | None, Tensor | None]:
    """Places of the tokens behind the first `done`."""
    return (
        slots + done if isinstance(slots, int) else slots[:, done:],
        None if positions is None else positions[:, done:],
        None if mask is None else mask[..., done:, :],
    )


def on_device(tokens: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """Tokens [n], of which some may be scalars on the device already."""
    if len(tokens) > FEW and all(isinstance(token, int) for token in tokens):
        return torch.tensor(tokens, device=device)
    # A number that is filled in, unlike one that is copied, does not make the host wait for the device.
    scalars = [token if isinstance(token, Tensor) else torch.full((), token, device=device) for token in tokens]
    return torch.stack(scalars) if len(scalars) > 1 else scalars[0].view(1)


def embedding_fits(model: Transformer) -> bool:
    """Whether the kernels can read this model's embedding, whose rows are the states before its first layer."""
    weight = model.embedding.weight
    return weight.device.type == "cpu" and weight.dtype == model.dtype in DTYPES and weight.is_contiguous()


def fused_passes(model: Transformer, cache: KVCache, exit_layer: int, layers: Sequence[Layer]) -> FusedPasses | None:
    """Passes in one call each; None where the C++ engine does not take them."""
    engine, rows = model.engine, getattr(model.head_weight, "packed", None)
    if not isinstance(engine, Engine) or torch.is_grad_enabled() or not (rows and rows.engine is engine):
        return None
    if not embedding_fits(model) or not fits(cache.keys, cache.values, model.dtype) or exit_layer >= len(layers):
        return None
    plan = engine.plan(layers, model.dtype)
    current = plan and [model.head_weight._version] == rows.versions
    return FusedPasses(model, plan, exit_layer, cache) if current else None


class FusedPasses:
    """What stays the same between passes; made by `fused_passes`."""

    def __init__(self, model: Transformer, plan: Plan, exit_layer: int, cache: KVCache) -> None:
        engine, rows, embedding = model.engine, model.head_weight.packed, model.embedding.weight.detach()
        caches, norm = LayerCaches(cache.keys, cache.values), vector(model.norm.weight)
        angles = engine.angles(model.rotary, cache.capacity)
        self.keep = plan, rows, angles, norm, embedding, caches  # alive as long as what points to them
        self.library, self.capacity, self.vocab = engine.library, cache.capacity, len(model.head_weight)
        self.width = -(-self.vocab // engine.panel) * engine.panel
        self.embedding = embedding
        self.places = (c_int32 * cache.capacity)(*range(cache.capacity))
        self.passing = structs.Passing(
            pointer(plan.shape),
            addressof(plan.pointers),
            pointer(rows.struct),
            norm.data_ptr(),
            model.norm.eps,
            embedding.data_ptr(),
            len(plan.packs),
            exit_layer,
        )
        self.call = structs.call_on(model.config.window, caches, angles)
        self.call.batch = 1

    def run(
        self,
        tokens: Sequence[int | Tensor],
        states: Tensor | None,
        slots: int | Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> Pass | None:
        """As `Passes.run`; None for what is too much for one call, or lies outside of vocabulary or cache."""
        count, done, call = len(tokens), 0 if states is None else states.shape[1], self.call
        numbers = [int(token) for token in tokens]
        if count > BLOCK_ROWS or min(numbers) < 0 or max(numbers) >= len(self.embedding):
            return None
        if isinstance(slots, int) and positions is None and mask is None:
            if slots < 0 or slots + count > self.capacity:
                return None
            call.slots = call.positions = addressof(self.places) + 4 * slots
            call.mask = None
        else:
            found = places(slots, positions, mask, 1, count, self.capacity)
            if found is None or max(found.positions) >= self.capacity:
                return None
            both = (c_int32 * (2 * count))(*found.slots, *found.positions)
            call.slots, call.positions = addressof(both), addressof(both) + 4 * count
            call.mask = None if found.mask is None else found.mask.data_ptr()
            call.mask_stride = 0 if found.mask is None else found.mask.shape[2]
        at_exit, final = (self.embedding.new_empty(1, count, self.embedding.shape[1]) for _ in range(2))
        if done:
            at_exit[:, :done] = states
        logits, best = torch.empty(count, self.width), (c_int64 * count)()
        call.seq, call.output = count, final.data_ptr()
        self.library.eesd_pass(
            byref(self.passing),
            (c_int64 * count)(*numbers),
            c_int32(done),
            byref(call),
            c_void_p(at_exit.data_ptr()),
            c_void_p(logits.data_ptr()),
            best,
        )
        return Pass(at_exit, final, logits[:, : self.vocab], list(best))
