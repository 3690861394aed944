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


class KVCache:
    """Keys and values of `num_layers` layers, each [batch, kv_heads, capacity, head_dim]."""

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
        shape = (layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> LayerCache:
        """Keys and values of one layer, as views."""
        return self.keys[index], self.values[index]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these batch rows, in this order (finished rows of a batch are retired)."""
        self.keys = self.keys[:, rows].contiguous()
        self.values = self.values[:, rows].contiguous()

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
