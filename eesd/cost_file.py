"""Files of `eesd hardware`: seconds of every piece of decoding on one machine, checked where they are read.

measured = read_measured("resources/hardware/smollm2-135m.json")
measured.cost("verify", 5, context=128)     # seconds of verifying 5 tokens behind a cache of 128
measured.longest("verify", context=128)     # the most query tokens that were measured
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.words import BUSY, DISTURBED

FACTS = (
    "model",
    "device",
    "dtype",
    "engine",
    "threads",
    "exit_layer",
    "read_bandwidth_bytes_per_s",
    "controller_step_s",
)
AGAIN = "Measure again with `eesd hardware`."


@dataclass(frozen=True)
class Measured:
    """One file. seconds: by (piece, query tokens, context tokens), all above zero; facts: the file as it is."""

    path: Path
    facts: dict[str, Any]
    seconds: dict[tuple[str, int, int], float]

    @property
    def machine(self) -> str:
        """The device, which says so if others used it too; older files do not know."""
        return self.facts["device"] + (BUSY if self.facts.get("crowding", 0) > DISTURBED else "")

    @property
    def hardware(self) -> str:
        """Model, data type and machine, in words."""
        return f"{self.facts['model']}, {self.facts['dtype']}, {self.machine}"

    @property
    def how(self) -> str:
        """Data type and threads, in words."""
        return measured_how(self.facts["dtype"], self.facts["engine"].split("-")[0], self.facts["threads"])

    @property
    def contexts(self) -> tuple[int, ...]:
        """Context lengths (tokens), rising."""
        return tuple(sorted({at for _, _, at in self.seconds}))

    def longest(self, piece: str, context: int) -> int:
        """The most query tokens of a piece; 0 where it was not measured."""
        return max((query for name, query, at in self.seconds if (name, at) == (piece, context)), default=0)

    def cost(self, piece: str, query: int, context: int) -> float:
        """Seconds; EesdError where it was not measured."""
        try:
            return self.seconds[piece, query, context]
        except KeyError:
            raise EesdError(
                f"{self.path}: no cost of {piece} for {query} tokens at context {context}. {AGAIN}"
            ) from None


def measured_how(dtype: str, device: str, threads: int) -> str:
    """What times of a machine depend on besides it, in words; threads only where they compute."""
    return dtype if device == "cuda" else f"{dtype} with {threads} thread{'' if threads == 1 else 's'}"


def read_measured(path: Path | str) -> Measured:
    """The file, whose facts and pieces are all there; EesdError with its path for anything else."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        seconds = {(c["path"], c["query_tokens"], c["context_tokens"]): c["seconds"] for c in facts["costs"]}
        absent = [fact for fact in FACTS if fact not in facts]
        if absent:
            raise KeyError(*absent)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EesdError(f"{path}: not a cost table ({error!r}). `eesd hardware` writes one.") from error
    bad = [key for key, value in seconds.items() if not isinstance(value, int | float) or not 0 < value < math.inf]
    if bad:
        piece, query, context = bad[0]
        raise EesdError(f"{path}: {piece} of {query} tokens at context {context} has no time above zero. {AGAIN}")
    if not seconds:
        raise EesdError(f"{path}: an empty cost table. {AGAIN}")
    return Measured(Path(path), facts, seconds)
