"""Few shapes for products: on CPUs torch prepares one anew for every shape, in bfloat16 for longer than it then takes.

pad_positions([state, longer], [5, 2], 64)  # [n, size] and [m, size] as [2, 64, size], from positions 5 and 2 on
in_few_shapes(head.logits, x)               # head.logits(x), computed for a multiple of 4 * ROUND rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

# Of positions; of rows, of which there are more, four times as many.
ROUND = 32


def pad_positions(parts: Sequence[Tensor], starts: Sequence[int], seq: int) -> Tensor:
    """Parts [n, size] as one tensor [batch, seq, size], each from its start on, zeros before and behind."""
    together = parts[0].new_zeros(len(parts), seq, *parts[0].shape[1:])
    for row, (part, start) in enumerate(zip(parts, starts, strict=True)):
        together[row, start : start + len(part)] = part
    return together


def round_down(position: int) -> int:
    """The last position up to this one from which on a slice has one of few lengths."""
    return position // ROUND * ROUND


def round_up(length: int) -> int:
    """The next of few lengths."""
    return -round_down(-length)


def pad_rows(x: Tensor) -> Tensor:
    """x [n, size] with rows of zeros behind it."""
    return F.pad(x, (0, 0, 0, -len(x) % (4 * ROUND)))


def in_few_shapes(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `product` makes of every row of x [n, size]: [n, ..]."""
    return product(pad_rows(x))[: len(x)]
