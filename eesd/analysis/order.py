"""One order of methods, tasks and items for all tables and figures.

Rows come in random order on purpose (units are shuffled), so outputs sort by name: vanilla, then hf_generate, then the
other methods alphabetically, numbers by value (static_k2 before static_k10); the group `main` before other groups.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from eesd.words import BASELINE, HF_BASELINE

BASELINES = (BASELINE, HF_BASELINE)


def natural(name: str) -> tuple[Any, ...]:
    """Sort key that orders numbers inside a name by value."""
    # re.split alternates text and digits, so text meets text and number meets number at each index.
    return tuple(int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", str(name))))


def method_key(name: str) -> tuple[Any, ...]:
    """Sort key of methods: the baselines first."""
    return (BASELINES.index(name) if name in BASELINES else len(BASELINES), natural(name))


def group_key(name: str) -> tuple[Any, ...]:
    """Sort key of groups: the headline group first."""
    return (name != "main", natural(name))


KEYS = {"method": method_key, "baseline": method_key, "group": group_key}


def sort_frame(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rows in canonical order of the given columns, with a fresh index."""
    columns = [[KEYS.get(column, natural)(value) for value in frame[column]] for column in by]
    order = sorted(range(len(frame)), key=lambda row: [values[row] for values in columns])
    return frame.iloc[order].reset_index(drop=True)
