"""The fast CPU path: layers and heads as one C++ call each, built on the user's machine and attached to a model.

    engine = attach_engine(target)        # packs the weights once; target.run and target.logits now use it
    engine.pack(exit_layer)               # anything else that decodes: layers, and
    engine.pack(draft_head.weight)        # weights [rows, hidden] for `head_logits` and `linear`
    engine.name                           # "cpp-avx2", or "torch (no compiler)": goes into every row

Arithmetic is float32. Weights are stored in bfloat16 where that is exact, else in float32. In a bfloat16 model the
states between layers and the cache are bfloat16, all inside a layer and the logits float32; where the processor has
dot products or tiles of bfloat16 ("cpp-avx512bf16", "cpp-amx"), what a product reads is rounded too. A row's numbers
depend neither on the rows computed with it nor on the number of threads: verification gives vanilla's numbers bit for
bit. Calls that the engine does not take (autograd on, weights changed since they were packed and not within a text,
other dtypes, no cache, or one made without the engine) run in plain torch, as all do with EESD_ENGINE=torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eesd.errors import EesdError, unknown
from eesd.models.graphs import GraphEngine, graph_engine
from eesd.models.kernels import BuildError, build, load, structs
from eesd.models.kernels.layout import BLOCK_ROWS, Block, Places, blocks, fits, places
from eesd.models.kernels.packing import Arena, Format, bfloat16_exact, panels, vector
from eesd.models.transformer import LayerCaches

if TYPE_CHECKING:
    from torch.nn import Linear

    from eesd.models.cache import LayerCache
    from eesd.models.config import ModelConfig
    from eesd.models.transformer import Layer, RMSNorm, Rotary, Transformer

DTYPES = (torch.float32, torch.bfloat16)


# ---- packing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights as the kernels read them, with the versions of the tensors they came from."""

    engine: Engine
    struct: Structure
    keep: list[Tensor]
    sources: tuple[Tensor, ...]  # of a layer; empty for a single weight, which would refer to itself
    versions: list[int]
    config: ModelConfig | None = None  # of a layer or an exit head

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or unpickled layer is not packed

    def current(self) -> bool:
        """Whether the weights of a layer or exit head are still those that were packed."""
        return _versions(self.sources) == self.versions

    def keeping(self, attention: bool, mlp: bool) -> Packed:
        """The same weights of a layer, told to run only some of its sublayers."""
        struct = structs.Layer.from_buffer_copy(self.struct)
        if not attention:
            struct.qkv.data = None
        if not mlp:
            struct.gate_up.data = None
        return replace(self, struct=struct)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Counters that changes in place raise (loading a state, an optimiser's step unless it is a fused one)."""
    return [t._version for t in tensors]


@dataclass(frozen=True)
class Plan:
    """What stays the same between calls with the same layers."""

    packs: list[Packed]
    sources: list[Tensor]
    versions: list[int]
    shape: structs.Shape
    pointers: Any


# ---- the engine -----------------------------------------------------------------------------------------------------


class Engine:
    """The kernels, or (library None) a stand-in that leaves every call to torch and says why in `name` and `reason`."""

    chunked_caches = True

    def __init__(self, library: ctypes.PyDLL | None, name: str, reason: str = "") -> None:
        self.library, self.name, self.reason = library, name, reason
        self.panel = library.eesd_panel() if library else 0
        self._arena = Arena()
        self._angles: tuple[Any, Tensor, Tensor] | None = None
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def pack(self, what: Layer | Tensor) -> None:
        """Take over a layer, or a weight [rows, hidden] for `head_logits` and `linear`; again when it has changed."""
        weights = [what] if isinstance(what, Tensor) else list(what.parameters())
        if any(w.is_inference() for w in weights):
            raise EesdError(
                "Weights made under inference_mode keep no version, so changes would go unseen. Load them outside."
            )
        if self.library is None or any(w.device.type != "cpu" or w.dtype not in DTYPES for w in weights):
            return
        keep: list[Tensor] = []
        with torch.no_grad():
            struct = self._matrix(what, None, keep) if isinstance(what, Tensor) else self._layer(what, keep)
        sources = () if isinstance(what, Tensor) else tuple(weights)
        what.packed = Packed(self, struct, keep, sources, _versions(weights))

    def repack(self, weight: Tensor) -> None:
        """Take over a packed weight [rows, hidden] that was changed in place."""
        if pack := getattr(weight, "packed", None):
            pack.keep[0].copy_(panels(weight, self.panel, Format(pack.struct.format)))
            pack.versions[:] = _versions([weight])

    def pack_exit(self, layer: Layer, norm: RMSNorm, fuse: Linear | None, estimate: Linear | None) -> Packed | None:
        """What `exit_step` needs of an exit head: its packed layer, norm, and the maps of context and lens, if any."""
        if layer.packed is None:
            return None
        maps = [linear for linear in (fuse, estimate) if linear is not None]
        sources = (*layer.packed.sources, norm.weight, *(weight for linear in maps for weight in linear.parameters()))
        keep = [*layer.packed.keep, vector(norm.weight)]
        matrices = [
            structs.Matrix() if linear is None else self._matrix(linear.weight, linear.bias, keep)
            for linear in (fuse, estimate)
        ]
        struct = structs.Exit(layer.packed.struct, *matrices, keep[len(layer.packed.keep)].data_ptr())
        return Packed(self, struct, keep, sources, _versions(sources), layer.config)

    def _matrix(self, weight: Tensor, bias: Tensor | None, keep: list[Tensor], parts: int = 1) -> structs.Matrix:
        """`parts` > 1: that many equal weights lie on top of each other, and their panels are to alternate."""
        weight = weight.detach()
        form = self._format(weight)
        packed = [panels(w, self.panel, form) for w in weight.chunk(parts)]
        data = self._arena.copy(torch.stack(packed, 1) if parts > 1 else packed[0])
        keep.append(data)
        address = None
        if bias is not None:
            keep.append(vector(bias, self.panel))
            address = keep[-1].data_ptr()
        outputs = data.shape[0] * parts * self.panel if parts > 1 else weight.shape[0]
        return structs.Matrix(data.data_ptr(), address, outputs, weight.shape[1], form)

    def _format(self, weight: Tensor) -> Format:
        """How a weight is stored: in bfloat16 where that is exact, for products of bfloat16 in bfloat16 models."""
        if not bfloat16_exact(weight):
            return Format.FLOAT32
        pairs = self.library.eesd_takes_pairs() and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
        return Format.PAIRS if pairs else Format.BFLOAT16

    def _layer(self, layer: Layer, keep: list[Tensor]) -> structs.Layer:
        def norm(name: str) -> int | None:
            if not hasattr(layer, name):
                return None
            keep.append(vector(getattr(layer, name).weight))
            return keep[-1].data_ptr()

        def matrix(linear: torch.nn.Linear, parts: int = 1) -> structs.Matrix:
            return self._matrix(linear.weight, linear.bias, keep, parts)

        matrices = matrix(layer.qkv), matrix(layer.o), matrix(layer.gate_up, 2), matrix(layer.down)
        return structs.Layer(*matrices, norm("attn_norm"), norm("mlp_norm"), norm("q_norm"), norm("k_norm"))

    # ---- calls ----

    def run_layers(
        self,
        layers: Sequence[Layer],
        rotary: Rotary,
        hidden: Tensor,
        caches: Sequence[LayerCache | None],
        slots: int | Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor | None:
        """As `transformer.run_layers`; None where the call is not for the engine."""
        if torch.is_grad_enabled() or hidden.device.type != "cpu" or hidden.dtype not in DTYPES or hidden.numel() == 0:
            return None
        if not isinstance(caches, LayerCaches):  # separate caches: the kernels want one stride from layer to layer
            if any(cache is None for cache in caches):
                return None
            for layer, (keys, values) in zip(layers, caches, strict=True):
                ranged = LayerCaches(keys[None], values[None])
                hidden = self.run_layers([layer], rotary, hidden, ranged, slots, positions, mask)
                if hidden is None:
                    return None
            return hidden
        plan = self.plan(layers, hidden.dtype)
        calls = plan and self._calls(layers[0].config, rotary, hidden, caches, slots, positions, mask)
        if calls is None:
            return None
        output, row_bytes = torch.empty_like(hidden), hidden.shape[2] * hidden.element_size()
        for block, call in calls:
            call.output = output.data_ptr() + block.first * row_bytes
        groups = len({block.row for block, _ in calls})  # blocks of one batch row follow one another
        every = (structs.Call * len(calls))(*(call for _, call in calls))
        self.library.eesd_run_layers(byref(plan.shape), plan.pointers, len(layers), every, groups, len(calls) // groups)
        return output

    def exit_step(
        self,
        head: Packed,
        rotary: Rotary,
        states: Tensor,
        contexts: Tensor | None,
        caches: LayerCaches,
        slots: int | Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        last: int,
    ) -> Tensor | None:
        """As `ExitHead.step`; None where the call is not for the engine."""
        if torch.is_grad_enabled() or states.device.type != "cpu" or states.dtype not in DTYPES or states.numel() == 0:
            return None
        config = head.config
        calls = self._calls(config, rotary, states, caches, slots, positions, mask)
        if calls is None or not head.current():
            return None
        batch, seq, size = states.shape
        contexts = None if contexts is None else contexts.contiguous()
        output = states.new_empty(batch, last, size)
        row_bytes, shape = size * states.element_size(), _shape(config, states.dtype)
        for block, call in calls:
            wanted = max(0, min(call.seq, last - seq + block.end))
            call.output = output.data_ptr() + (block.row * last + last - wanted - (seq - block.end)) * row_bytes
            context = None if contexts is None else contexts.data_ptr() + block.first * row_bytes
            self.library.eesd_exit_step(byref(shape), byref(head.struct), byref(call), c_void_p(context), wanted)
        return output

    def _calls(
        self,
        config: ModelConfig,
        rotary: Rotary,
        hidden: Tensor,
        caches: LayerCaches,
        slots: int | Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> list[tuple[Block, structs.Call]] | None:
        """One call for each block of rows, still without an output; None where the call is not for the engine."""
        if not fits(caches.keys, caches.values, hidden.dtype):
            return None
        batch, seq, _ = hidden.shape
        found = places(slots, positions, mask, batch, seq, caches.values.shape[3])
        if found is None:
            return None
        angles = self.angles(rotary, max(found.positions) + 1)
        return list(self._blocks(config, hidden.contiguous(), caches, found, angles))

    def _blocks(
        self,
        config: ModelConfig,
        hidden: Tensor,
        caches: LayerCaches,
        found: Places,
        angles: tuple[Tensor, Tensor],
    ) -> Iterator[tuple[Block, structs.Call]]:
        (batch, seq, size), width, mask = hidden.shape, hidden.element_size(), found.mask
        like = structs.call_on(config.window, caches, angles)
        like.mask_stride = 0 if mask is None else mask.shape[2]
        for block in blocks(batch, seq):
            first, last = block.first, block.first + block.count
            numbers = (c_int32 * (2 * block.count))(*found.slots[first:last], *found.positions[first:last])
            call = structs.Call.from_buffer_copy(like)
            call.reads = hidden, mask, numbers  # which live as long as the call
            call.batch, call.seq = block.batches, block.count // block.batches
            call.input = hidden.data_ptr() + first * size * width
            call.slots = ctypes.addressof(numbers)
            call.positions = call.slots + 4 * block.count
            call.mask = None if mask is None else mask.data_ptr() + first * mask.shape[2]
            offset = block.row * call.key_batch * width
            call.keys, call.values = caches.keys.data_ptr() + offset, caches.values.data_ptr() + offset
            yield block, call

    def plan(self, layers: Sequence[Layer], dtype: torch.dtype) -> Plan | None:
        """Sizes, and pointers to the packed layers; None if a layer is not packed or has changed since."""
        packs = [layer.packed for layer in layers]
        key = (dtype, *map(id, packs))
        plan = self._plans.get(key)  # keeps its packs alive, so their ids stay theirs
        if plan is None:
            if not all(pack and pack.engine is self for pack in packs):
                return None
            if len(self._plans) > 64:
                self._plans.clear()
            sources = [source for pack in packs for source in pack.sources]
            versions = [version for pack in packs for version in pack.versions]
            pointers = (c_void_p * len(packs))(*(ctypes.addressof(pack.struct) for pack in packs))
            plan = self._plans[key] = Plan(packs, sources, versions, _shape(layers[0].config, dtype), pointers)
        return plan if _versions(plan.sources) == plan.versions else None

    def angles(self, rotary: Rotary, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head_dim] in float32 whatever the model's dtype."""
        if self._angles is None or self._angles[0] is not rotary or len(self._angles[1]) < length:
            self._angles = rotary, *rotary.build(max(length, 512), torch.float32, "cpu")
        return self._angles[1:]

    def head_logits(self, hidden: Tensor, norm: RMSNorm | None, weight: Tensor) -> Tensor | None:
        """Float32 logits [.., rows] of states [.., hidden] behind a norm, if any; None where the call is not for the
        engine."""
        return self._product(hidden, weight, norm)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """x times weight [rows, hidden], in float32; None where the call is not for the engine."""
        return self._product(x, weight, None)

    def softmax_statistics(self, logits: Tensor) -> tuple[float, float] | None:
        """max q and the entropy of q in nats, q = softmax(logits [rows]); None where the call is not for the engine."""
        taken = logits.dim() == 1 and logits.numel() and logits.dtype == torch.float32 and logits.device.type == "cpu"
        if self.library is None or not taken:
            return None
        logits, found = logits.contiguous(), (c_float * 2)()
        self.library.eesd_softmax_statistics(c_void_p(logits.data_ptr()), c_int64(logits.numel()), found)
        return tuple(found)

    def _product(self, x: Tensor, weight: Tensor, norm: RMSNorm | None) -> Tensor | None:
        pack = getattr(weight, "packed", None)
        if torch.is_grad_enabled() or pack is None or pack.engine is not self or _versions([weight]) != pack.versions:
            return None
        if x.device.type != "cpu" or x.dtype not in DTYPES or x.numel() == 0:
            return None
        x = x.contiguous()
        scale, eps = (None, 0.0) if norm is None else (norm.weight.float(), norm.eps)
        outputs, width = weight.shape[0], -(-weight.shape[0] // self.panel) * self.panel
        result = torch.empty(x.numel() // x.shape[-1], width)
        for first in range(0, len(result), BLOCK_ROWS):
            rows = min(BLOCK_ROWS, len(result) - first)
            self.library.eesd_linear(
                byref(pack.struct),
                c_void_p(None if scale is None else scale.data_ptr()),
                c_float(eps),
                c_void_p(x.data_ptr() + first * x.shape[-1] * x.element_size()),
                c_int32(x.dtype == torch.bfloat16),
                c_int32(rows),
                c_void_p(result.data_ptr() + 4 * first * width),
                c_int64(width),
                c_int32(torch.get_num_threads()),
            )
        return (result if width == outputs else result[:, :outputs].contiguous()).view(*x.shape[:-1], outputs)


def _shape(config: Any, dtype: torch.dtype) -> structs.Shape:
    return structs.Shape(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        config.norm_eps,
        dtype == torch.bfloat16,
    )


def make_engine(kind: str | None = None, device: torch.device | str = "cpu") -> Engine | GraphEngine:
    """The engine for a device: "cpp", "graphs" (CUDA graphs of torch's kernels), "torch", or (None: $EESD_ENGINE, else
    "auto") the best that it has."""
    kind, device = kind or os.environ.get("EESD_ENGINE") or "auto", torch.device(device)
    if kind not in ("auto", "cpp", "graphs", "torch"):
        raise unknown("engine", kind, ("auto", "cpp", "graphs", "torch"))
    if kind == "graphs" or (kind == "auto" and device.type == "cuda"):
        return graph_engine(device, fuse=kind == "auto")
    if kind == "torch":
        return Engine(None, "torch (chosen)", "EESD_ENGINE=torch, or asked for")
    if device.type != "cpu":
        if kind == "cpp":
            raise EesdError(f"The C++ engine computes on CPUs, but the model lies on {device}. Unset EESD_ENGINE.")
        return Engine(None, f"torch (no engine for {device.type})", "engines exist for CPUs and CUDA devices")
    try:
        library = load(build())
        return Engine(library, f"cpp-{library.eesd_simd().decode()}")
    except BuildError as error:
        if kind == "cpp":
            raise
        return Engine(None, f"torch ({error.brief})", str(error))


def attach_engine(target: Transformer, kind: str | None = None) -> Engine | GraphEngine:
    """Pack a target's layers and head for its device's engine, through which it decodes on caches made from then on."""
    target.engine = engine = make_engine(kind, target.device)
    if isinstance(engine, GraphEngine):
        engine.begin(target)
    for what in dict.fromkeys((*target.layers, target.head_weight)):  # random shapes repeat layers
        what.packed = None
        engine.pack(what)
    return engine
