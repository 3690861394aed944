"""Few shapes for products: on CPUs torch prepares one anew for every shape, in bfloat16 for longer than it then takes.

pad_positions([state, longer])      # [n, size] and [m, size] as [2, seq, size], seq a multiple of ROUND
in_few_shapes(head.logits, x)       # head.logits(x), computed for a multiple of 4 * ROUND rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Of positions; of rows, of which there are more, four times as many.
ROUND = 32


def pad_positions(parts: Sequence[Tensor]) -> Tensor:
    """Parts [n, size] as one tensor [batch, seq, size], zeros behind each."""
    together = pad_sequence(list(parts), batch_first=True)
    return F.pad(together, (0, 0, 0, -together.shape[1] % ROUND))


def round_down(position: int) -> int:
    """The last position up to this one from which on a slice has one of few lengths."""
    return position // ROUND * ROUND


def pad_rows(x: Tensor) -> Tensor:
    """x [n, size] with rows of zeros behind it."""
    return F.pad(x, (0, 0, 0, -len(x) % (4 * ROUND)))


def in_few_shapes(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `product` makes of every row of x [n, size]: [n, ..]."""
    return product(pad_rows(x))[: len(x)]
