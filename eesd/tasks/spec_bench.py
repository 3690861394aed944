"""Spec-Bench (Xia et al. 2024, arXiv 2401.07851): prompts of many kinds to compare speculative decoding on. Not scored.

The file `spec_bench.jsonl` in `data_dir` is the `question.jsonl` of its repository, or any file like it: question_id,
category, turns. All prompts are for evaluation. Only first turns are used: a second one answers what was said before.
An item is named `<category>/<question_id>`, which `eesd spec-bench` turns back into an answer file.
"""

from __future__ import annotations

from eesd.errors import EesdError
from eesd.tasks.base import TASKS, DataSource, Item, Task
from eesd.tasks.sources import DataFile, find_rows

PLACES = (DataFile("Spec-Bench", "spec_bench"),)


class SpecBench(Task):
    """See the module docstring."""

    name = "spec_bench"
    dataset = "Spec-Bench, first turns"
    places = (PLACES,)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """All questions for evaluation."""
        found = find_rows(PLACES, source, ("question_id", "category", "turns"))
        items = []
        for number, row in enumerate(found.rows):
            turns = row["turns"]
            if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
                raise EesdError(f"{found.dataset}, row {number}: 'turns' is no list that begins with a text.")
            name = f"{row['category']}/{row['question_id']}"
            items.append(Item(name, turns[0].strip(), "", {"turns": len(turns)}, found.dataset))
        return {"train": [], "calibration": [], "evaluation": items}

    def score(self, text: str, item: Item) -> dict[str, float]:
        """No metric: there are no reference answers."""
        return {}


TASKS.register("spec_bench")(SpecBench())
