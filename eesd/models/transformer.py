"""The target model: a plain decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU), run layer range by layer range.

    hidden = target.embed(tokens)                                  # [batch, seq, hidden]
    early = target.run(hidden, slice(0, 4), cache, slots=0)        # the first N layers
    late = target.run(early, slice(4, None), cache, slots=0)       # verification continues where drafting stopped
    logits = target.logits(late)                                   # [batch, seq, vocab]

Weights of q, k, v and of gate and up are fused, since a token's time is the time to read them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eesd.models.cache import KVCache, LayerCache, read, write
from eesd.models.config import ModelConfig, rope_frequencies

if TYPE_CHECKING:
    from eesd.models.engine import Engine, Packed
    from eesd.models.graphs import GraphEngine, Recorded

# Up to this many query rows attention is two plain products: `scaled_dot_product_attention` is slow on few queries.
FEW_QUERIES = 32


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with weight [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        # In training a weight may be of a wider type than what it multiplies.
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), halves convention; angles are kept in float32 or better."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Angles for `rotate`, each [..., seq, head_dim], at integer positions [..., seq].

        length: the positions lie below it; None reads them, which waits for the device.
        """
        if length is None:
            length = int(positions.max()) + 1 if positions.numel() else 1
        table = self.table(length, dtype, positions.device)
        return table[0][positions], table[1][positions]

    def table(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, and sin with its first half negated, [positions, head_dim] of at least `length` positions."""
        if self._table is None or self._table[0].shape[0] < length or self._table[0].dtype != dtype:
            cos, sin = self.build(max(length, 512), dtype, device)
            first, second = sin.chunk(2, -1)
            self._table = cos, torch.cat((-first, second), -1)
        return self._table

    def build(self, length: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head_dim] of at least `length` positions."""
        length = 1 << (length - 1).bit_length()
        # Angles in float32 even for a float64 run: the same function as the one the model was trained with.
        angles = torch.outer(torch.arange(length).float(), rope_frequencies(self.config))
        angles = torch.cat((angles, angles), -1).to(device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, seq, head_dim] by the angles of its positions (sin with its first half negated)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q [batch, heads, seq, dim], k and v [batch, kv_heads, live, dim] -> like q.

    `mask`, broadcastable to [batch, 1, seq, live], is True where a query may look, or what is added to its scores
    (`added`, computed once for many layers); None: a single query sees all, and a text from its start is causal.
    """
    batch, heads, seq, dim = q.shape
    if seq > FEW_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    kv_heads, live = k.shape[1:3]
    q = q.reshape(batch * kv_heads, -1, dim)
    k, v = (x.reshape(batch * kv_heads, live, dim) for x in (k, v))
    if mask is None:
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    else:
        # With one batch row the mask is the same for all key heads: broadcast, not copied.
        rows = kv_heads if batch > 1 else 1
        mask = added(mask, q.dtype).expand(batch, 1, seq, live)[:, :, None]
        mask = mask.expand(batch, rows, heads // kv_heads, seq, live).reshape(batch * rows, -1, live)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=dim**-0.5)
    # Half-precision softmax computes in float32 and rounds once.
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, seq, dim)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True and -inf elsewhere; a mask that is numbers already stays as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


class Layer(nn.Module):
    """One decoder layer: attention and SwiGLU MLP, each behind a norm and a residual connection."""

    packed: Packed | Recorded | None = None  # set by the `pack` of an engine that this layer decodes through
    runs_attention = runs_mlp = True  # see `keeping`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.attn_norm = RMSNorm(hidden, config.norm_eps)
        self.qkv = nn.Linear(hidden, (config.num_heads + 2 * config.num_kv_heads) * dim, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim, config.norm_eps), RMSNorm(dim, config.norm_eps)
        self.o = nn.Linear(config.num_heads * dim, hidden, bias=config.output_bias)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        slots: int | Tensor,
    ) -> Tensor:
        """hidden [batch, seq, hidden] -> the same shape; writes this layer's keys and values at `slots`."""
        if not self.runs_attention:
            return self.finish(hidden, None)
        q, k, v = self.heads(self.attn_norm(hidden), angles)
        if cache is not None:
            write(cache, k, v, slots)
            live = slots + hidden.shape[1] if mask is None else mask.shape[-1]
            k, v = read(cache, live)
        return self.finish(hidden, attend(q, k, v, mask))

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, seq, head_dim] of normalised states, rotated by their angles."""
        config = self.config
        heads = self.qkv(x).view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
        both, v = heads.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), 1)
        if config.qk_norm:
            q, k = both.split((config.num_heads, config.num_kv_heads), 1)
            both = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        q, k = rotate(both, *angles).split((config.num_heads, config.num_kv_heads), 1)
        return q, k, v

    def keeping(self, attention: bool, mlp: bool) -> Layer:
        """This layer with only some of its sublayers, sharing its weights; what is left out passes states on."""
        part = copy.copy(self)
        part.runs_attention, part.runs_mlp = attention, mlp
        part.packed = self.packed and self.packed.keeping(attention, mlp)
        return part

    def finish(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        """The layer's output from its input and what its queries gathered [batch, heads, seq, head_dim], if any."""
        if attended is not None:
            hidden = hidden + self.o(attended.transpose(1, 2).flatten(2))
        if not self.runs_mlp:
            return hidden
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)


