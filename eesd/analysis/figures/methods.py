"""Figures that compare methods: speedup, acceptance, time split, heads.

A row of panels is one (model, group), a panel is one task, and every bar is labelled with its own value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.disturbed import busy_note
from eesd.analysis.figures.base import FIGURES, by, places, read_table, task_bands
from eesd.analysis.style import method_color, method_label, task_label
from eesd.errors import EesdError
from eesd.words import BASELINE, PARTS

NOT_SPLIT = "not split"
SPLIT = (*PARTS, NOT_SPLIT)
TOP1, EXPECTED = "same most likely token (top-1)", "expected acceptance"
BAR = 0.74  # share of a line that its bar fills


@FIGURES.register("speedup")
def draw_speedup(tables_dir: Path) -> Figure:
    """Bars with 95 % intervals; one row of panels for each baseline, with a line at 1."""
    table = read_table(tables_dir, "speedup")
    parts = [
        (f"{place}: speedup over {style.BASELINE_LABELS[baseline]}", part)
        for place, cell in places(table)
        for baseline, part in by(cell, "baseline")
    ]
    bands, contents = task_bands(parts, "method")
    drawing, panels = style.grid(bands)
    for band, (methods, part), axes in zip(bands, contents, panels, strict=True):
        reach = style.reach(part["speedup"], part["ci_high"])
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task].set_index("method")
            _speedup_panel(panel, own, methods, reach)
            n = own["n_items"].iloc[0]
            busy = busy_note(own).replace("machine ", "")  # three panels share the width
            note = (f"n = {n}" if n > 1 else "n = 1: no interval") + busy
            style.panel_title(panel, f"{task_label(task)} ({note})", bool(band.title))
        axes[0].set_xlim(0, max(reach, 1.0) * 1.3)
    return drawing


def _speedup_panel(panel: Axes, own: pd.DataFrame, methods: list[str], reach: float) -> None:
    panel.axvline(1.0, color="0.2", linewidth=0.8, zorder=3)
    for line, method in enumerate(methods):
        if method not in own.index:
            _absent(panel, line)
            continue
        row = own.loc[method]
        panel.barh(line, row["speedup"], BAR, color=method_color(method), zorder=2)
        look = {"color": "black", "linewidth": 1.0, "zorder": 4}
        end = max(row["speedup"], style.interval(panel, line, row["ci_low"], row["ci_high"], reach, **look))
        # A label on the line at 1 would be crossed out by it.
        end = max(end, 1.0) if end > 0.7 else end
        _value(panel, end, line, f"{row['speedup']:.2f}")
    lossy = set(own.index[own["lossy"].astype(bool)])
    _lines(panel, [method_label(name) + (" (lossy)" if name in lossy else "") for name in methods])


@FIGURES.register("acceptance")
def draw_acceptance(tables_dir: Path) -> Figure:
    """Share of rounds by the number of accepted drafted tokens, a small histogram a method, its mean marked."""
    table = read_table(tables_dir, "rounds")
    table = table[table["method"] != BASELINE]  # it drafts nothing: always 0
    if table.empty:
        raise EesdError(f"{tables_dir / 'rounds.csv'}: no method drafts anything, so there is no acceptance to draw.")
    parts = [(f"{place}: accepted tokens per round, \u25b2 mean", cell) for place, cell in places(table)]
    bands, contents = task_bands(parts, "method", line_in=0.38)
    drawing, panels = style.grid(bands)
    n_columns = max(map(len, panels))
    for band, (methods, part), axes in zip(bands, contents, panels, strict=True):
        longest = part["accepted"].max()
        # One scale for a band: its most frequent number of tokens fills 0.55 of a line.
        scale = 0.55 / (part["count"] / part.groupby(["task", "method"])["count"].transform("sum")).max()
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task]
            for line, method in enumerate(methods):
                _histogram(panel, line, own[own["method"] == method], scale, method_color(method))
            _lines(panel, [method_label(name) for name in methods])
            style.panel_title(panel, task_label(task), bool(band.title))
        # Right of the longest draft is room for the words, about 0.6 inch.
        words = 0.6 / (drawing.get_figwidth() / n_columns - 0.3)
        axes[0].set_xlim(-0.7 - 0.06 * longest, (longest + 0.7) / (1 - words))
        axes[0].set_xticks(range(0, longest + 1, 1 + longest * n_columns // 30))
    return drawing


def _histogram(panel: Axes, line: int, own: pd.DataFrame, scale: float, color: str) -> None:
    accepted, count = own["accepted"].to_numpy(), own["count"].to_numpy()
    if not count.sum():
        _absent(panel, line, "no rounds")
        return
    share = count / count.sum()
    mean = float((accepted * share).sum())
    base, tallest = line + 0.3, share.argmax()
    # Lines count downwards, so a bar that grows has a negative height.
    panel.bar(accepted, -scale * share, 0.84, bottom=base, color=color, linewidth=0, zorder=2)
    panel.plot([-0.5, accepted.max() + 0.5], [base, base], color="0.6", linewidth=0.5, zorder=1)
    panel.plot(mean, base + 0.09, "^", color="black", markersize=3.5, markeredgewidth=0, zorder=3)
    top = (accepted[tallest], base - scale * share[tallest])
    small = {"textcoords": "offset points", "fontsize": 6, "color": "0.35"}
    panel.annotate(f"{share[tallest]:.0%}", top, xytext=(0, 0.5), ha="center", va="bottom", **small)
    words = f"mean {mean:.2f}\n{count.sum():,} rounds"
    panel.annotate(words, (1, line), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=6.5)


@FIGURES.register("time_split")
def draw_time_split(tables_dir: Path) -> Figure:
    """Milliseconds per generated token, stacked by part; a peer has its total only."""
    table = read_table(tables_dir, "time_split")
    bands, contents = task_bands(
        [(f"{place}: ms per generated token", cell) for place, cell in places(table)], "method"
    )
    drawing, panels = style.grid(bands, legend=SPLIT)
    for band, (methods, part), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task].set_index("method")
            _split_panel(panel, own, methods)
            style.panel_title(panel, f"{task_label(task)} (n = {own['n_items'].iloc[0]})", bool(band.title))
        axes[0].set_xlim(0, part["total_s"].max() * 1e3 * 1.25)
    style.key(drawing, panels, SPLIT)
    return drawing


def _split_panel(panel: Axes, own: pd.DataFrame, methods: list[str]) -> None:
    for line, method in enumerate(methods):
        if method not in own.index:
            _absent(panel, line)
            continue
        row = own.loc[method]
        if np.isnan(row["verify_s"]):
            panel.barh(line, row["total_s"] * 1e3, BAR, color="white", edgecolor="0.5", hatch="/////", label=NOT_SPLIT)
        left = 0.0
        for part in PARTS:
            milliseconds = row[f"{part}_s"] * 1e3
            if milliseconds > 0:
                panel.barh(line, milliseconds, BAR, left=left, color=style.PART_COLORS[part], linewidth=0, label=part)
                left += milliseconds
        _value(panel, row["total_s"] * 1e3, line, f"{row['total_s'] * 1e3:#.3g}".rstrip("."))
    _lines(panel, [method_label(name) for name in methods])


@FIGURES.register("heads")
def draw_heads(tables_dir: Path) -> Figure:
    """Held-out top-1 agreement of each head with its target, and its expected acceptance, for each task."""
    table = read_table(tables_dir, "heads")
    table = table[table["position"] == 1]
    models = by(table, "model")
    parts = [(f"{model}: " if len(models) > 1 else "", part) for model, part in models]
    bands, contents = task_bands(
        [(f"{title}held-out agreement with the target", part) for title, part in parts], "head"
    )
    drawing, panels = style.grid(bands, legend=(TOP1, EXPECTED))
    for band, (heads, part), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            own = part[part["task"] == task].set_index("head")
            _heads_panel(panel, own, heads)
            style.panel_title(panel, style.judged_on(task, own["positions"]), bool(band.title))
        axes[0].set_xlim(0, 1.12)  # a label beside a bar near 1
        axes[0].set_xticks([0, 0.5, 1.0], ["0", "0.5", "1"])
    style.key(drawing, panels, (TOP1, EXPECTED))
    return drawing


def _heads_panel(panel: Axes, own: pd.DataFrame, heads: list[str]) -> None:
    for line, head in enumerate(heads):
        if head not in own.index:
            _absent(panel, line)
            continue
        top1, expected = own.loc[head, ["top1_agreement", "expected_acceptance"]]
        panel.barh(line, top1, BAR, color="#0072b2", label=TOP1)
        panel.plot(
            expected, line, "D", color="#e69f00", markeredgecolor="black", markeredgewidth=0.5, markersize=3.5,
            linestyle="none", label=EXPECTED,
        )  # fmt: skip
        _value(panel, max(top1, expected + 0.02), line, f"{top1:.2f}")
    _lines(panel, heads)


def _lines(panel: Axes, labels: list[str]) -> None:
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)  # first on top


def _value(panel: Axes, x: float, line: int, text: str) -> None:
    panel.annotate(text, (x, line), xytext=(2.5, 0), textcoords="offset points", va="center", fontsize=7)


def _absent(panel: Axes, line: int, text: str = "not run") -> None:
    panel.annotate(text, (0, line), xytext=(2.5, 0), textcoords="offset points", va="center", color="0.5")
