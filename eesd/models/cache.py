"""Key-value cache: allocated once, written by slot, rolled back for free.

A token is written at its slot; a query sees the slots up to its own. Rolling back is therefore nothing but writing
the next token at an earlier slot, and layers may be filled to different lengths: drafting runs ahead in the first N
only. Trees of drafted tokens put branches side by side; what is kept of them is moved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from eesd.models.config import ModelConfig

# Keys and values of one layer, as in `KVCache`.
LayerCache = tuple[Tensor, Tensor]

# Slots of a chunked cache that lie together: what the decode engine takes at a time.
CHUNK = 64
# Of heads that it attends with.
LARGEST_HEAD_DIM = 256


class KVCache:
    """Keys and values of `num_layers` layers, each [batch, kv_heads, capacity, head_dim].

    chunked: keys are [batch, kv_heads, chunks, CHUNK, head_dim] instead, stored with the slots of a chunk side by side:
        as the decode engine of a CPU multiplies them with a query, and every chunk in one piece of memory. Not where it
        does not take heads of this size. `write` and `read` take both.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch: int = 1,
        num_layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunked: bool = False,
    ) -> None:
        layers = config.num_layers if num_layers is None else num_layers
        outer, dim = (layers, batch, config.num_kv_heads), config.head_dim
        self.capacity = capacity
        self._chunked = chunked = chunked and dim % 8 == 0 and dim <= LARGEST_HEAD_DIM
        chunks = -(-capacity // CHUNK)
        places = (chunks, dim, CHUNK) if chunked else (capacity, dim)
        keys = torch.zeros(*outer, *places, dtype=dtype, device=device)
        values = torch.zeros(*outer, chunks * CHUNK if chunked else capacity, dim, dtype=dtype, device=device)
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Take over memory as it is stored, and show it as the class describes it."""
        self._stored = keys, values
        self.keys = keys.transpose(-1, -2) if self._chunked else keys
        self.values = values[..., : self.capacity, :]

    def layer(self, index: int) -> LayerCache:
        """Keys and values of one layer, as views."""
        return self.keys[index], self.values[index]

    def take_rows(self, rows: Tensor) -> None:
        """Copy these batch rows, in this order, to memory of their own; a row may be taken several times."""
        self._hold(*(stored[:, rows] for stored in self._stored))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these batch rows, in the same memory (finished rows of a batch are retired).

        Raises ValueError where they do not ascend: a row would be gone before it is moved.
        """
        if any(row >= after for row, after in pairwise(rows)):
            raise ValueError(f"Rows to keep must ascend, not {list(rows)}.")
        for stored in self._stored:
            for row, old in enumerate(rows):
                if old != row:
                    stored[:, row] = stored[:, old]
        self._hold(*(stored[:, : len(rows)] for stored in self._stored))

    def move(self, sources: Sequence[int], slot: int) -> None:
        """Copy the entries at slots `sources`, in this order, to the slots from `slot` on, in every layer."""
        stores = [self.values] if self._chunked else [self.keys, self.values]
        for store in stores:
            store[:, :, :, slot : slot + len(sources)] = store[:, :, :, sources]
        if self._chunked:
            old, new = (
                _places(torch.tensor(sources, dtype=torch.long)),
                _places(torch.arange(slot, slot + len(sources))),
            )
            self.keys[:, :, :, *new] = self.keys[:, :, :, *old]


def write(cache: LayerCache, keys: Tensor, values: Tensor, slots: int | Tensor) -> None:
    """Store new keys and values [batch, kv_heads, seq, head_dim] from slot `slots` on, or at slots [batch, seq]."""
    if cache[0].ndim == 5:
        rows = torch.arange(len(keys))[:, None]
        at = torch.arange(slots, slots + keys.shape[2])[None] if isinstance(slots, int) else slots
        chunk, place = _places(at)
        cache[0][rows, :, chunk, place] = keys.transpose(1, 2)
        stores = [(cache[1], values)]
    else:
        stores = [(cache[0], keys), (cache[1], values)]
    for store, new in stores:
        if isinstance(slots, int):
            store[:, :, slots : slots + new.shape[2]] = new
        else:
            index = slots[:, None, :, None].expand_as(new)
            store.scatter_(2, index, new)


def read(cache: LayerCache, live: int) -> LayerCache:
    """Keys and values [batch, kv_heads, live, head_dim] of the first `live` slots."""
    keys, values = cache
    if keys.ndim == 5:
        keys = keys[:, :, : -(-live // CHUNK)].flatten(2, 3)
    return keys[:, :, :live], values[:, :, :live]


def _places(slots: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk of every slot, and where it is within that."""
    return slots // CHUNK, slots % CHUNK
