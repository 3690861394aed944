"""Tasks: prompts, references and scores, one file each.

TASKS["gsm8k"].items("evaluation", DataSource(Path("resources"), Path("my_data")))
"""

from eesd.tasks import asdiv, gsm8k, humaneval, instruct, passages, spec_bench, xsum  # noqa: F401  (importing registers them)
from eesd.tasks.base import SPLITS, TASKS, DataSource, Item, Task, encode_prompt

__all__ = ["SPLITS", "TASKS", "DataSource", "Item", "Task", "encode_prompt"]
