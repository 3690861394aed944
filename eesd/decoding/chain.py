"""A chain of drafted tokens in the making: draws each token, asks the controller, keeps count.

Trees (eesd/decoding/tree.py) share with chains when a draft ends. Tokens of a chain stay on the device until somebody
reads them: with a controller that needs no signal and greedy decoding, a whole round is queued on a GPU without waiting
for it, and read once, with the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eesd.control import Controller, Signal
from eesd.decoding.sampling import Sampling, draw, probabilities

if TYPE_CHECKING:
    from eesd.models.engine import Engine
    from eesd.models.graphs import GraphEngine


class Draft:
    """What chains and trees share: how deep a draft may get, and asking the controller whether to go on.

    stop: why drafting ended: `controller`, `k_max`, `length` (the output's budget), `none` (nothing may be drafted);
    still empty when the drafter ended it.
    lap: told of the part of the loop (`draft`, `control`) that has just ended.
    engine: the target's, which computes what a controller may look at.
    """

    def __init__(
        self,
        controller: Controller | None,
        budget: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        lap: Callable[[str], None] = lambda part: None,
        engine: Engine | GraphEngine | None = None,
    ) -> None:
        k_max = controller.k_max if controller else 0
        self.controller, self.sampling, self.generator, self.lap = controller, sampling, generator, lap
        self.engine = engine
        self.limit = min(budget, k_max)
        self.at_limit = "length" if budget < k_max else "k_max"
        self.stop = "" if self.limit else "none"
        if self.limit:
            self.lap("draft")
            if not controller.start_drafting():
                self.stop = "controller"
            self.lap("control")

    def _ask(self, depth: int, signal: Callable[[], Signal]) -> None:
        """Set `stop` if a draft of this depth is full or the controller has enough."""
        if depth >= self.limit:
            self.stop = self.at_limit
            return
        self.lap("draft")
        if not self.controller.keep_drafting(signal()):
            self.stop = "controller"
        self.lap("control")


class Chain(Draft):
    """Handed to the drafter, which calls `extend` with draft logits, or `copy` with a token, until `stop` is set.

    ids: drafted tokens, those of `extend` as scalars on the device until they are read. laws: q of each token [rows],
    None where it is one-hot; empty when greedy.
    """

    def __init__(
        self,
        controller: Controller | None,
        budget: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        lap: Callable[[str], None] = lambda part: None,
        engine: Engine | GraphEngine | None = None,
    ) -> None:
        super().__init__(controller, budget, sampling, generator, lap, engine)
        self.ids: list[int | Tensor] = []
        self.laws: list[Tensor | None] = []

    @property
    def depth(self) -> int:
        """Drafted tokens."""
        return len(self.ids)

    @property
    def tokens(self) -> list[int]:
        """Drafted ids as numbers; waits for the device where they are not read yet."""
        last = next((token for token in reversed(self.ids) if isinstance(token, Tensor)), None)
        if last is not None:
            self.read(last.new_empty(0))
        return self.ids

    def read(self, more: Tensor) -> list[int]:
        """The numbers of `more` [n], read in one transfer with all drafted tokens that are on the device."""
        unread = [i for i, token in enumerate(self.ids) if isinstance(token, Tensor)]
        numbers = torch.hstack((*(self.ids[i] for i in unread), more)).tolist()
        for i, number in zip(unread, numbers, strict=False):
            self.ids[i] = number
        return numbers[len(unread) :]

    def extend(self, logits: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Add and return the token [] that draft logits [rows] give; row r is token `vocabulary[r]`, or r itself."""
        if self.sampling.greedy:
            law, row = None, logits.argmax()
        else:
            law = self.sampling.probabilities(logits)
            row = draw(law, self.generator)
            self.laws.append(law)
        # take(), because indexing with a scalar tensor reads it.
        token = row if vocabulary is None else vocabulary.take(row)
        self.ids.append(token)
        self._ask(len(self.ids), lambda: self._signal(logits, law, row))
        return token

    def copy(self, token: int) -> int:
        """Add a token that the drafter is certain of: q is one-hot, so confidence is 1 and entropy 0."""
        if not self.sampling.greedy:
            self.laws.append(None)
        self.ids.append(token)
        self._ask(len(self.ids), lambda: Signal(len(self.ids), 1.0, 1.0, 0.0))
        return token

    def _signal(self, logits: Tensor, law: Tensor | None, row: Tensor) -> Signal:
        """What the controller may look at; its cost, waiting included, is the controller's, and nobody else pays it."""
        if not self.controller.uses_signal:
            return Signal(len(self.ids), nan, nan, nan)
        confidence, share, entropy = read_signal(logits, row, law, self.engine)
        return Signal(len(self.ids), confidence, share, entropy)


def read_signal(
    logits: Tensor, row: Tensor, law: Tensor | None = None, engine: Engine | GraphEngine | None = None
) -> Sequence[float]:
    """max q, q of the drafted row and the entropy of q; waits for the device.

    Given draft logits [rows], of which `row` [] is then the greatest, or q itself, which `row` was drawn from.
    """
    if law is None and engine and (found := engine.softmax_statistics(logits)):
        return found[0], *found
    law = probabilities(logits) if law is None else law
    return torch.stack((law.max(), law.take(row), torch.special.entr(law).sum())).tolist()
