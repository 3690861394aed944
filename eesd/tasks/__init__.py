"""Tasks: prompts, references and scores, one file each.

TASKS["gsm8k"].items("evaluation", DataSource(Path("resources"), Path("my_data")))
"""

from eesd.registry import import_modules
from eesd.tasks.base import SPLITS, TASKS, DataSource, Item, Task, encode_prompt

__all__ = ["SPLITS", "TASKS", "DataSource", "Item", "Task", "encode_prompt"]

import_modules(__name__, __path__)
