"""Key-value cache: allocated once, written by slot, rolled back for free.

A token is written at its slot; a query sees the slots up to its own. Rolling back is therefore nothing but writing
the next token at an earlier slot, and layers may be filled to different lengths: drafting runs ahead in the first N
only. Trees of drafted tokens put branches side by side; what is kept of them is moved together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eesd.models.config import ModelConfig

LayerCache = tuple[Tensor, Tensor]

# On a CPU caches are made for a multiple of so many slots, which the decode engine reads at a time.
CHUNK = 64


class KVCache:
    """Keys and values of `num_layers` layers, each [batch, kv_heads, capacity, head_dim].

    On a CPU keys are stored turned, slots side by side: what the decode engine multiplies a query with, as it lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch: int = 1,
        num_layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        layers = config.num_layers if num_layers is None else num_layers
        self.capacity = capacity
        self._turned = torch.device(device).type == "cpu"
        room, dim = capacity, config.head_dim
        if self._turned:
            # An odd number of chunks: with a power of two all dimensions would compete for the same places of a core's
            # cache.
            room = CHUNK * (-(-capacity // CHUNK) | 1)
        outer = (layers, batch, config.num_kv_heads)
        keys = torch.zeros(*outer, *((dim, room) if self._turned else (room, dim)), dtype=dtype, device=device)
        self._hold(keys, torch.zeros(*outer, room, dim, dtype=dtype, device=device))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Take over memory as it is stored; `keys` and `values` show it as [.., capacity, head_dim]."""
        self._stored = keys, values
        keys = keys.transpose(3, 4) if self._turned else keys
        self.keys, self.values = keys[..., : self.capacity, :], values[..., : self.capacity, :]

    def layer(self, index: int) -> LayerCache:
        """Keys and values of one layer, as views."""
        return self.keys[index], self.values[index]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these batch rows, in this order (finished rows of a batch are retired)."""
        self._hold(*(stored[:, rows] for stored in self._stored))

    def move(self, sources: Sequence[int], slot: int) -> None:
        """Copy the entries at slots `sources`, in this order, to the slots from `slot` on, in every layer."""
        for store in (self.keys, self.values):
            store[:, :, :, slot : slot + len(sources)] = store[:, :, :, sources]


def write(cache: LayerCache, keys: Tensor, values: Tensor, slots: int | Tensor) -> None:
    """Store new keys and values [batch, kv_heads, seq, head_dim] from slot `slots` on, or at slots [batch, seq]."""
    for store, new in zip(cache, (keys, values), strict=True):
        if isinstance(slots, int):
            store[:, :, slots : slots + new.shape[2]] = new
        else:
            index = slots[:, None, :, None].expand_as(new)
            store.scatter_(2, index, new)
