"""Trace files: at every position of greedy outputs, the chain that would be drafted, its signals and its match length.

    trace = read_trace("results/traces/smollm2-135m/asdiv/main/deep1.safetensors")
    trace.items[0].match[5]      # of the chain drafted after output token 5, this many tokens are right

One safetensors file for each (model, task, group, drafter): arrays of all items end to end, facts in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eesd.control import CostTable, Signal, read_costs
from eesd.errors import EesdError
from eesd.files import atomic_path

SCHEMA = "3"
SIGNALS = ("confidence", "probability", "entropy")
ARRAYS = ("drafted", *SIGNALS, "length", "match")
TEXTS = ("prompt", "output", "beyond")


@dataclass(frozen=True)
class Chains:
    """Drafts after each of T positions: drafted, confidence, probability, entropy [T, K], length and match [T].

    Row t continues output token t, the pending one. length: tokens that the drafter had to propose, at most K; entries
    beyond are -1 and NaN. match: leading tokens that equal the target's.
    """

    drafted: NDArray[np.int32]
    confidence: NDArray[np.float32]
    probability: NDArray[np.float32]
    entropy: NDArray[np.float32]
    length: NDArray[np.int32]
    match: NDArray[np.int32]

    @cached_property
    def signals(self) -> list[list[Signal]]:
        """What a controller is shown, [T][K]; the numbers are those of live decoding."""
        columns = zip(*(getattr(self, name).tolist() for name in SIGNALS), strict=True)
        return [[Signal(i, *values) for i, values in enumerate(zip(*row, strict=True), 1)] for row in columns]

    @cached_property
    def lengths(self) -> list[int]:
        """`length` as plain integers."""
        return self.length.tolist()

    @cached_property
    def matches(self) -> list[int]:
        """`match` as plain integers."""
        return self.match.tolist()


@dataclass(frozen=True)
class TracedItem:
    """One greedy output of vanilla decoding, as token ids; seed is that of the item's first repeat.

    beyond: what the target goes on with after an end of text, which a draft of the last round is matched with. copied:
    what lookups have found in it, by their settings.
    """

    id: str
    seed: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    output: tuple[int, ...]
    chains: Chains = field(repr=False)
    beyond: tuple[int, ...] = ()
    copied: dict[tuple[int, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)


@dataclass(frozen=True)
class TraceFacts:
    """What a trace was recorded with.

    fingerprint: of the model's weights. settings_hash: of everything its chains depend on. calibration, context,
    vocab_rows: as in the head's card; None, `none` and None without one.
    """

    model: str
    fingerprint: str
    task: str
    drafter: str
    head_sha256: str | None
    exit_layer: int
    dtype: str
    k_max: int
    settings_hash: str
    calibration: dict[str, Any] | None = None
    context: str = "none"
    vocab_rows: int | None = None

    def read_costs(self, path: Path | str, borrowed: bool = True) -> CostTable:
        """The cost table in a file, for these drafts. borrowed: one of another model may price them too."""
        return read_costs(path, self.exit_layer, self.context, self.model, self.vocab_rows, borrowed)


@dataclass(frozen=True)
class Trace:
    """A trace file in memory."""

    facts: TraceFacts
    items: tuple[TracedItem, ...]

    @property
    def output_tokens(self) -> int:
        """Tokens of all outputs that rounds produce: all but the first of each, which is the prefill's."""
        return sum(len(item.output) - 1 for item in self.items)


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write a trace file in one step."""
    chains = [item.chains for item in trace.items]
    tensors = {name: np.concatenate([getattr(one, name) for one in chains]) for name in ARRAYS}
    for name in TEXTS:
        tensors[name] = np.concatenate([np.array(getattr(item, name), np.int32) for item in trace.items])
    items = [
        {
            **{key: getattr(item, key) for key in ("id", "seed", "max_new_tokens")},
            "tokens": [len(getattr(item, name)) for name in TEXTS],
        }
        for item in trace.items
    ]
    facts = {"schema": SCHEMA, "facts": json.dumps(asdict(trace.facts)), "items": json.dumps(items)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, facts)


def read_trace(path: Path | str) -> Trace:
    """A trace file; EesdError with its path for anything else."""
    try:
        with safe_open(path, "numpy") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise EesdError(f"{path}: not a readable trace ({error}). `eesd trace` writes one.") from error
    missing = {*ARRAYS, *TEXTS} - tensors.keys()
    if missing:
        raise EesdError(f"{path}: not a trace (no {', '.join(sorted(missing))}). `eesd trace` writes one.")
    if metadata.get("schema") != SCHEMA:
        raise EesdError(f"{path}: trace schema {metadata.get('schema')!r}, expected {SCHEMA!r}. Record it again.")
    try:
        facts = TraceFacts(**json.loads(metadata["facts"]))
    except TypeError as error:
        raise EesdError(f"{path}: written by another version ({error}). Record it again.") from error
    items, row, read = [], 0, dict.fromkeys(TEXTS, 0)
    for entry in json.loads(metadata["items"]):
        texts = {}
        for name, length in zip(TEXTS, entry.pop("tokens"), strict=True):
            texts[name] = tuple(tensors[name][read[name] : read[name] + length].tolist())
            read[name] += length
        rows = len(texts["output"]) - 1
        chains = Chains(*(tensors[name][row : row + rows] for name in ARRAYS))
        items.append(TracedItem(chains=chains, **texts, **entry))
        row += rows
    if row != len(tensors["match"]) or any(read[name] != len(tensors[name]) for name in TEXTS):
        raise EesdError(f"{path}: its arrays and its list of items disagree. Record it again.")
    return Trace(facts, tuple(items))


def matching(drafted: Sequence[int], text: Sequence[int]) -> int:
    """How many leading drafted tokens equal the text that follows."""
    pairs = enumerate(zip(drafted, text, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(drafted), len(text)))


def check_same_model(traces: Sequence[Trace]) -> None:
    """EesdError when traces of one model and drafter come from other weights or another head."""
    seen: dict[tuple[str, str], TraceFacts] = {}
    for facts in (trace.facts for trace in traces):
        first = seen.setdefault((facts.model, facts.drafter), facts)
        for what, name in (
            ("fingerprint", "other weights"),
            ("head_sha256", "another head"),
            ("dtype", "another dtype"),
        ):
            if getattr(first, what) != getattr(facts, what):
                raise EesdError(
                    f"Traces of {facts.model} with {facts.drafter}: {facts.task} was recorded with {name} than "
                    f"{first.task} ({what} {getattr(facts, what)} and {getattr(first, what)}). Record them again."
                )
