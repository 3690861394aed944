"""The GPU path: a range of layers as one CUDA graph for every number of tokens, replayed on buffers that never move.

    engine = attach_engine(target)        # on a CUDA device; target.run and every packed exit layer now use it
    engine.name                           # "cuda-graphs+triton-3.7.1" or "cuda-graphs": goes into every row
    EESD_ENGINE=graphs eesd generate ...  # graphs of torch's kernels; on a CPU, re-executed where a GPU would replay

Launching the eighteen kernels of a layer one by one takes a processor longer than a GPU takes to run them. A graph is
captured once for (layers, tokens, live part of the cache rounded up, cache) and replayed by one call. Nothing in it
depends on a number that the host knows: the slot is read on the device, from a buffer that is filled without waiting,
and angles and mask follow from it; of trees, slots, positions and mask are buffers. Inside run the kernels of `fused`
where these take the target, else the same layers as everywhere (`transformer.run_plain`).

Calls that are not for graphs run in plain torch: more than FEW_QUERIES tokens (prompts), batches, no cache, autograd
on, or weights that have moved since they were packed. Weights changed in place need nothing: a graph reads
them where they lie. Capturing takes no part in the times of decoding: `GraphEngine.capture_s` counts its seconds.

Rules of capture: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from operator import getitem
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from eesd.errors import EesdError
from eesd.models.capture import CudaGraphs, Replay, Rerun
from eesd.models.transformer import FEW_QUERIES, LayerCaches, causal_mask, run_plain

if TYPE_CHECKING:
    from torch.nn import Module

    from eesd.models.cache import LayerCache
    from eesd.models.transformer import Layer, RMSNorm, Rotary, Transformer

# The live part of the cache is rounded up to a power of two, from this on: few graphs, and attention stays cheap.
SMALLEST_LIVE = 256
# A megabyte or two each, more for long contexts; beyond, the one that was used least recently is dropped.
MOST_GRAPHS = 256


@dataclass(frozen=True, eq=False)
class Recorded:
    """A layer that graphs may read: its weights as they lay when it was packed, and where to find what it has now."""

    engine: GraphEngine
    weights: list[Tensor]
    addresses: list[int]
    owners: list[dict[str, Any]]
    names: list[str]

    @classmethod
    def of(cls, layer: Layer, engine: GraphEngine) -> Recorded:
        """Note the weights of a layer. The aliases keep their memory: no graph ever reads what has been freed."""
        found = [(m._parameters, name) for m in layer.modules() for name, p in m._parameters.items() if p is not None]
        weights = [owner[name].detach() for owner, name in found]
        addresses = [weight.data_ptr() for weight in weights]
        return cls(engine, weights, addresses, [owner for owner, _ in found], [name for _, name in found])

    def in_place(self) -> bool:
        """Whether the layer still has these weights (not after `.to()` or a new parameter)."""
        return list(map(Tensor.data_ptr, map(getitem, self.owners, self.names))) == self.addresses

    def keeping(self, attention: bool, mlp: bool) -> Recorded:
        """The same weights for a layer without some of its sublayers, which has graphs of its own."""
        return replace(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or unpickled layer is not packed


@dataclass(frozen=True, eq=False)
class RecordedHead:
    """The weight [outputs, hidden] of a head that the kernels of `fused` read, as it lay when it was packed."""

    engine: GraphEngine
    address: int

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or unpickled head is not packed


class Buffers(NamedTuple):
    """Where graphs of one number of tokens read and write. They outlive the graphs and lie outside their pool."""

    states: Tensor  # [1, tokens, hidden]
    start: Tensor  # [1, 1]: cache slot of the first token
    output: Tensor  # [1, tokens, hidden]


class Places(NamedTuple):
    """Where a graph finds the places of a tree's tokens. Of a chain the kernels get the first token's, and no mask."""

    slots: Tensor  # [1, tokens], or [1, 1] of a chain
    positions: Tensor  # likewise
    mask: Tensor | None  # [1, 1, tokens, live]: True where a token may look


class Graph(NamedTuple):
    """What to replay, and what it reads beside buffers and cache. A kept pack keeps its `id`, the key, to itself."""

    replay: Replay
    packs: list[Recorded]
    angles: tuple[Tensor, Tensor]


class GraphEngine:
    """Captures graphs as they are first needed; an object of its own for every target."""

    reason = ""
    chunked_caches = False
    capture_s: ClassVar[float] = 0.0  # seconds that this process has spent capturing, for whatever model

    def __init__(self, backend: Rerun, device: torch.device, kernels: ModuleType | None = None) -> None:
        self.backend, self.device, self.kernels = backend, device, kernels
        self._buffers: dict[tuple[Any, ...], Buffers] = {}
        self._places: dict[tuple[int, int], Places] = {}
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied target decodes in plain torch until it gets an engine of its own

    @property
    def name(self) -> str:
        """What runs: graphs, of Triton's kernels where the target is one for them."""
        return self.backend.name + (f"+triton-{self.kernels.VERSION}" if self.kernels else "")

    def begin(self, target: Transformer) -> None:
        """Leave Triton's kernels out if they do not take the layers of this target."""
        if self.kernels and not self.kernels.takes(target.layers, target.dtype):
            self.kernels = None

    def pack(self, what: Layer | Tensor) -> None:
        """Take over a layer or the weight of a head; again when it has moved. Heads need no graph.

        EesdError where Triton cannot make a kernel for this device.
        """
        weights = [what] if isinstance(what, Tensor) else list(what.parameters())
        here = all(weight.device == self.device for weight in weights)
        if isinstance(what, Tensor):
            what.packed = None
            if here and self.kernels and self.kernels.takes_head(what[:1], what):
                try:
                    with torch.no_grad():
                        self.kernels.prepare(what)
                except self.kernels.FAILURES as error:
                    raise _no_kernel(error) from error
                what.packed = RecordedHead(self, what.data_ptr())
        elif here:
            with self._lock:
                self._unpack(what)
                what.packed = Recorded.of(what, self)

    def _unpack(self, layer: Layer) -> None:
        """Forget a layer and all graphs with it, which frees the weights that they alone still held."""
        pack, layer.packed = layer.packed, None
        for key in [key for key, graph in self._graphs.items() if pack in graph.packs]:
            del self._graphs[key]

    def repack(self, weight: Tensor) -> None:
        """Weights changed in place need nothing."""

    def pack_exit(self, *parts: Module | None) -> None:
        """Exit heads are not captured as a whole: their layer is, and what is around it stays in torch."""

    def head_logits(self, hidden: Tensor, norm: RMSNorm | None, weight: Tensor) -> Tensor | None:
        """Float32 logits of few states by the kernels; None where the call is not for them."""
        pack = getattr(weight, "packed", None)
        if torch.is_grad_enabled() or not isinstance(pack, RecordedHead) or pack.address != weight.data_ptr():
            return None
        return self.kernels.head_logits(hidden, norm, weight) if self.kernels.takes_head(hidden, weight) else None

    def linear(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """Left to torch."""

    def softmax_statistics(self, logits: Tensor) -> tuple[float, float] | None:
        """Left to torch."""

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
        """As `transformer.run_layers`; None where the call is not for graphs. Slots of a tree lie within its mask."""
        batch, rows, _ = hidden.shape
        chain = isinstance(slots, int)
        if torch.is_grad_enabled() or any((given is None) != chain for given in (positions, mask)):
            return None
        if batch != 1 or not 0 < rows <= FEW_QUERIES or hidden.device.type != self.device.type:
            return None
        stores = _stores(caches)
        capacity = min((store.shape[-2] for store in stores), default=0)
        needed = slots + rows if chain else mask.shape[-1]
        # A slot beyond the cache would end the whole process on a GPU; torch says what is wrong.
        if needed > capacity or (chain and slots < 0) or any(store.shape[-4] != 1 for store in stores):
            return None
        packs = [layer.packed for layer in layers]
        if not all(pack and pack.engine is self for pack in packs):
            return None
        if not chain and (mask.shape != (1, 1, rows, needed) or mask.dtype != torch.bool):
            return None
        live = live_slots(needed, capacity)
        # A cache counts as the same if it lies at the same place in the same way: that is all a graph knows of it.
        places = tuple((store.data_ptr(), store.shape, store.stride(), store.dtype) for store in stores)
        key = (tuple(map(id, packs)), rotary, rows, live, hidden.dtype, places, chain)
        with self._lock:
            self.backend.take_turn()
            buffers = self._buffers_of(hidden)
            # Before capture: its first run really writes, and may do so at the slots of this call alone.
            buffers.states.copy_(hidden)
            tree = None
            if chain:
                buffers.start.fill_(slots)
            else:
                tree = self._places_of(rows, live)
                tree.slots.copy_(slots)
                tree.positions.copy_(positions)
                tree.mask[..., :needed].copy_(mask)
                tree.mask[..., needed:].fill_(False)
            if key not in self._graphs:
                self._capture(key, buffers, tree, layers, rotary, caches, capacity)
            self._graphs.move_to_end(key)
            self._graphs[key].replay()
            output = buffers.output.clone()
            # Looked at while the device works. With moved weights the call is done again in torch, cache entries too.
            moved = [layer for layer in layers if not layer.packed.in_place()]
            for layer in moved:
                self._unpack(layer)
        return None if moved else output

    def _buffers_of(self, hidden: Tensor) -> Buffers:
        key = (hidden.shape, hidden.dtype, hidden.device)
        if key not in self._buffers:
            # Inference tensors could not be written by a later call outside inference mode.
            with torch.inference_mode(False):
                states, output = (torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2))
                start = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
            self._buffers[key] = Buffers(states, start, output)
        return self._buffers[key]

    def _places_of(self, rows: int, live: int) -> Places:
        if (rows, live) not in self._places:
            with torch.inference_mode(False):
                slots, positions = (torch.zeros((1, rows), dtype=torch.long, device=self.device) for _ in range(2))
                mask = torch.zeros((1, 1, rows, live), dtype=torch.bool, device=self.device)
            self._places[rows, live] = Places(slots, positions, mask)
        return self._places[rows, live]

    def _capture(
        self,
        key: tuple[Any, ...],
        buffers: Buffers,
        tree: Places | None,
        layers: Sequence[Layer],
        rotary: Rotary,
        caches: Sequence[LayerCache | None],
        capacity: int,
    ) -> None:
        _, _, rows, live, dtype, *_ = key
        angles = rotary.table(capacity, dtype, self.device)
        self.backend.wait()
        began = perf_counter()
        failures = self.kernels.FAILURES if self.kernels else (RuntimeError,)
        try:
            replay = self.backend.capture(lambda: forward(buffers, tree, layers, angles, caches, live, self.kernels))
        except failures as error:
            if not isinstance(error, RuntimeError):
                raise _no_kernel(error) from error
            raise EesdError(
                f"A CUDA graph of {len(layers)} layers on {rows} tokens could not be captured: {error}\nFree memory of "
                "the GPU or shorten the context; EESD_ENGINE=torch in the environment decodes without graphs."
            ) from error
        self.backend.wait()
        GraphEngine.capture_s += perf_counter() - began
        self._graphs[key] = Graph(replay, [layer.packed for layer in layers], angles)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)


