"""Modelled seconds of decoding, from the cost table that `eesd hardware` measures.

    table = read_costs("resources/hardware/smollm2-135m.json")
    costs = table.at(context=300)
    costs.round_s(drafted=4)      # seconds of drafting 4 tokens and verifying them
    costs.vanilla_s               # seconds of a vanilla token

A cost-aware controller decides by these numbers, not by a clock, so that live decoding and replay agree round by
round; replay turns rounds into time with them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eesd.errors import EesdError


@dataclass(frozen=True)
class Costs:
    """Seconds at one context length.

    draft_s: one draft step. verify_s[n - 1]: the layers above the exit and the head on n query tokens.
    vanilla_s: one token without drafting. overhead_s: what a round with a draft pays once, the first layers of its
    last drafted token, which no draft step has run.
    """

    draft_s: float
    verify_s: tuple[float, ...]
    vanilla_s: float
    overhead_s: float

    @property
    def k_max(self) -> int:
        """Longest draft that these costs can price."""
        return len(self.verify_s) - 1

    def round_s(self, drafted: int) -> float:
        """Seconds of a round; with nothing drafted it is a vanilla token."""
        return drafted * self.draft_s + self.overhead_s + self.verify_s[drafted] if drafted else self.vanilla_s

    def more_s(self, drafted: int) -> float:
        """Seconds that drafting one token more than `drafted` adds to a round."""
        return self.round_s(drafted + 1) - self.round_s(drafted)

    def check_k(self, k: int, where: str = "The cost table") -> None:
        """EesdError unless drafts of k tokens have a price."""
        if k > self.k_max:
            raise EesdError(
                f"{where} has no cost of verifying {k + 1} tokens, which drafts of k = {k} need; its largest k is "
                f"{self.k_max}. Lower k or k_max, or measure longer ones with `eesd hardware`."
            )


@dataclass(frozen=True)
class CostTable:
    """Costs at increasing context lengths (tokens), linear between them and constant beyond."""

    hardware: str
    contexts: tuple[int, ...]
    costs: tuple[Costs, ...]

    def at(self, context: float) -> Costs:
        """Costs with `context` tokens in the cache."""
        i = bisect_right(self.contexts, context)
        if i == 0 or i == len(self.contexts):
            return self.costs[min(i, len(self.contexts) - 1)]
        low, high = self.costs[i - 1], self.costs[i]
        share = (context - self.contexts[i - 1]) / (self.contexts[i] - self.contexts[i - 1])

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        return Costs(
            between(low.draft_s, high.draft_s),
            tuple(map(between, low.verify_s, high.verify_s)),
            between(low.vanilla_s, high.vanilla_s),
            between(low.overhead_s, high.overhead_s),
        )


def read_costs(path: Path | str, exit_layer: int | None = None) -> CostTable:
    """The cost table in a file of `eesd hardware`; EesdError with its path for anything that is not one.

    exit_layer: where the head exits that the costs are for; another one in the table is an error.
    """
    hardware, measured, seconds = _read(path)
    if exit_layer not in (None, measured):
        raise EesdError(
            f"{path}: measured with an exit after layer {measured}, but the head exits after layer {exit_layer}. "
            f"Measure with `eesd hardware --exit-layer {exit_layer}` and name that file as `costs`."
        )
    contexts = tuple(sorted({context for _, _, context in seconds}))
    return CostTable(hardware, contexts, tuple(_costs(seconds, context, path) for context in contexts))


def read_verification(path: Path | str, context: int) -> tuple[float, tuple[float, ...]]:
    """Seconds of a draft head, and of verifying 1, 2 .. tokens through all layers, at the nearest context measured."""
    _, _, seconds = _read(path)
    at = min({context for _, _, context in seconds}, key=lambda measured: (abs(measured - context), measured))
    longest = max((query for piece, query, where in seconds if piece == "verify" and where == at), default=1)
    verify = tuple(_cost(seconds, path, "verify", query, at) for query in range(1, longest + 1))
    return _cost(seconds, path, "draft_head", 1, at), verify


def _read(path: Path | str) -> tuple[str, int, dict[tuple[str, int, int], float]]:
    """Hardware, exit layer and seconds by (piece, query tokens, context tokens) of a file of `eesd hardware`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        seconds = {(c["path"], c["query_tokens"], c["context_tokens"]): c["seconds"] for c in found["costs"]}
        hardware = f"{found['model']}, {found['dtype']}, {found['device']}"
        exit_layer = found["exit_layer"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EesdError(f"{path}: not a cost table ({error!r}). `eesd hardware` writes one.") from error
    bad = [key for key, value in seconds.items() if not isinstance(value, int | float) or not 0 < value < math.inf]
    if bad:
        path_name, query, context = bad[0]
        raise EesdError(f"{path}: {path_name} of {query} tokens at context {context} has no time above zero.")
    if not seconds:
        raise EesdError(f"{path}: an empty cost table. Measure again with `eesd hardware`.")
    return hardware, exit_layer, seconds


def _cost(
    seconds: Mapping[tuple[str, int, int], float], path: Path | str, piece: str, query: int, context: int
) -> float:
    try:
        return seconds[piece, query, context]
    except KeyError:
        raise EesdError(
            f"{path}: no cost of {piece} for {query} tokens at context {context}. Measure again with `eesd hardware`."
        ) from None


def _costs(seconds: Mapping[tuple[str, int, int], float], context: int, path: Path | str) -> Costs:
    def cost(piece: str, query: int = 1) -> float:
        return _cost(seconds, path, piece, query, context)

    longest = max((query for piece, query, at in seconds if piece == "verify_from_exit" and at == context), default=1)
    verify = tuple(cost("verify_from_exit", query) for query in range(1, longest + 1))
    return Costs(cost("draft"), verify, cost("vanilla"), cost("first_layers"))
