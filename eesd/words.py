"""Names that rows, tables and settings share. Imports no torch: tables and figures are made without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

BASELINE = "vanilla"  # the method of every group that the others are compared with
HF_BASELINE = "hf_generate"  # Hugging Face's plain `generate`, the other baseline where a group has it
INITS = ("last", "same", "lens")  # what an exit head starts from, if not from another head
VOCABULARY_OF_PROMPTS = "`prompt` exchanges rows of the target's output head. Set output_head: tied, or frequent here."
# Beyond this share of the processors taken by others (eesd/bench/load.py) a measurement is called disturbed: an idle
# system has a few percent of its own.
DISTURBED = 0.05
BUSY = ", machine busy"  # what is said of one
PARTS = ("prefill", "draft", "verify", "control", "other")  # of a generation's seconds; together they are its total


def first_divergence(vanilla: Sequence[int], output: Sequence[int]) -> int | None:
    """Index of the first token that differs, an ended output counting as a difference; None when equal."""
    pairs = zip_longest(vanilla, output)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)


def kept(head: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that a head takes over from the one that it goes on from: those that decide what its weights are."""
    return ("context", "output_head", *(["vocab_rows"] if head["output_head"] == "free" else []))


def origin_of(head: Mapping[str, Any]) -> str | None:
    """The name of the head that one with these settings goes on from; None if it starts anew."""
    return None if head["kind"] != "exit_layer" or head["init"] in INITS else head["init"]
