"""Replay held against what happened: predicted and measured speed, and draft lengths along an answer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, by, read_table, task_bands
from eesd.analysis.figures.replay import COLORS, LABELS, VANILLA
from eesd.errors import EesdError
from eesd.words import BASELINE

MATCH = "match"
MARKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # of logarithmic axes of speedups


@FIGURES.register("prediction")
def draw_prediction(tables_dir: Path) -> Figure:
    """Points: speedup of every generation over vanilla in its unit, as predicted and as measured."""
    table = read_table(tables_dir, "prediction")
    table = table[table["method"] != BASELINE]
    if table.empty:
        raise EesdError(f"{tables_dir / 'prediction.csv'}: no method beside vanilla, so there is nothing to compare.")
    where = table["model"] + ", " + table["group"] + ", priced by " + table["hardware"]
    parts = by(table.assign(where=where), "where")
    bands, contents = task_bands(parts, "method")
    methods = [name for name, _ in by(table, "method")]
    labels = [style.method_label(name) for name in methods]
    bands = [style.Band(band.title, band.tasks, 1.9) for band in bands]
    drawing, axes = style.grid(bands, labels)
    values = table[["measured_speedup", "predicted_speedup"]].to_numpy()
    ends = 0.5 * values.min(), 1.2 * values.max()  # room for the words below the points
    for band, (_, part), row in zip(bands, contents, axes, strict=True):
        for task, panel in zip(band.tasks, row, strict=True):
            _prediction_panel(panel, part[part["task"] == task], task, ends)
        row[0].set_ylabel("predicted speedup over vanilla")
    style.key(drawing, axes, labels)
    return drawing


def _prediction_panel(panel: Axes, own: pd.DataFrame, task: str, ends: tuple[float, float]) -> None:
    """Predicted against measured speedup in each unit, the diagonal, and all kinds of error in numbers."""
    for method, part in by(own, "method"):
        look = {"s": 7, "linewidths": 0, "alpha": 0.8, "color": style.method_color(method)}
        panel.scatter(part["measured_speedup"], part["predicted_speedup"], label=style.method_label(method), **look)
    panel.plot(ends, ends, **VANILLA)
    # Ratios: a copied answer may be several times as fast as most.
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(FixedLocator([mark for mark in MARKS if ends[0] <= mark <= ends[1]]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    lines = []
    speedup = own["predicted_speedup"] / own["measured_speedup"] - 1
    for name, errors in (("speedup", speedup), ("paired", own["paired_error"]), ("seconds", own["error"])):
        median, high = 100 * errors.abs().quantile([0.5, 0.9])
        lines.append(f"{name}: {median:.1f} %, 90th percentile {high:.1f} %")
    place = {"xy": (0.98, 0.03), "xycoords": "axes fraction", "ha": "right", "fontsize": 6}
    panel.annotate("median error\n" + "\n".join(lines), **place)
    panel.set_xlabel("measured speedup over vanilla")
    style.panel_title(panel, f"{style.task_label(task)} (n = {own['item'].nunique()})", below_band_title=True)


@FIGURES.register("replay_strips")
def draw_strips(tables_dir: Path) -> Figure:
    """One panel a task: an answer from left to right, shaded by what can be drafted, a strip of bars a controller."""
    table = read_table(tables_dir, "strips")
    panels = list(table.groupby(["model", "task", "drafter"]))
    lines = [name for name in dict.fromkeys(table["label"]) if name != MATCH]
    height = 0.24 * len(lines) + 0.55
    drawing = Figure(figsize=(style.PAGE_IN, height * len(panels)), layout="constrained")
    axes = drawing.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ((model, task, drafter), own), panel in zip(panels, axes, strict=True):
        _strips_panel(panel, own, lines)
        item = own["item"].iloc[0]
        panel.set_title(f"{style.task_label(task)}, {item} ({model}, {drafter})", loc="left")
    axes[-1].set_xlabel("output token")
    return drawing


def _strips_panel(panel: Axes, own: pd.DataFrame, lines: list[str]) -> None:
    """Bars as high as a draft is long and as wide as what it settles; the accepted part dark."""
    match = own[own["label"] == MATCH]
    longest = max(1, int(own["drafted"].max()))
    span = (0, len(match), len(lines) - 0.5, -0.5)
    panel.imshow(
        match["accepted"].to_numpy()[None],
        cmap="Greys",
        vmin=0,
        vmax=2 * max(1, int(match["accepted"].max())),
        aspect="auto",
        extent=span,
    )
    for line, label in enumerate(lines):
        rounds = own[own["label"] == label]
        color, width = COLORS.get(label.split(",")[0], "0.4"), rounds["accepted"] + 1
        for column, alpha in (("drafted", 0.45), ("accepted", 1.0)):
            tall = -0.85 * rounds[column] / longest
            look = {"color": color, "alpha": alpha, "linewidth": 0, "align": "edge"}
            panel.bar(rounds["position"], tall, 0.85 * width, line + 0.42, **look)
    names = [
        ", ".join([LABELS.get(label.split(",")[0], label.split(",")[0]), *label.split(", ")[1:]]) for label in lines
    ]
    panel.set_yticks(range(len(lines)), names)
    panel.set_xlim(0, len(match))
    panel.set_ylim(len(lines) - 0.5, -0.5)
