"""Record what a drafter would draft at every position of vanilla's greedy outputs: the input of replay.

    python -m eesd trace --model resources/models/smollm2-135m --rows results/bench/smollm2-135m/asdiv/main.jsonl \
        --settings '{"drafter": "exit_head", "head_path": ..., "k_max": 15, ...}' \
        --out results/traces/smollm2-135m/asdiv/main/deep1.safetensors

Chains go through the `Chain` of live decoding, so tokens and signals are those that a controller meets there. Finished
items lie in `<out>.work/` until the last one: an interrupted run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eesd.bench.methods import head_context, method_identity
from eesd.control import Controller, Signal
from eesd.control.base import check_count
from eesd.decoding.chain import Chain
from eesd.decoding.generate import GREEDY, generate
from eesd.drafting import DRAFTERS, Drafter
from eesd.errors import EesdError
from eesd.files import read_jsonl, settings_hash, source_hash
from eesd.models.engine import attach_engine
from eesd.models.loading import load_target
from eesd.models.special import fingerprint, revision
from eesd.models.transformer import Transformer
from eesd.progress import progress
from eesd.replay.trace import Chains, Trace, TracedItem, TraceFacts, matching, read_trace, write_trace
from eesd.words import BASELINE


@dataclass
class Recorder(Controller):
    """Drafts on until it has seen `length` tokens, noting every signal."""

    length: int = 1
    signals: list[Signal] = field(default_factory=list)

    def keep_drafting(self, signal: Signal) -> bool:
        """True until `length`."""
        self.signals.append(signal)
        return signal.position < self.length


@torch.inference_mode()
def record_chains(
    target: Transformer,
    drafter: Drafter,
    prompt: Sequence[int],
    output: Sequence[int],
    beyond: Sequence[int],
    k_max: int,
) -> Chains:
    """Chains after every token of an output but its last. beyond: as in `TracedItem`."""
    # The cap is one above: at its cap a chain asks nobody, and the last signal would be lost.
    recorders = [Recorder(k_max=k_max + 1, length=k_max) for _ in output[1:]]
    chains = [Chain(recorder, k_max + 1, GREEDY, None, engine=target.engine) for recorder in recorders]
    if chains:
        drafter.draft_text(target, [*prompt, *output], len(prompt), chains)
    known = [*output, *beyond]
    numbers = np.full((len(chains), k_max, 3), np.nan, np.float32)
    drafted = np.full((len(chains), k_max), -1, np.int32)
    for t, (chain, recorder) in enumerate(zip(chains, recorders, strict=True)):
        drafted[t, : len(chain.tokens)] = chain.tokens
        for i, signal in enumerate(recorder.signals):
            numbers[t, i] = signal.confidence, signal.probability, signal.entropy
    length = np.array([len(chain.tokens) for chain in chains], np.int32)
    match = np.array([matching(chain.tokens, known[t + 1 :]) for t, chain in enumerate(chains)], np.int32)
    return Chains(drafted, *(np.ascontiguousarray(numbers[..., i]) for i in range(3)), length, match)


def continuation(target: Transformer, prompt: Sequence[int], output: Sequence[int], k_max: int) -> list[int]:
    """What the target would have gone on with after an end of text, which live drafts run past."""
    room = min(k_max, target.config.max_positions - len(prompt) - len(output))
    return generate(target, [*prompt, *output], max_new_tokens=room).tokens if room > 0 else []


def record_trace(model_dir: Path, rows: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Record the trace of all first repeats of vanilla in a row file; items finished earlier are kept."""
    check_count("k_max of a trace", settings["k_max"])
    if settings.get("tree") is not None:
        raise EesdError("A trace records chains: what a tree accepts cannot be replayed from them. Remove `tree`.")
    outputs = vanilla_rows(rows)
    target = load_target(model_dir, outputs[0]["dtype"])
    engine = attach_engine(target)
    drafter = DRAFTERS[settings["drafter"]].build(settings, target, model_dir)
    facts = trace_facts(model_dir, drafter, settings, outputs[0], engine.name)
    work = out.with_name(out.name + ".work")
    parts = []
    with progress(f"trace {settings['task']}", len(outputs), "item") as bar:
        for row in outputs:
            part = work / f"{settings_hash(_followed(row))}.safetensors"
            found = _recorded(part)
            if found is None or found.facts != facts:
                found = Trace(facts, (traced_item(target, drafter, row, settings["k_max"]),))
                write_trace(found, part)
            parts.append(found.items[0])
            bar.update()
    write_trace(Trace(facts, tuple(parts)), out)
    shutil.rmtree(work, ignore_errors=True)


def _recorded(part: Path) -> Trace | None:
    """The trace of one output that an interrupted recording left, unless it is damaged or of an older format."""
    try:
        return read_trace(part) if part.exists() else None
    except EesdError:
        return None


def _followed(row: Mapping[str, Any]) -> list[Any]:
    """What the trace of one output depends on, beside its facts."""
    return [
        *(row[key] for key in ("item", "seed", "prompt_tokens", "output_tokens")),
        row["settings"]["max_new_tokens"],
    ]


def vanilla_rows(path: Path) -> list[dict[str, Any]]:
    """Greedy vanilla rows of the first repeat, in the order they were measured in."""
    rows = [row for row in read_jsonl(path) if row.get("method") == BASELINE and row.get("repeat") == 0]
    if not rows:
        raise EesdError(f"{path}: no row of {BASELINE}. A trace follows its outputs: give the rows of a greedy group.")
    if any(row["decoding"] != "greedy" for row in rows):
        raise EesdError(f"{path}: sampled outputs cannot be replayed. Give the rows of a group with temperature 0.")
    return rows


def trace_facts(
    model_dir: Path, drafter: Drafter, settings: Mapping[str, Any], row: Mapping[str, Any], engine: str
) -> TraceFacts:
    """What this trace depends on."""
    identity = {**method_identity(settings), "engine": engine, "source": source_hash()}
    weights = fingerprint(model_dir)
    return TraceFacts(
        model=settings["model"],
        fingerprint=weights,
        task=settings["task"],
        drafter=settings.get("head", settings["drafter"]),
        head_sha256=identity.get("head_sha256"),
        exit_layer=drafter.exit_layer,
        dtype=row["dtype"],
        k_max=settings["k_max"],
        settings_hash=settings_hash({**identity, "model": revision(model_dir), "dtype": row["dtype"]}),
        calibration=drafter.card.get("calibration") if drafter.card else None,
        context=head_context(drafter),
        vocab_rows=drafter.card.get("vocab_rows") if drafter.card else None,
    )


def traced_item(target: Transformer, drafter: Drafter, row: Mapping[str, Any], k_max: int) -> TracedItem:
    """One output with its chains."""
    prompt, output = row["prompt_tokens"], row["output_tokens"]
    beyond = continuation(target, prompt, output, k_max) if row["finish"] == "eos" else []
    return TracedItem(
        id=row["item"],
        seed=row["seed"],
        prompt=tuple(prompt),
        max_new_tokens=row["settings"]["max_new_tokens"],
        output=tuple(output),
        chains=record_chains(target, drafter, prompt, output, beyond, k_max),
        beyond=tuple(beyond),
    )
