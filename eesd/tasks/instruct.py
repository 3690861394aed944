"""Instructions of every kind, for training and calibration: prompts only, so nothing is scored.

`prompts_alpaca_libre.jsonl`, `prompts_dolly_3k.jsonl` and `prompts_self_instruct_seed.jsonl` in `data_dir` (as many of
them as there are; id, instruction, input), else databricks-dolly-15k (CC BY-SA 3.0) from the hub.
"""

from __future__ import annotations

from typing import Any

from eesd.tasks.base import SPLITS, TASKS, DataSource, Item, Task, split_of
from eesd.tasks.sources import DataFile, Hub, Rows, find_rows, local_input

FILES = (
    DataFile("alpaca-libre", "prompts_alpaca_libre"),
    DataFile("Dolly", "prompts_dolly_3k"),
    DataFile("Self-Instruct seeds", "prompts_self_instruct_seed"),
)
DOLLY = Hub("Dolly", "databricks/databricks-dolly-15k", None, "train")
SHARES = {"train": 0.94, "calibration": 0.03, "evaluation": 0.03}


class Instruct(Task):
    """See the module docstring."""

    name = "instruct"
    dataset = "instruction prompts"
    places = tuple((file, DOLLY) for file in FILES)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """Cut by a hash of the prompt."""
        present = [file for file in FILES if local_input([file], source)]
        pools: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for place in present or [DOLLY]:
            found = find_rows([place], source, ("instruction",))
            for number, row in enumerate(found.rows):
                item = _item(number, row, found)
                pools[split_of(item.prompt, SHARES)].append(item)
        return pools

    def score(self, text: str, item: Item) -> dict[str, float]:
        """No metric: there is no single right answer."""
        return {}


def _item(number: int, row: dict[str, Any], found: Rows) -> Item:
    extra = str(row.get("input") or row.get("context") or "").strip()
    prompt = row["instruction"].strip() + (f"\n\n{extra}" if extra else "")
    return Item(f"{found.place.title}-{row.get('id', number)}", prompt, "", {}, found.dataset)


TASKS.register("instruct")(Instruct())
