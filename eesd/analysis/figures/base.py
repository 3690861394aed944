"""The registry of figures, and how one is drawn: from the tables alone, no row is read and no model is run.

    figure("speedup", "results/tables", "figures/speedup")      # figures/speedup.pdf .png .svg

To add one, register a function that takes the folder of tables and returns a matplotlib figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.columns import COLUMNS
from eesd.analysis.order import KEYS, method_key, natural
from eesd.analysis.style import LINE_IN, Band
from eesd.errors import EesdError
from eesd.registry import Registry

FIGURES: Registry[Callable[[Path], Figure]] = Registry("figure")


def figure(name: str, tables_dir: Path | str, out_stem: Path | str) -> list[Path]:
    """Draw figure `name` from the tables and write it as PDF, PNG and SVG; returns the three paths."""
    draw = FIGURES[name]
    with style.style():
        return style.save(draw(Path(tables_dir)), Path(out_stem))


def read_table(tables_dir: Path, name: str) -> pd.DataFrame:
    """A table of `eesd tables`; raises EesdError if it is missing, of another version, or empty."""
    path = tables_dir / f"{name}.csv"
    if not path.is_file():
        raise EesdError(f"{path}: no such file. `eesd tables --out {tables_dir} ROWS...` writes it.")
    # Only an empty cell is missing: 'none' and 'NA' are names somebody may use.
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise EesdError(f"{path}: not a CSV table ({error}). Write it again with `eesd tables`.") from error
    if "lossy" in COLUMNS[name] and "lossy" not in table.columns:
        table["lossy"] = False  # written before any method was
    missing = [column for column in COLUMNS[name] if column not in table.columns]
    if missing:
        raise EesdError(f"{path}: no column {', '.join(missing)}. Write it again with `eesd tables`.")
    if table.empty:
        raise EesdError(f"{path}: no rows, so there is nothing to draw. Give `eesd tables` the files it is made from.")
    return table


def by(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """(value, rows) of each value of a column, in the order of all figures."""
    return [
        (name, table[table[column] == name]) for name in sorted(table[column].unique(), key=KEYS.get(column, natural))
    ]


def places(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, rows) of each model and group; the model is named only if there are several."""
    models = by(table, "model")
    for model, cell in models:
        for group, part in by(cell, "group"):
            found = [part[column].iloc[0] for column in ("decoding", "dtype") if column in part]
            how = ", ".join(name for name in found if name != group)
            yield (f"{model}, " if len(models) > 1 else "") + group + (f" ({how})" if how else ""), part


def task_bands(
    parts: list[tuple[str, pd.DataFrame]], lines: str, line_in: float = LINE_IN
) -> tuple[list[Band], list[tuple[list[str], pd.DataFrame]]]:
    """Bands of at most MAX_COLUMNS tasks, and for each its lines (methods or heads) and rows."""
    bands, contents = [], []
    for title, part in parts:
        tasks = sorted(part["task"].unique(), key=natural)
        names = sorted(part[lines].unique(), key=method_key)
        # Five tasks are drawn as 3 + 2, not as 4 + 1.
        width = math.ceil(len(tasks) / math.ceil(len(tasks) / style.MAX_COLUMNS))
        for start in range(0, len(tasks), width):
            heading = title + (" (continued)" if start else "")
            bands.append(Band(heading, tasks[start : start + width], line_in * len(names)))
            contents.append((names, part))
    return bands, contents
