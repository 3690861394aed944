"""How far divergences from vanilla are from being errors: their logit gaps against the measured rounding bound."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, by, read_table
from eesd.analysis.style import method_color, method_label
from eesd.errors import EesdError

SMALLEST = 1e-9  # where an exact tie is drawn on the logarithmic axes


@FIGURES.register("divergence_gaps")
def draw_divergence_gaps(tables_dir: Path) -> Figure:
    """One panel a number format: gap against bound of every first divergence, with the line where they are equal."""
    counts = read_table(tables_dir, "lossless")
    counts = counts[counts["decoding"] == "greedy"]
    if counts.empty:
        raise EesdError(f"{tables_dir / 'lossless.csv'}: no greedy outputs, so nothing was compared with vanilla.")
    # Empty if all outputs are identical, which is a result.
    found = read_divergences(tables_dir)
    formats = by(counts, "dtype")
    drawing = Figure(figsize=(style.PAGE_IN, 2.6), layout="constrained")
    panels = drawing.subplots(1, len(formats), squeeze=False)[0]
    for panel, (dtype, own) in zip(panels, formats, strict=True):
        _panel(panel, found[found["dtype"] == dtype], own, dtype)
    panels[0].set_ylabel("logit gap in float64")
    named = {label: mark for panel in panels for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if named:
        drawing.legend(named.values(), named, fontsize=6.5, loc="outside right center", frameon=False)
    return drawing


def read_divergences(tables_dir: Path) -> pd.DataFrame:
    """divergences.csv, which may have no rows."""
    path = tables_dir / "divergences.csv"
    return read_table(tables_dir, "divergences") if len(path.read_text().splitlines()) > 1 else pd.read_csv(path)


def _panel(panel: Axes, found: pd.DataFrame, counts: pd.DataFrame, dtype: str) -> None:
    outputs = int(counts[["identical", "tie", "different"]].to_numpy().sum())
    ended = int(found["gap"].isna().sum())
    panel.set_title(
        f"{dtype}: {int(counts['identical'].sum())} of {outputs} identical,\n{int(counts['tie'].sum())} ties, "
        f"{int(counts['different'].sum())} different",
        fontsize=8,
    )
    drawn = found[found["gap"].notna()]
    panel.set_xlabel("rounding bound of the format")
    if drawn.empty:
        words = "no output diverges" if found.empty else f"{ended} differ in length alone"
        panel.annotate(words, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="0.4")
        panel.set_xticks([])
        panel.set_yticks([])
        return
    if ended:
        note = {"xycoords": "axes fraction", "va": "bottom", "color": "0.4", "fontsize": 7}
        panel.annotate(f"{ended} more differ in length alone", (0.04, 0.02), **note)
    for method, own in by(drawn, "method"):
        peer = " (peer)" if bool(own["peer"].iloc[0]) else ""
        panel.plot(
            own["bound"].clip(lower=SMALLEST),
            own["gap"].clip(lower=SMALLEST),
            "o",
            color=method_color(method),
            markersize=3.5,
            markeredgewidth=0,
            alpha=0.8,
            label=method_label(method) + peer,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    low = float(drawn[["gap", "bound"]].min().min())
    ends = max(low, SMALLEST) / 2, max(float(drawn[["gap", "bound"]].max().max()), SMALLEST) * 2
    panel.set_xlim(*ends)
    panel.set_ylim(*ends)
    panel.plot(ends, ends, color="0.2", linewidth=0.8, zorder=1)
    panel.annotate("tie", (0.96, 0.72), xycoords="axes fraction", ha="right", color="0.4", fontsize=7)
    panel.annotate("different", (0.04, 0.93), xycoords="axes fraction", color="0.4", fontsize=7)
