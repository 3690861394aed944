"""Measurements that other processes disturbed: their times look like any others, so tables of speedup say so."""

from __future__ import annotations

import pandas as pd

from eesd.words import BUSY, DISTURBED

UNKNOWN = ", load not recorded"  # rows from before it was


def is_disturbed(table: pd.DataFrame) -> pd.Series:
    """Which lines of `speedup.csv` were measured while others took more than DISTURBED of the processors."""
    return table["crowding"].astype(float) > DISTURBED


def busy_note(part: pd.DataFrame) -> str:
    """What goes behind the number of prompts of these lines of `speedup.csv`; nothing where the machine was quiet."""
    if is_disturbed(part).any():
        return BUSY
    return UNKNOWN if part["crowding"].isna().any() else ""
