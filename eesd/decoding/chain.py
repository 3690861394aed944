"""A chain of drafted tokens in the making: draws each token, asks the controller, keeps count."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from time import perf_counter

import torch
from torch import Tensor

from eesd.control import Controller, Signal
from eesd.decoding.sampling import Sampling, draw


class Chain:
    """Handed to the drafter, which calls `extend` with draft logits, or `copy` with a token, until `stop` is set.

    tokens: drafted ids. laws: q of each token [rows], None where it is one-hot; empty when greedy.
    stop: why drafting ended: `controller`, `k_max`, `length` (the output's budget), `none` (nothing may be drafted);
    still empty when the drafter ended it.
    control_s: seconds spent by the controller, computing its signal included.
    """

    def __init__(
        self, controller: Controller | None, budget: int, sampling: Sampling, generator: torch.Generator | None
    ) -> None:
        k_max = controller.k_max if controller else 0
        self.controller, self.sampling, self.generator = controller, sampling, generator
        self.limit = min(budget, k_max)
        self.at_limit = "length" if budget < k_max else "k_max"
        self.tokens: list[int] = []
        self.laws: list[Tensor | None] = []
        self.stop = "" if self.limit else "none"
        self.control_s = 0.0
        if self.limit:
            began = perf_counter()
            if not controller.start_drafting():
                self.stop = "controller"
            self.control_s += perf_counter() - began

    def extend(self, logits: Tensor, vocabulary: Tensor | None = None) -> int:
        """Add and return the token that draft logits [rows] give; row r is token `vocabulary[r]`, or r itself."""
        if self.sampling.greedy:
            law, row = None, int(logits.argmax())
        else:
            law = self.sampling.probabilities(logits)
            row = draw(law, self.generator)
            self.laws.append(law)
        self.tokens.append(row if vocabulary is None else int(vocabulary[row]))
        self._ask(lambda: self._signal(logits, law, row))
        return self.tokens[-1]

    def copy(self, token: int) -> int:
        """Add a token that the drafter is certain of: q is one-hot, so confidence is 1 and entropy 0."""
        if not self.sampling.greedy:
            self.laws.append(None)
        self.tokens.append(token)
        self._ask(lambda: Signal(len(self.tokens), 1.0, 1.0, 0.0))
        return token

    def _ask(self, signal: Callable[[], Signal]) -> None:
        """Set `stop` if the chain is full or the controller has enough."""
        if len(self.tokens) >= self.limit:
            self.stop = self.at_limit
            return
        began = perf_counter()
        if not self.controller.keep_drafting(signal()):
            self.stop = "controller"
        self.control_s += perf_counter() - began

    def _signal(self, logits: Tensor, law: Tensor | None, row: int) -> Signal:
        """What the controller may look at; its cost is the controller's, and nobody else pays it."""
        if not self.controller.uses_signal:
            return Signal(len(self.tokens), nan, nan, nan)
        law = logits.softmax(-1) if law is None else law
        entropy = torch.special.entr(law).sum()
        return Signal(len(self.tokens), *torch.stack((law.max(), law[row], entropy)).tolist())