def forward(
    buffers: Buffers,
    tree: Places | None,
    layers: Sequence[Layer],
    angles: tuple[Tensor, Tensor],
    caches: Sequence[LayerCache | None],
    live: int,
    kernels: ModuleType | None,
) -> None:
    """What a graph holds: from `states` to `output`, through layers that see `live` cache slots.

    tree: where the tokens are; None: side by side from slot `start` on. angles: cos and sin [positions, head_dim] of
    `Rotary.table`. kernels: `fused`, for the layers that it takes.
    """
    if kernels and kernels.takes(layers, buffers.states.dtype):
        places = tree or Places(buffers.start, buffers.start, None)
        kernels.run_layers(layers, buffers.output.copy_(buffers.states), angles, caches, *places, live)
        return
    rows, device = buffers.states.shape[1], buffers.states.device
    if tree is None:
        slots = positions = buffers.start + torch.arange(rows, device=device)
        mask = causal_mask(slots, rows, layers[0].config.window, device, live)
    else:
        slots, positions, mask = tree
    found = angles[0][positions], angles[1][positions]
    buffers.output.copy_(run_plain(layers, found, buffers.states, caches, slots, mask))


def live_slots(needed: int, capacity: int) -> int:
    """`needed` rounded up to a power of two, so that a cache that fills needs few graphs."""
    return min(capacity, max(SMALLEST_LIVE, 1 << (needed - 1).bit_length()))