def causal_mask(
    slots: int | Tensor, seq: int, window: int | None, device: torch.device, live: int | None = None
) -> Tensor | None:
    """Which slots each query sees: those up to its own, at most `window` of them. None where `attend` knows by itself.

    An int gives [1, 1, seq, live]; a tensor [batch, seq] gives [batch, 1, seq, live]. live: slots to cover; None covers
    those up to the highest, for which a tensor is read.
    """
    if isinstance(slots, int):
        # The fused causal kernels of a GPU take no mask.
        whole = slots == 0 and seq > FEW_QUERIES and live in (None, seq)
        if (seq == 1 or whole) and (window is None or slots + seq <= window):
            return None
        live = slots + seq if live is None else live
        slots = torch.arange(slots, slots + seq, device=device)[None]
    keys = torch.arange(int(slots.max()) + 1 if live is None else live, device=device)
    queries = slots[:, None, :, None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


class LayerCaches(Sequence[LayerCache]):
    """Caches of a range of layers, as `KVCache` has them, cut into views only where needed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> LayerCache:
        return self.keys[index], self.values[index]


class Transformer(nn.Module):
    """A frozen target model; see the module docstring for how it is cut."""

    engine: Engine | GraphEngine | None = (
        None  # set by `engine.attach_engine`; what it does not take runs in plain torch
    )

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)

    @property
    def head_weight(self) -> Tensor:
        """The output head [vocab, hidden], which may be the embedding itself."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, states and cache."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.norm.weight.device

    def new_cache(self, capacity: int, batch: int = 1, num_layers: int | None = None) -> KVCache:
        """An empty cache for `capacity` tokens a row, of all layers unless `num_layers` says otherwise."""
        packed = self.layers[0].packed
        chunked = packed is not None and packed.engine.chunked_caches
        return KVCache(self.config, capacity, batch, num_layers, self.dtype, self.device, chunked)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, seq] -> states before the first layer [batch, seq, hidden]."""
        return self.embedding(tokens)

    def run(
        self,
        hidden: Tensor,
        layers: slice,
        cache: KVCache | None = None,
        slots: int | Tensor = 0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run a contiguous range of layers on states [batch, seq, hidden] and return states of the same shape.

        slots: cache slot of the first token (int), or of every token [batch, seq] for ragged batches.
        positions: RoPE positions [batch, seq] where they differ from the slots (trees).
        mask: True where a query may look [.., seq, live slots]; causal by slot when None.
        """
        chosen = list(self.layers)[layers]
        caches = [None] * len(chosen) if cache is None else LayerCaches(cache.keys[layers], cache.values[layers])
        return run_layers(chosen, self.rotary, hidden, caches, slots, positions, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final states [.., hidden] -> next-token logits [.., vocab]."""
        return head_logits(hidden, self.norm, self.head_weight)


def head_logits(hidden: Tensor, norm: RMSNorm | None, weight: Tensor) -> Tensor:
    """Logits [.., rows] of states [.., hidden] through a norm, if any, and a head (float32 from the engine)."""
    packed = getattr(weight, "packed", None)
    logits = packed and packed.engine.head_logits(hidden, norm, weight)
    if logits is not None:
        return logits
    return F.linear(hidden if norm is None else norm(hidden), weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., inputs] times a weight [outputs, inputs], in the type of x."""
    packed = getattr(weight, "packed", None)
    product = packed and packed.engine.linear(x, weight)
    return F.linear(x, weight) if product is None else product.to(x.dtype)


def run_layers(
    layers: Sequence[Layer],
    rotary: Rotary,
    hidden: Tensor,
    caches: Sequence[LayerCache | None],
    slots: int | Tensor = 0,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Run layers one after the other; arguments as in `Transformer.run`. The exit layer goes through here too."""
    if not layers:
        return hidden
    if layers[0].packed:
        done = layers[0].packed.engine.run_layers(layers, rotary, hidden, caches, slots, positions, mask)
        if done is not None:
            return done
    seq = hidden.shape[1]
    length = None
    if positions is None:
        length = slots + seq if isinstance(slots, int) else None
        positions = torch.arange(slots, slots + seq, device=hidden.device)[None] if isinstance(slots, int) else slots
    angles = rotary(positions, hidden.dtype, length)
    mask = causal_mask(slots, seq, layers[0].config.window, hidden.device) if mask is None else mask
    return run_plain(layers, angles, hidden, caches, slots, mask)


def run_plain(
    layers: Sequence[Layer],
    angles: tuple[Tensor, Tensor],
    hidden: Tensor,
    caches: Sequence[LayerCache | None],
    slots: int | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Run layers in torch; reads nothing back from the device, so a CUDA graph can hold it.

    angles: cos and sin [batch, seq, head_dim] from `Rotary`. A tensor of slots needs a mask, whose width is then the
    number of slots that are looked at.
    """
    angles = angles[0][:, None], angles[1][:, None]
    mask = added(mask, hidden.dtype) if mask is not None and hidden.shape[1] <= FEW_QUERIES else mask
    for layer, cache in zip(layers, caches, strict=True):
        hidden = layer(hidden, angles, mask, cache, slots)
    return hidden
