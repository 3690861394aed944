"""What a task is: items with prompt and reference, three disjoint splits, and a score.

    source = DataSource(resources=Path("resources"), data_dir=Path("my_data"))
    items = TASKS["asdiv"].items("evaluation", source)
    TASKS["asdiv"].score("... so 9 apples.", items[0])  # {"exact_match": 1.0}

A new task is one file beside this one: subclass `Task`, return its pools, register an instance.

The split and the order of an item depend on a hash of the item alone. They never change with the number of prompts
asked for, so what was once an evaluation prompt never becomes a training prompt.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eesd.errors import unknown
from eesd.registry import Registry

SPLITS = ("train", "calibration", "evaluation")
# How every task asks for a summary.
SUMMARIZE = "Article:\n{document}\n\nSummarize this article in one sentence."
SEED = 0


@dataclass(frozen=True)
class Item:
    """One prompt: the user's message before the chat template. `dataset` says where this very row is from."""

    id: str
    prompt: str
    reference: str
    extra: dict[str, Any] = field(default_factory=dict)
    dataset: str = ""


@dataclass(frozen=True)
class DataSource:
    """Where rows are looked for, in order: files in `data_dir`, unpacked `resources`, the hub. None skips a place."""

    resources: Path | None = Path("resources")
    data_dir: Path | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> DataSource:
        """The places that a stage's settings name."""
        resources, data_dir = settings["resources"], settings["data_dir"]
        return cls(Path(resources) if resources else None, Path(data_dir) if data_dir else None)


class Task(ABC):
    """A data set with prompts and a score; `dataset` is its true name (each item adds split and source).

    `places` are the alternatives that `pools` gives to each `find_rows`: the workflow fetches what they need first.
    """

    name: str
    dataset: str
    places: tuple[tuple[Any, ...], ...]

    @abstractmethod
    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Items of every split, in any order and possibly with duplicates; `items` removes those."""

    @abstractmethod
    def score(self, text: str, item: Item) -> dict[str, float]:
        """Metrics of a generated text, by name."""

    def written_answer(self, item: Item) -> str:
        """What the data set's authors answered, as text to train on; empty where there is no such text."""
        return item.reference

    def items(self, split: str, source: DataSource) -> list[Item]:
        """Items of one split (train, calibration, evaluation) in their fixed order."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        kept = disjoint(self.pools(source))[split]
        return sorted(kept, key=lambda item: digest(f"{self.name}:{item.id}"))


TASKS: Registry[Task] = Registry("task")


def digest(key: str) -> str:
    """A fixed pseudo-random hexadecimal string for a key."""
    return hashlib.sha256(f"{SEED}:{key}".encode()).hexdigest()


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The split of a key, given the share of each split (summing to 1)."""
    position, edge = int(digest(key)[:8], 16) / 2**32, 0.0
    for split, share in shares.items():
        edge += share
        if position < edge:
            return split
    return split


def disjoint(pools: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """Drop every item whose id or prompt text was seen before; evaluation is kept first, training last."""
    ids: set[str] = set()
    prompts: set[str] = set()
    kept: dict[str, list[Item]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for item in pools.get(split, []):
            text = " ".join(item.prompt.split())
            if item.id not in ids and text not in prompts:
                kept[split].append(item)
            ids.add(item.id)
            prompts.add(text)
    return kept


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message: through the chat template if the tokenizer has one, else as plain text."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(text)["input_ids"])