def _stores(caches: Sequence[LayerCache | None]) -> list[Tensor]:
    """All tensors [.., batch, kv_heads, capacity, head_dim] of the caches; none if one is missing or chunked."""
    if isinstance(caches, LayerCaches):
        stores = [caches.keys, caches.values]
    else:
        stores = [] if any(cache is None for cache in caches) else [store for cache in caches for store in cache]
    return stores if len({store.ndim for store in stores}) < 2 else []


def graph_engine(device: torch.device, fuse: bool = True) -> GraphEngine:
    """The engine of a CUDA device, or its stand-in anywhere else; with the kernels of `fused` if it can, and `fuse`."""
    if device.type != "cuda":
        return GraphEngine(Rerun(), device)
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    return GraphEngine(CudaGraphs(device), device, load_kernels(device) if fuse else None)


def load_kernels(device: torch.device) -> ModuleType | None:
    """The module `fused` where Triton is installed and the device is NVIDIA's with matrix units for bfloat16."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0) or find_spec("triton") is None:
        return None
    return import_module("eesd.models.fused")


def _no_kernel(error: Exception) -> EesdError:
    return EesdError(
        f"Triton could not make a kernel for this device: {error}\n"
        "EESD_ENGINE=graphs in the environment decodes with torch's kernels."
    )
