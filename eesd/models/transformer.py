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

from eesd.models.cache import KVCache, LayerCache, write
from eesd.models.config import ModelConfig, rope_frequencies

if TYPE_CHECKING:
    from eesd.models.engine import Engine, Packed

# Up to this many query rows attention is two plain products: `scaled_dot_product_attention` is slow on few queries.
FEW_QUERIES = 16


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with weight [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), halves convention; angles are kept in float32 or better."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., seq, head_dim] at integer positions [..., seq]."""
        needed = int(positions.max()) + 1 if positions.numel() else 1
        if self._table is None or self._table[0].shape[0] < needed or self._table[0].dtype != dtype:
            self._table = self.build(max(needed, 512), dtype, positions.device)
        return self._table[0][positions], self._table[1][positions]

    def build(self, length: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head_dim] of at least `length` positions."""
        length = 1 << (length - 1).bit_length()
        # Angles in float32 even for a float64 run: the same function as the one the model was trained with.
        angles = torch.outer(torch.arange(length).float(), rope_frequencies(self.config))
        angles = torch.cat((angles, angles), -1).to(device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, seq, head_dim] by the angles of its positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q [batch, heads, seq, dim], k and v [batch, kv_heads, live, dim] -> like q.

    `mask` is True where a query may look, broadcastable to [batch, 1, seq, live]; None: everywhere.
    """
    batch, heads, seq, dim = q.shape
    if seq > FEW_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    kv_heads = k.shape[1]
    scores = (q.reshape(batch, kv_heads, -1, dim) @ k.transpose(2, 3)) * dim**-0.5
    scores = scores.view(batch, heads, seq, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights.view(batch, kv_heads, -1, k.shape[2]) @ v).view(batch, heads, seq, dim)


class Layer(nn.Module):
    """One decoder layer: attention and SwiGLU MLP, each behind a norm and a residual connection."""

    packed: Packed | None = None  # set by `Engine.pack`: this layer's weights as the fast CPU path reads them
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
            live = slots + hidden.shape[1] if isinstance(slots, int) else int(slots.max()) + 1
            k, v = cache[0][:, :, :live], cache[1][:, :, :live]
        return self.finish(hidden, attend(q, k, v, mask))

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, seq, head_dim] of normalised states, rotated by their angles."""
        config = self.config
        heads = self.qkv(x).view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *angles), rotate(k, *angles), v

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


def causal_mask(slots: int | Tensor, seq: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which slots each query sees: those up to its own, at most `window` of them. None where that is all of them.

    An int gives [1, 1, seq, slots + seq]; a tensor [batch, seq] gives [batch, 1, seq, highest slot + 1].
    """
    if isinstance(slots, int):
        if seq == 1 and (window is None or slots < window):
            return None
        slots = torch.arange(slots, slots + seq, device=device)[None]
    keys = torch.arange(int(slots.max()) + 1, device=device)
    queries = slots[:, None, :, None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


class LayerCaches(Sequence[LayerCache]):
    """Caches of a range of layers [layers, batch, kv_heads, capacity, head_dim], cut into views only where needed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> LayerCache:
        return self.keys[index], self.values[index]


class Transformer(nn.Module):
    """A frozen target model; see the module docstring for how it is cut."""

    engine: Engine | None = None  # set by `engine.attach_engine`; what it does not take runs in plain torch

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
        return KVCache(self.config, capacity, batch, num_layers, self.dtype, self.device)

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
    if positions is None:
        positions = torch.arange(slots, slots + seq, device=hidden.device)[None] if isinstance(slots, int) else slots
    cos, sin = rotary(positions, hidden.dtype)
    angles = cos[:, None], sin[:, None]
    config = layers[0].config
    mask = causal_mask(slots, seq, config.window, hidden.device) if mask is None else mask
    for layer, cache in zip(layers, caches, strict=True):
        hidden = layer(hidden, angles, mask, cache, slots)
    return hidden
