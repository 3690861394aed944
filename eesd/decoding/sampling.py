"""Drawing and verifying tokens so that the output follows the target's law exactly.

Greedy: a drafted token is accepted iff it is the target's argmax. Sampled: speculative sampling (Leviathan et al. 2023,
Chen et al. 2023): accept x with probability min(1, p(x) / q(x)), else draw from the normalised max(p - q, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eesd.errors import EesdError


@dataclass(frozen=True)
class Sampling:
    """How a next token follows from logits; applied to target and drafter alike. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise EesdError(
                f"Sampling needs temperature >= 0, top_k >= 0 and top_p in (0, 1], not {self.temperature}, "
                f"{self.top_k}, {self.top_p}."
            )

    @property
    def greedy(self) -> bool:
        """True when no random number is needed."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [.., vocab] -> the law a token is drawn from, same shape, float32 or better."""
        scores = _widened(logits) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            smallest = scores.topk(self.top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < smallest, float("-inf"))
        law = scores.softmax(-1)
        return law if self.top_p == 1 else _nucleus(law, self.top_p)


def probabilities(logits: Tensor) -> Tensor:
    """The model's own law, logits [.., vocab] at temperature 1, float32 or better: confidence of greedy drafts."""
    return _widened(logits).softmax(-1)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nucleus(law: Tensor, top_p: float) -> Tensor:
    """Keep the most probable tokens whose mass first reaches top_p (Holtzman et al. 2020), renormalised."""
    ordered, index = law.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(law).scatter(-1, index, ordered * (before < top_p))
    return kept / kept.sum(-1, keepdim=True)


def draw(law: Tensor, generator: torch.Generator) -> Tensor:
    """One index [], drawn from a law [vocab], which need not be normalised."""
    return draw_rows(law[None], generator)[0]


def draw_rows(laws: Tensor, generator: torch.Generator) -> Tensor:
    """An index [n] from each of the laws [n, vocab], by inversion: `torch.multinomial` takes ten times as long."""
    mass = laws.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:].contiguous()
    point = torch.rand(total.shape, generator=generator, dtype=mass.dtype, device=mass.device) * total
    # At most the last index that has any mass, should rounding bring the point up to the total.
    last = torch.searchsorted(mass, total)
    return torch.minimum(torch.searchsorted(mass, point, right=True), last)[:, 0]


def accept_greedy(drafted: list[int], best: list[int]) -> tuple[int, int]:
    """Length of the accepted prefix of `drafted`, and the target's token after it.

    best: the target's most probable token after 0, 1, .. accepted tokens; one more than are drafted.
    """
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


def accept_sampled(
    drafted: list[int],
    draft_laws: list[Tensor | None],
    vocabulary: Tensor | None,
    target_laws: Tensor,
    generator: torch.Generator,
) -> tuple[int, int]:
    """Speculative sampling over a chain: length of the accepted prefix and the token after it.

    draft_laws: q of every drafted token, [rows], None where it is one-hot at that token. vocabulary: the token id of
    every row (None: rows are ids).
    target_laws [len(drafted) + 1, vocab]: p after 0, 1, .. accepted tokens.
    """
    for i, token in enumerate(drafted):
        p, q = target_laws[i], draft_laws[i]
        uniform = torch.rand((), generator=generator, dtype=p.dtype, device=p.device)
        if q is None:
            if uniform < p[token]:
                continue
            residual = p.clone()
            residual[token] = 0
        else:
            q = _on_vocabulary(q, vocabulary, target_laws.shape[-1])
            if uniform * q[token] < p[token]:
                continue
            residual = (p - q).clamp(min=0)
        # Rounding can leave nothing of p - q only where p equals q, and then p is the residual's limit.
        return i, int(draw(residual if float(residual.sum()) > 0 else p, generator))
    return len(drafted), int(draw(target_laws[len(drafted)], generator))


def _on_vocabulary(law: Tensor, vocabulary: Tensor | None, size: int) -> Tensor:
    """A law over draft rows spread over the target's vocabulary, zero elsewhere."""
    if vocabulary is None:
        return law
    return torch.zeros(size, dtype=law.dtype, device=law.device).index_copy_(0, vocabulary, law)
