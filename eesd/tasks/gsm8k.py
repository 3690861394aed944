"""GSM8K (Cobbe et al. 2021): grade-school mathematics, scored by the final number.

Files `gsm8k_train.jsonl` (training and calibration) and `gsm8k_test.jsonl` (evaluation) in `data_dir`, gzipped or
not, with question and answer; else the hub. Both splits are always read, since training drops every prompt that
evaluation has.
"""

from __future__ import annotations

from eesd.errors import EesdError
from eesd.tasks.base import TASKS, DataSource, Item, Task, split_of
from eesd.tasks.numbers import exact_match, numbers
from eesd.tasks.sources import DataFile, Hub, find_rows

SHARES = {"train": 0.9, "calibration": 0.1}
PROMPT = "{problem}\nThink step by step and give the final answer as a number."


def _places(official: str) -> tuple[DataFile, Hub]:
    title = f"GSM8K {official} split"
    return DataFile(title, f"gsm8k_{official}"), Hub(title, "openai/gsm8k", "main", official)


class Gsm8k(Task):
    """See the module docstring."""

    name = "gsm8k"
    dataset = "GSM8K"
    places = (_places("train"), _places("test"))

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Training split cut by a hash of the question; the test split is for evaluation."""
        pools: dict[str, list[Item]] = {"train": [], "calibration": [], "evaluation": self._items("test", source)}
        for item in self._items("train", source):
            pools[split_of(item.extra["question"], SHARES)].append(item)
        return pools

    def _items(self, official: str, source: DataSource) -> list[Item]:
        found = find_rows(_places(official), source, ("question", "answer"))
        items = []
        for number, row in enumerate(found.rows):
            _, marker, answer = row["answer"].rpartition("####")
            values = numbers(answer)
            if not marker or len(values) != 1:
                raise EesdError(f"{found.dataset}, row {number}: 'answer' does not end in '#### <number>'.")
            question = row["question"].strip()
            prompt, extra = PROMPT.format(problem=question), {"question": question, "solution": row["answer"]}
            items.append(Item(f"gsm8k-{official}-{number}", prompt, str(values[0]), extra, found.dataset))
        return items

    def written_answer(self, item: Item) -> str:
        """The worked solution, which ends in the number."""
        return item.extra["solution"]

    def score(self, text: str, item: Item) -> dict[str, float]:
        """Exact match of the final number."""
        return exact_match(text, item.reference)


TASKS.register("gsm8k")(Gsm8k())
