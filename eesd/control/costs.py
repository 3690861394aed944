"""Modelled seconds of decoding, from the cost table that `eesd hardware` measures.

    table = read_costs("resources/hardware/smollm2-135m.json")
    costs = table.at(context=300)
    costs.round_s(drafted=4)                            # seconds of drafting 4 tokens and verifying them
    costs.round_s(drafted=4, accepted=2, signals=3)     # of which 2 are kept, a controller having looked at 3
    costs.round_s(0)                                    # seconds of a round without a draft

A cost-aware controller decides by these numbers, not by a clock, so that live decoding and replay agree round by
round; replay turns rounds into time with them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path

from eesd.cost_file import Measured, read_measured
from eesd.errors import EesdError

VERIFIED = "verified"  # the `context` of a head that processes accepted tokens again


@dataclass(frozen=True)
class Costs:
    """Seconds at one context length.

    rounds_s[k]: a round of the decode loop that drafts k tokens, nobody looking at signals. vanilla_s: a token of
    vanilla decoding, which has no drafter to keep informed; as rounds_s[0] where it was not measured. rows_s[n]: what
    n more rows add to an exit layer's step; constant beyond its end. again: whether the head processes accepted tokens
    again, with the next draft. signal_s: the statistics of one draft law, for a controller that reads them.
    verify_s[n - 1]: all layers and the head on n query tokens.
    """

    rounds_s: tuple[float, ...]
    rows_s: tuple[float, ...] = ()
    signal_s: float = 0.0
    again: bool = True
    verify_s: tuple[float, ...] = ()
    vanilla_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.vanilla_s:
            object.__setattr__(self, "vanilla_s", self.rounds_s[0])

    @classmethod
    def of_pieces(cls, draft_s: float, verify_s: Sequence[float], vanilla_s: float, first_layers_s: float) -> Costs:
        """The sum of separate measurements, for tables without whole rounds.

        verify_s[n - 1]: the layers above the exit and the head on n query tokens. first_layers_s: of the last drafted
        token, which no draft step has run.
        """
        drafts = (k * draft_s + first_layers_s + verify_s[k] for k in range(1, len(verify_s)))
        return cls((vanilla_s, *drafts))

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
        """Seconds of a round whose draft is copied from the context: one without a draft, with more to verify."""
        return self.rounds_s[0] + self.verify_s[drafted] - self.verify_s[0]

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

    decisions_s: seconds of one decision by the name of the controller. how: data type and threads that it was measured
    with, in words.
    """

    hardware: str
    contexts: tuple[int, ...]
    costs: tuple[Costs, ...]
    decisions_s: Mapping[str, float] = field(default_factory=dict)
    how: str = ""

    def decision_s(self, controller: str) -> float:
        """Seconds of one decision of a controller; of one that was not there to be measured those of the dearest."""
        return self.decisions_s.get(controller, max(self.decisions_s.values(), default=0.0))

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
            between(low.vanilla_s, high.vanilla_s),
        )


def read_costs(
    path: Path | str,
    exit_layer: int | None = None,
    context: str = VERIFIED,
    model: str | None = None,
    rows: int | None = None,
    borrowed: bool = True,
) -> CostTable:
    """The cost table in a file of `eesd hardware`; EesdError with its path for anything that is not one.

    exit_layer: where the head exits that the costs are for; another one in the table is an error. context: what that
    head reads, as in its card: one that reads `verified` states processes accepted tokens again. model: of the drafts.
    rows: tokens that the head can draft; another number in the table is an error too. borrowed: a table of another
    model may price the drafts too, whatever its exit layer and rows; else it is an error.
    """
    found = read_measured(path)
    measured_exit = found.facts["exit_layer"]
    other = model is not None and found.facts["model"] != model
    if other and not borrowed:
        raise EesdError(f"{path}: costs of {found.facts['model']}, but {model} decoded. Give the table of that model.")
    if not other and exit_layer not in (None, measured_exit):
        raise EesdError(
            f"{path}: measured with an exit after layer {measured_exit}, but the head exits after layer "
            f"{exit_layer}. Measure with `eesd hardware --exit-layer {exit_layer}` and name that file as `costs`."
        )
    measured_rows = found.facts.get("draft_rows")
    if not other and None not in (rows, measured_rows) and rows != measured_rows:
        raise EesdError(
            f"{path}: measured with a head that drafts {measured_rows} different tokens, but this one drafts {rows}. "
            f"Measure with `eesd hardware --draft-rows {rows}` and name that file as `costs`."
        )
    costs = tuple(_costs(found, at, again=context == VERIFIED) for at in found.contexts)
    return CostTable(found.hardware, found.contexts, costs, dict(found.facts.get("decisions_s", {})), found.how)


def read_verification(path: Path | str, context: int, rows: int) -> tuple[float, tuple[float, ...]]:
    """Seconds of a draft head over `rows` tokens, and of verifying 1, 2 .. tokens through all layers, at the nearest
    context measured. A head of another size than the measured one lies on the line from that to the target's own head.
    """
    found = read_measured(path)
    at = min(found.contexts, key=lambda measured: abs(measured - context))
    verify = tuple(found.cost("verify", query, at) for query in range(1, max(1, found.longest("verify", at)) + 1))
    head, measured = found.cost("draft_head", 1, at), found.facts.get("draft_rows", rows)
    if rows != measured:
        whole = found.cost("full_head", 1, at)
        size = {one["path"]: one["bytes"] for one in found.facts["costs"] if one["context_tokens"] == at}
        more = size["full_head"] - size["draft_head"]
        # A table of a head over the whole vocabulary has one point: there the line goes through zero.
        byte_s = (whole - head) / more if more else head / size["draft_head"]
        head += byte_s * (rows - measured) * size["draft_head"] / measured
    return head, verify


def _costs(found: Measured, context: int, again: bool) -> Costs:
    def cost(piece: str, query: int = 1) -> float:
        return found.cost(piece, query, context)

    def longest(piece: str) -> int:
        return found.longest(piece, context)

    if longest("round"):
        rounds = Costs(tuple(cost("round", k) for k in range(longest("round") + 1)))
    else:  # measured before whole rounds were
        verify = [cost("verify_from_exit", query) for query in range(1, max(1, longest("verify_from_exit")) + 1)]
        rounds = Costs.of_pieces(cost("draft"), verify, cost("vanilla"), cost("first_layers"))

    def all_lengths(piece: str) -> tuple[float, ...]:
        """Seconds on 1, 2 .. query tokens, up to the first that was not measured."""
        return tuple(takewhile(bool, (found.seconds.get((piece, query, context), 0.0) for query in count(1))))

    rows = all_lengths("exit_layer")
    return Costs(
        rounds.rounds_s,
        rows_s=tuple(max(0.0, row - rows[0]) for row in rows),
        signal_s=cost("signal") if longest("signal") else 0.0,
        again=again,
        verify_s=all_lengths("verify"),
        vanilla_s=cost("vanilla_round") if longest("vanilla_round") else 0.0,
    )
