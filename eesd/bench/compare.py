"""Token-by-token comparison of a method's greedy output with vanilla's, and the evidence about a first divergence.

A divergence is a `tie` only if, recomputed in float64 from the same weights and prefix, the logits of the two tokens
differ by less than the rounding error of the run's dtype can explain; otherwise it is `different`, a broken promise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from eesd.models.loading import load_target
from eesd.models.transformer import Transformer
from eesd.words import first_divergence

# Rounding matters where argmax is decided: among the most probable tokens.
CONTENDERS = 16


@dataclass(frozen=True)
class Comparison:
    """How an output compares with vanilla's; fields after `kind` describe the first divergence (token None: output
    ended).

    kind: `baseline`, `identical`, `tie`, `different` or `not_compared` (sampled outputs differ by chance).
    gap: difference of the two tokens' float64 logits. bound: twice the largest logit error measured for the dtype.
    length_rule: where one output begins the other, what `length_rule` says about it.
    """

    kind: str
    position: int | None = None
    vanilla_token: int | None = None
    token: int | None = None
    gap: float | None = None
    bound: float | None = None
    vanilla_logit: float | None = None
    logit: float | None = None
    length_rule: str | None = None

    def as_row(self) -> dict:
        """The `comparison` entry of a row."""
        facts = asdict(self)
        return {"class": facts.pop("kind"), **facts}


def length_rule(vanilla: Sequence[int], output: Sequence[int], eos: Collection[int]) -> str | None:
    """How an output ended where it begins vanilla's or goes on after it: outputs end with the first end of sequence,
    else at the token limit. None where a token differs.

    `eos_dropped`: it lacks vanilla's end of sequence alone. `eos_overrun`: it goes on after the end of sequence.
    `ended_early` and `limit_overrun`: no end of sequence explains its length.
    """
    shared = min(len(vanilla), len(output))
    if len(vanilla) == len(output) or list(vanilla[:shared]) != list(output[:shared]):
        return None
    if len(output) > shared:
        return "eos_overrun" if vanilla and vanilla[-1] in eos else "limit_overrun"
    return "eos_dropped" if len(vanilla) == shared + 1 and vanilla[-1] in eos else "ended_early"


class Judge:
    """Compares outputs of one target, which end after `eos`; loads the float64 reference only when one diverges.

    exact: the target computes every row alike, so rounding explains nothing and no divergence is a tie.
    """

    def __init__(self, target: Transformer, model_dir: Path, eos: Collection[int] = (), exact: bool = False) -> None:
        self.target, self.model_dir, self.eos, self.exact = target, model_dir, eos, exact

    @cached_property
    def reference(self) -> Transformer:
        """The same weights in float64, in main memory: eight bytes a weight."""
        return load_target(self.model_dir, "float64", "cpu")

    def compare(self, prompt: Sequence[int], vanilla: Sequence[int], output: Sequence[int]) -> Comparison:
        """Class of `output` against `vanilla`, with the evidence when they diverge."""
        position = first_divergence(vanilla, output)
        if position is None:
            return Comparison("identical")
        if position >= min(len(vanilla), len(output)):
            ended = [tokens[position] if position < len(tokens) else None for tokens in (vanilla, output)]
            rule = length_rule(vanilla, output, self.eos)
            return Comparison("different", position, *ended, length_rule=rule)
        logits, bound = self._evidence(prompt, vanilla, position, output[position])
        gap = abs(logits[0] - logits[1])
        kind = "tie" if gap <= bound and not self.exact else "different"
        return Comparison(kind, position, vanilla[position], output[position], gap, bound, *logits)

    @torch.inference_mode()
    def _evidence(
        self, prompt: Sequence[int], vanilla: Sequence[int], position: int, token: int
    ) -> tuple[tuple[float, float], float]:
        """Float64 logits of vanilla's token and `token` at the divergence, and the bound of all positions up to it."""
        tokens = torch.tensor([[*prompt, *vanilla[:position]]], device=self.target.device)
        exact = self._logits(self.reference, tokens.cpu(), len(prompt))
        rounded = self._logits(self.target, tokens, len(prompt)).double().cpu()
        top = exact.topk(min(CONTENDERS, exact.shape[-1]), -1).indices
        error = (exact.gather(1, top) - rounded.gather(1, top)).abs().max()
        return (float(exact[-1, vanilla[position]]), float(exact[-1, token])), 2 * float(error)

    @staticmethod
    def _logits(target: Transformer, tokens: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
        """Logits [generated + 1, vocab] at the last prompt token and every generated one."""
        # With a cache, so that the engine of the run does the run's arithmetic.
        hidden = target.run(target.embed(tokens), slice(None), target.new_cache(tokens.shape[1]))
        return target.logits(hidden[0, prompt_tokens - 1 :])
