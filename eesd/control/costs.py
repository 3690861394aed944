"""Modelled seconds of decoding, from the cost table that `eesd hardware` measures.

    table = read_costs("resources/hardware/smollm2-135m.json")
    costs = table.at(context=300)
    costs.round_s(drafted=4)                            # seconds of drafting 4 tokens and verifying them
    costs.round_s(drafted=4, accepted=2, signals=3)     # of which 2 are kept, a controller having looked at 3
    costs.round_s(0)                                    # seconds of a vanilla token

A cost-aware controller decides by these numbers, not by a clock, so that live decoding and replay agree round by
round; replay turns rounds into time with them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from eesd.bench.load import machine
from eesd.errors import EesdError

VERIFIED = "verified"  # the `context` of a head that processes accepted tokens again


@dataclass(frozen=True)
class Costs:
    """Seconds at one context length.

    rounds_s[k]: a round of the decode loop that drafts k tokens, nobody looking at signals; rounds_s[0] is a vanilla
    token. rows_s[n]: what n more rows add to an exit layer's step; constant beyond its end. again: whether the head
    processes accepted tokens again, with the next draft. signal_s: the statistics of one draft law, for a controller
    that reads them. verify_s[n - 1]: all layers and the head on n query tokens.
    """

    rounds_s: tuple[float, ...]
    rows_s: tuple[float, ...] = ()
    signal_s: float = 0.0
    again: bool = True
    verify_s: tuple[float, ...] = ()

    @classmethod
    def of_pieces(cls, draft_s: float, verify_s: Sequence[float], vanilla_s: float, first_layers_s: float) -> Costs:
        """The sum of separate measurements, for tables without whole rounds.

        verify_s[n - 1]: the layers above the exit and the head on n query tokens. first_layers_s: of the last drafted
        token, which no draft step has run.
        """
        drafts = (k * draft_s + first_layers_s + verify_s[k] for k in range(1, len(verify_s)))
        return cls((vanilla_s, *drafts))

    @property
    def vanilla_s(self) -> float:
        """One token without drafting."""
        return self.rounds_s[0]

    @property
    def k_max(self) -> int:
        """Longest draft that these costs can price."""
        return len(self.rounds_s) - 1

    def round_s(self, drafted: int, accepted: int = 0, signals: int = 0) -> float:
        """Seconds of a round; it pays for its accepted tokens, though they are processed with the next draft."""
        return self.rounds_s[drafted] + self.accepted_s(accepted) + signals * self.signal_s

    def accepted_s(self, accepted: int) -> float:
        """What accepted tokens add to the next draft."""
        return self.unseen_s(accepted) if self.again else 0.0

    def copied_s(self, drafted: int) -> float:
        """Seconds of a round whose draft is copied from the context: a vanilla token with more to verify."""
        return self.vanilla_s + self.verify_s[drafted] - self.verify_s[0]

    def unseen_s(self, rows: int) -> float:
        """What tokens that the exit layer has not seen add to the next draft."""
        return self.rows_s[min(rows, len(self.rows_s) - 1)] if self.rows_s else 0.0

    def check_k(self, k: int, where: str = "The cost table") -> None:
        """EesdError unless drafts of k tokens have a price."""
        if k > self.k_max:
            raise EesdError(
                f"{where} has no cost of verifying {k + 1} tokens, which drafts of k = {k} need; its largest k is "
                f"{self.k_max}. Lower k or k_max, or measure longer ones with `eesd hardware`."
            )


@dataclass(frozen=True)
class CostTable:
    """Costs at increasing context lengths (tokens), linear between them and constant beyond.

    decisions_s: seconds of one decision by the name of the controller; others are free. how: data type and threads that
    it was measured with, in words.
    """

    hardware: str
    contexts: tuple[int, ...]
    costs: tuple[Costs, ...]
    decisions_s: Mapping[str, float] = field(default_factory=dict)
    how: str = ""

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
            tuple(map(between, low.rounds_s, high.rounds_s)),
            tuple(map(between, low.rows_s, high.rows_s)),
            between(low.signal_s, high.signal_s),
            low.again,
            tuple(map(between, low.verify_s, high.verify_s)),
        )


def read_costs(
    path: Path | str, exit_layer: int | None = None, context: str = VERIFIED, model: str | None = None
) -> CostTable:
    """The cost table in a file of `eesd hardware`; EesdError with its path for anything that is not one.

    exit_layer: where the head exits that the costs are for; another one in the table is an error. context: what that
    head reads, as in its card: one that reads `verified` states processes accepted tokens again. model: of the drafts,
    where a table of another model may price them too, whatever its exit layer.
    """
    found = _read(path)
    borrowed = model is not None and found.model != model
    if not borrowed and exit_layer not in (None, found.exit_layer):
        raise EesdError(
            f"{path}: measured with an exit after layer {found.exit_layer}, but the head exits after layer "
            f"{exit_layer}. Measure with `eesd hardware --exit-layer {exit_layer}` and name that file as `costs`."
        )
    contexts = tuple(sorted({at for _, _, at in found.seconds}))
    costs = tuple(_costs(found.seconds, at, path, again=context == VERIFIED) for at in contexts)
    return CostTable(found.hardware, contexts, costs, found.decisions_s, found.how)


def read_verification(path: Path | str, context: int) -> tuple[float, tuple[float, ...]]:
    """Seconds of a draft head, and of verifying 1, 2 .. tokens through all layers, at the nearest context measured."""
    seconds = _read(path).seconds
    at = min({context for _, _, context in seconds}, key=lambda measured: (abs(measured - context), measured))
    longest = max((query for piece, query, where in seconds if piece == "verify" and where == at), default=1)
    verify = tuple(_cost(seconds, path, "verify", query, at) for query in range(1, longest + 1))
    return _cost(seconds, path, "draft_head", 1, at), verify


class _Measured(NamedTuple):
    """A file of `eesd hardware`; seconds by (piece, query tokens, context tokens)."""

    model: str
    hardware: str
    exit_layer: int
    seconds: dict[tuple[str, int, int], float]
    decisions_s: dict[str, float]
    how: str


def measured_how(dtype: str, device: str, threads: int) -> str:
    """What times of a machine depend on besides it, in words; threads only where they compute."""
    return dtype if device == "cuda" else f"{dtype} with {threads} thread{'' if threads == 1 else 's'}"


def _read(path: Path | str) -> _Measured:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        seconds = {(c["path"], c["query_tokens"], c["context_tokens"]): c["seconds"] for c in found["costs"]}
        hardware = f"{found['model']}, {found['dtype']}, {machine(found)}"
        exit_layer, decisions = found["exit_layer"], dict(found.get("decisions_s", {}))
        how = measured_how(found["dtype"], found["engine"].split("-")[0], found["threads"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise EesdError(f"{path}: not a cost table ({error!r}). `eesd hardware` writes one.") from error
    bad = [key for key, value in seconds.items() if not isinstance(value, int | float) or not 0 < value < math.inf]
    if bad:
        path_name, query, context = bad[0]
        raise EesdError(f"{path}: {path_name} of {query} tokens at context {context} has no time above zero.")
    if not seconds:
        raise EesdError(f"{path}: an empty cost table. Measure again with `eesd hardware`.")
    return _Measured(found["model"], hardware, exit_layer, seconds, decisions, how)


def _cost(
    seconds: Mapping[tuple[str, int, int], float], path: Path | str, piece: str, query: int, context: int
) -> float:
    try:
        return seconds[piece, query, context]
    except KeyError:
        raise EesdError(
            f"{path}: no cost of {piece} for {query} tokens at context {context}. Measure again with `eesd hardware`."
        ) from None


def _costs(seconds: Mapping[tuple[str, int, int], float], context: int, path: Path | str, again: bool) -> Costs:
    def cost(piece: str, query: int = 1) -> float:
        return _cost(seconds, path, piece, query, context)

    def longest(piece: str) -> int:
        return max((query for name, query, at in seconds if (name, at) == (piece, context)), default=0)

    if longest("round"):
        rounds = Costs(tuple(cost("round", k) for k in range(longest("round") + 1)))
    else:  # measured before whole rounds were
        verify = [cost("verify_from_exit", query) for query in range(1, max(1, longest("verify_from_exit")) + 1)]
        rounds = Costs.of_pieces(cost("draft"), verify, cost("vanilla"), cost("first_layers"))

    def all_lengths(piece: str) -> tuple[float, ...]:
        """Seconds on 1, 2 .. query tokens, up to the first that was not measured."""
        return tuple(takewhile(bool, (seconds.get((piece, query, context), 0.0) for query in count(1))))

    rows = all_lengths("exit_layer")
    return Costs(
        rounds.rounds_s,
        rows_s=tuple(max(0.0, row - rows[0]) for row in rows),
        signal_s=cost("signal") if longest("signal") else 0.0,
        again=again,
        verify_s=all_lengths("verify"),
    )
