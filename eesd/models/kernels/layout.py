"""What the kernels ask of the tensors they are given: plain numbers for slots, dense masks, caches as `KVCache` lays
them, and blocks of rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eesd.models.cache import CHUNK

# Rows of one call, so that activations stay in the cache of a core. Of one text there are more, since its rows share
# keys and values, and weights where one core reads them all.
BLOCK_ROWS = 64
TEXT_ROWS = 192
TWO_TILES = 32  # rows that AMX multiplies at once


def integers(x: int | Tensor, batch: int, seq: int) -> list[int]:
    """Slots or positions of every row, batch row after batch row."""
    if isinstance(x, int):
        return list(range(x, x + seq)) * batch
    return x.expand(batch, seq).flatten().tolist()


def fits(keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cache of several layers lies in memory as a chunked `KVCache` does."""
    dim = values.shape[4]
    laid_out = keys.ndim == 6 and keys.stride()[3:] == (CHUNK * dim, 1, CHUNK) and values.stride()[3:] == (dim, 1)
    typed = keys.dtype == values.dtype == dtype
    return laid_out and typed and keys.stride()[:3] == values.stride()[:3]


def dense(mask: Tensor, batch: int, seq: int) -> Tensor | None:
    """A mask broadcastable to [batch, 1, seq, live] as bytes [batch, seq, live]; None: too large, or per head."""
    if mask.dtype != torch.bool or batch * seq > BLOCK_ROWS or (mask.ndim == 4 and mask.shape[1] != 1):
        return None
    return mask.expand(batch, 1, seq, mask.shape[-1])[:, 0].contiguous().view(torch.uint8)


class Places(NamedTuple):
    """Slot and position of every row, batch row after batch row, and the slots it sees, bytes [batch, seq, live]."""

    slots: list[int]
    positions: list[int]
    mask: Tensor | None  # None: causal


def places(
    slots: int | Tensor, positions: Tensor | None, mask: Tensor | None, batch: int, seq: int, capacity: int
) -> Places | None:
    """Places as the kernels read them; None where they take no such mask, or slots lie outside of cache or mask."""
    slot_list = integers(slots, batch, seq)
    position_list = slot_list if positions is None else integers(positions, batch, seq)
    live = max(slot_list) + 1
    if min(slot_list) < 0 or min(position_list) < 0 or live > capacity:
        return None
    if mask is not None and ((mask := dense(mask, batch, seq)) is None or mask.shape[2] < live):
        return None
    return Places(slot_list, position_list, mask)


class Block(NamedTuple):
    """Rows first .. first + count of a call: `batches` whole batch rows from `row` on, or a part of one up to `end`."""

    first: int
    count: int
    row: int
    batches: int
    end: int


def blocks(batch: int, seq: int) -> list[Block]:
    """One block of at most BLOCK_ROWS rows. Else blocks of whole batch rows where these have one row each, or parts of
    every batch row, of at most TEXT_ROWS."""
    if batch * seq <= BLOCK_ROWS:
        return [Block(0, batch * seq, 0, batch, seq)]
    if seq == 1:
        return [Block(b, end - b, b, end - b, 1) for b, end in _cuts(batch, BLOCK_ROWS, 1)]
    parts = _cuts(seq, TEXT_ROWS, TWO_TILES)
    return [Block(b * seq + s, end - s, b, 1, end) for b in range(batch) for s, end in parts]


def _cuts(count: int, most: int, multiple: int) -> list[tuple[int, int]]:
    """Where to cut, into as few parts of at most `most` as there can be; all but the last equal, a multiple."""
    size = math.ceil(count / math.ceil(count / most) / multiple) * multiple
    return [(first, min(first + size, count)) for first in range(0, count, size)]
