"""Running decoding code under the outcomes of its random numbers: all of them, or as many samples fall on each.

    law = spread(run, 1.0, exactly)                        # {result: probability}, the exact law of `run()`
    counts = spread(run, 200_000, sampled(seed=0))         # {result: count}, as from 200,000 independent runs

`run` is the real code, called once for every sequence of random outcomes. Where it draws a token or compares a uniform
number, the weight that arrives there is divided: by probability, or by a multinomial draw of samples. Samples that
share their history share the run, which is why 200,000 of them take seconds. Anything that draws by `sampling.draw` or
compares `torch.rand(())` can be run so, chains and trees alike; whatever else chooses at random has to be seeded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from eesd.decoding import sampling
from eesd.errors import EesdError

# (weight, law [outcomes]) -> the weight of every outcome.
Split = Callable[[float, np.ndarray], np.ndarray]


def exactly(weight: float, law: np.ndarray) -> np.ndarray:
    """Divide a probability."""
    return weight * law


def sampled(seed: int) -> Split:
    """Divide a number of samples at random."""
    return np.random.default_rng(seed).multinomial


class Chance:
    """The outcomes along one run: those of `path`, then always the first possible one, the others noted in `todo`."""

    def __init__(self, path: tuple[int, ...], weight: float, split: Split) -> None:
        self.path, self.weight, self.split = path, weight, split
        self.todo: list[tuple[tuple[int, ...], float]] = []
        self.depth = 0

    def choose(self, law: np.ndarray) -> int:
        """An outcome of this law, which sums to 1."""
        if self.depth == len(self.path):
            shares = self.split(self.weight, law)
            first, *others = np.flatnonzero(shares)
            self.todo += [((*self.path, int(i)), shares[i]) for i in others]
            self.path, self.weight = (*self.path, int(first)), shares[first]
        self.depth += 1
        return self.path[self.depth - 1]

    def draw_rows(self, laws: Tensor, generator: object) -> Tensor:
        """In place of `sampling.draw_rows`."""
        rows = laws.detach().double().cpu().numpy()
        return torch.tensor([self.choose(row / row.sum()) for row in rows], device=laws.device)

    def rand(self, *size: Any, **options: Any) -> Uniform:
        """In place of `torch.rand` for one number."""
        if size not in ((), ((),)):
            raise EesdError(f"torch.rand of size {size} has no countable outcomes: draw one number at a time.")
        return Uniform(self)


class Uniform:
    """A uniform number that is only known to lie in an interval; a comparison halves it, scaling does not."""

    def __init__(self, chance: Chance) -> None:
        self.chance, self.low, self.high = chance, 0.0, 1.0

    def __lt__(self, bound: Tensor | float) -> bool:
        return self.below(float(bound))

    def __mul__(self, scale: Tensor | float) -> Scaled:
        return Scaled(self, float(scale))

    __rmul__ = __mul__

    def below(self, bound: float) -> bool:
        """Whether the number lies below `bound`, given all comparisons before."""
        share = min(max((bound - self.low) / (self.high - self.low), 0.0), 1.0)
        yes = self.chance.choose(np.array([1 - share, share])) == 1
        bound = min(max(bound, self.low), self.high)
        self.low, self.high = (self.low, bound) if yes else (bound, self.high)
        return yes


class Scaled:
    """A uniform number times a constant >= 0."""

    def __init__(self, uniform: Uniform, scale: float) -> None:
        self.uniform, self.scale = uniform, scale

    def __lt__(self, bound: Tensor | float) -> bool:
        if self.scale == 0:
            return float(bound) > 0
        return self.uniform.below(float(bound) / self.scale)


def spread(run: Callable[[], Hashable], weight: float, split: Split) -> dict[Any, float]:
    """Weight of every result of `run`, `weight` in all."""
    totals: dict[Any, float] = defaultdict(float)
    todo = [((), weight)]
    while todo:
        chance = Chance(*todo.pop(), split)
        with patch.object(sampling, "draw_rows", chance.draw_rows), patch.object(torch, "rand", chance.rand):
            result = run()
        totals[result] += chance.weight
        todo += chance.todo
    return dict(totals)
