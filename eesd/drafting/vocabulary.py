"""The tokens that a head can draft after a prompt: the most frequent ones, or the prompt's own in place of the rarest.

ids = prompt_vocabulary(ranked, prompt)      # [rows], as many as `ranked`

A trimmed vocabulary loses the names and numbers that an answer takes from its prompt. Few as they are, they cost no
more rows: those of a head that keeps the target's own output rows can be changed with every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the rows, what a prompt may take; the rest stays.
PROMPT_SHARE = 4


def prompt_vocabulary(ranked: Tensor, prompt: Sequence[int]) -> Tensor:
    """`ranked` [rows], most frequent tokens first, with tokens of the prompt in place of the last ones.

    Of a prompt with more further tokens than there is room for, those that it names last.
    """
    room = len(ranked) // PROMPT_SHARE
    kept = ranked[: len(ranked) - room]
    known, spare = set(kept.tolist()), ranked[len(kept) :].tolist()
    further = [token for token in dict.fromkeys(reversed(prompt)) if token not in known][:room]
    taken = set(further)
    tail = [*further, *(token for token in spare if token not in taken)][:room]
    return torch.cat((kept, torch.tensor(tail, dtype=ranked.dtype, device=ranked.device)))
