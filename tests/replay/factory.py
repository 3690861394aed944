"""Synthetic traces: random signals, match lengths as given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eesd.control import make_controller
from eesd.replay.loop import replay
from eesd.replay.trace import Chains, Trace, TracedItem, TraceFacts
from tests.analysis.factory import make_row, split_seconds

FACTS = TraceFacts("toy", "w", "asdiv", "exit4", "h", 4, "float32", 5, "s", {"x": [0.0, 1.0], "y": [0.1, 0.9]})


def make_item(
    match: Sequence[int], k_max: int = 5, seed: int = 7, room: int = 1, prompt_tokens: int = 20
) -> TracedItem:
    """An output of len(match) + 1 tokens; room: how many more than that were allowed."""
    rng, count = np.random.default_rng(seed), len(match)
    signals = [rng.uniform(0.1, 1.0, (count, k_max)).astype(np.float32) for _ in range(3)]
    length = np.full(count, k_max, np.int32)
    chains = Chains(np.zeros((count, k_max), np.int32), *signals, length, np.array(match, np.int32))
    prompt = tuple(range(1000, 1000 + prompt_tokens))  # nothing in it occurs again
    return TracedItem(f"i{seed}", seed, prompt, count + 1 + room, tuple(range(count + 1)), chains)


def live_rows(trace: Trace, seconds: float = 0.01) -> list[dict[str, Any]]:
    """Rows of vanilla and of static drafts as live decoding leaves them, every round taking the same time."""
    settings = {"drafter": "exit_head", "head": trace.facts.drafter, "head_sha256": trace.facts.head_sha256}
    settings["controller"] = {"name": "static", "k": 2}
    rounds = replay(make_controller(settings["controller"]), trace)
    rows = []
    for item, made in zip(trace.items, rounds, strict=True):
        vanilla = [(0, 0, "none")] * (len(item.output) - 1)
        for method, own, found in (("vanilla", {}, vanilla), ("static_k2", settings, made)):
            changes = {"task": trace.facts.task, "seed": item.seed, "output_tokens": list(item.output), "settings": own}
            changes["seconds"] = split_seconds(len(found) * seconds)
            rows.append(make_row(method, item.id, rounds=[list(one) for one in found], **changes))
    return rows


def make_trace(*items: TracedItem, **facts) -> Trace:
    """A trace of these items; keywords replace facts."""
    return Trace(replace(FACTS, **facts), items)


def random_trace(task: str = "asdiv", items: int = 2, k_max: int = 12) -> Trace:
    """Outputs of 41 tokens, half of the first drafted tokens right, and so on."""
    rng = np.random.default_rng(len(task))
    matches = [(rng.geometric(0.5, 40).clip(1, k_max + 1) - 1).tolist() for _ in range(items)]
    made = [make_item(match, k_max, seed) for seed, match in enumerate(matches)]
    return make_trace(*made, task=task, k_max=k_max)
