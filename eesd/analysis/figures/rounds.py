"""Figures that explain a speedup: what a round costs against what it yields, what it throws away, where drafts exit.

A row of panels is one (model, group), a panel is one task, a point is one method, vanilla among
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, places, read_table, task_bands
from eesd.analysis.style import method_color, method_label, task_label
from eesd.errors import EesdError
from eesd.words import BASELINE

CELL = ["model", "group", "task"]
PANEL_IN = 1.5
SPEEDUPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
MARKERS = "osD^vPX<>"
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@FIGURES.register("round_cost")
def draw_round_cost(tables_dir: Path) -> Figure:
    """Tokens that a round yields against its cost in vanilla tokens, prefill left out; grey lines: equal speedups."""
    acceptance, speedup = read_table(tables_dir, "acceptance"), read_table(tables_dir, "speedup")
    over = speedup[speedup["baseline"] == BASELINE].set_index([*CELL, "method"])["decode_speedup"]
    table = acceptance.join(over, on=[*CELL, "method"])  # missing for peers, whose seconds are not split
    table["cost"] = table["tokens_per_round"] / table["decode_speedup"].mask(table["method"] == BASELINE, 1.0)
    if table.loc[table["method"] != BASELINE, "cost"].isna().all():
        raise EesdError(f"{tables_dir}: no group has both vanilla and a method with a split of its time to compare.")

    def lines(panel: Axes, _: pd.DataFrame, band: pd.DataFrame) -> None:
        ends = np.array([0.0, 1.1 * band["cost"].max()])
        top = 1.15 * band["tokens_per_round"].max()
        best = (band["tokens_per_round"] / band["cost"]).max()
        for speedup in [speedup for speedup in SPEEDUPS if speedup < 1.5 * best]:
            bold = speedup == 1.0
            panel.plot(ends, speedup * ends, color="0.4" if bold else "0.8", linewidth=0.9 if bold else 0.6, zorder=1)
            # Where the line leaves the panel: above, or at its right edge.
            at = min(ends[1], top / speedup)
            note = {"fontsize": 6, "color": "0.45", "ha": "right", "va": "top", "zorder": 1}
            panel.annotate(f"{speedup:g}", (at, at * speedup), **note)
        panel.set_xlim(0, ends[1])
        panel.set_ylim(0, top)

    labels = ("cost of a round (vanilla tokens)", "tokens per round")
    return _scatter(table, ("cost", "tokens_per_round"), labels, "equal speedup along the lines", lines)


@FIGURES.register("discards")
def draw_discards(tables_dir: Path) -> Figure:
    """Verifications against discarded drafts, both for an output token: the closer to the origin, the less work."""
    table = read_table(tables_dir, "acceptance")
    if not (table["drafted_per_round"] > 0).any():
        raise EesdError(f"{tables_dir / 'acceptance.csv'}: no method drafts anything, so nothing is discarded.")
    table["verified"] = 1 / table["tokens_per_round"]
    accepted = table["drafted_per_round"] * table["acceptance_rate"].fillna(0)  # vanilla has no rate
    table["discarded"] = (table["drafted_per_round"] - accepted) / table["tokens_per_round"]

    def front(panel: Axes, own: pd.DataFrame, band: pd.DataFrame) -> None:
        best = own.sort_values(["discarded", "verified"])
        best = best[best["verified"] < best["verified"].cummin().shift(fill_value=np.inf)]
        panel.plot(best["discarded"], best["verified"], color="0.6", linewidth=0.8, drawstyle="steps-post", zorder=1)
        room = 0.05 * band["discarded"].max()
        panel.set_xlim(-room, band["discarded"].max() + room)
        panel.set_ylim(0, 1.08)

    labels = ("discarded drafted tokens per output token", "verifications per output token")
    return _scatter(
        table,
        ("discarded", "verified"),
        labels,
        "passes of the target against discarded drafts, with the Pareto front",
        front,
    )


@FIGURES.register("exit_layers")
def draw_exit_layers(tables_dir: Path) -> Figure:
    """Speedup over vanilla against the layer that drafts exit at: a line for all that differ in nothing else."""
    table = read_table(tables_dir, "exit_layers")
    # A series begins with the name of its stopping rule.
    table["series"] = table["series"].str.replace(r"^\w+", lambda rule: method_label(rule[0]), regex=True)
    labels = list(dict.fromkeys(table["series"]))
    looks = {
        label: {"color": color, "marker": marker}
        for label, color, marker in zip(labels, cycle(LINE_COLORS), cycle(MARKERS))
    }
    bands, contents = task_bands([(f"{place}: speedup over vanilla", part) for place, part in places(table)], "series")
    drawing, panels = style.grid([replace(band, height_in=PANEL_IN) for band in bands], labels)
    for band, (_, part), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task]
            panel.axhline(1.0, color="0.2", linewidth=0.8)
            for label, line in own.sort_values("exit_layer").groupby("series", sort=False):
                panel.plot(line["exit_layer"], line["speedup"], label=label, markersize=3, linewidth=1, **looks[label])
                panel.vlines(line["exit_layer"], line["ci_low"], line["ci_high"], color=looks[label]["color"], lw=0.8)
            panel.set_xticks(sorted(own["exit_layer"].unique()))
            panel.set_xlabel("exit layer")
            style.panel_title(panel, f"{task_label(task)} (n = {own['n_items'].iloc[0]})", bool(band.title))
        axes[0].set_ylabel("speedup")
    style.key(drawing, panels, labels)
    return drawing


def _scatter(
    table: pd.DataFrame,
    columns: tuple[str, str],
    labels: tuple[str, str],
    words: str,
    behind: Callable[[Axes, pd.DataFrame, pd.DataFrame], None],
) -> Figure:
    x, y = columns
    table = table.dropna(subset=list(columns))
    bands, contents = task_bands([(f"{place}: {words}", cell) for place, cell in places(table)], "method")
    bands = [style.Band(band.title, band.tasks, PANEL_IN) for band in bands]
    methods = list(dict.fromkeys(name for names, _ in contents for name in names))
    named = [method_label(name) for name in methods]
    marks = dict(zip(methods, MARKERS * (1 + len(methods) // len(MARKERS)), strict=False))
    drawing, panels = style.grid(bands, legend=named)
    for band, (names, part), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task].set_index("method")
            for name in [name for name in names if name in own.index]:
                look = {"color": method_color(name), "marker": marks[name], "markersize": 4, "linestyle": "none"}
                panel.plot(own.at[name, x], own.at[name, y], label=method_label(name), zorder=3, **look)
            behind(panel, own, part)
            style.panel_title(panel, f"{task_label(task)} (n = {own['n_items'].iloc[0]})", bool(band.title))
        axes[0].set_ylabel(labels[1])
        axes[len(axes) // 2].set_xlabel(labels[0])
    style.key(drawing, panels, named)
    return drawing
