"""Figures of trained heads: agreement by draft position, calibration, and studies of what was varied in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, by, read_table, task_bands
from eesd.analysis.stats import mean_interval
from eesd.errors import EesdError

# Okabe-Ito without its yellow, which is too light for lines.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#999933")
MARKERS = "osD^vPX*"
CONFIDENCES = {"raw": "#56b4e9", "calibrated": "#d55e00"}
# What a study shows of each head, with the word on its axis.
MEASURES = {"top1_agreement": "top-1 agreement, first drafted token", "chain_length": "drafted tokens matched in a row"}
NOT_MEASURED = "not measured"
LOGARITHMIC = {"train_tokens": "training tokens", "vocab_rows": "draft vocabulary"}


@FIGURES.register("heads_by_position")
def draw_by_position(tables_dir: Path) -> Figure:
    """Held-out top-1 agreement against the drafted token's position, a line a head, with its mean chain length."""
    models = by(read_table(tables_dir, "heads"), "model")
    title = "held-out top-1 agreement by draft position"
    parts = [(f"{model}: {title}" if len(models) > 1 else title, own) for model, own in models]
    bands, contents = task_bands(parts, "head")
    bands = [replace(band, height_in=1.6) for band in bands]
    drawing, panels = style.grid(bands)
    for band, (order, own), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            part = own[own["task"] == task]
            for head, line in by(part, "head"):
                chain = line["chain_length"].iloc[0]
                label = f"{head}: {NOT_MEASURED if np.isnan(chain) else f'{chain:.2f}'}"
                panel.plot(line["position"], line["top1_agreement"], label=label, **_look(order.index(head)))
            panel.set_xlabel("draft position")
            panel.legend(title="mean chain", loc="upper right", fontsize=6.5, title_fontsize=6.5, handlelength=1.2)
            style.panel_title(panel, style.judged_on(task, part["positions"]), True)
        axes[0].set_xticks(range(1, int(own["position"].max()) + 1))
        # Room for the legend: it grows with the heads.
        highest = max(own["top1_agreement"].max(), 0.01) * (1.25 + 0.17 * len(order))
        axes[0].set_ylim(0, highest)
        axes[0].set_yticks([mark for mark in axes[0].get_yticks() if 0 <= mark <= min(1, highest)])
        axes[0].set_ylabel("top-1 agreement")
    return drawing


@FIGURES.register("reliability")
def draw_reliability(tables_dir: Path) -> Figure:
    """Share of agreement against confidence, raw and calibrated, a panel a head; bars below count the tokens."""
    table = read_table(tables_dir, "calibration")
    models = by(table, "model")
    parts = [
        (f"{model}, {head}" if len(models) > 1 else head, part)
        for model, own in models
        for head, part in by(own, "head")
    ]
    rows = [parts[start : start + style.MAX_COLUMNS] for start in range(0, len(parts), style.MAX_COLUMNS)]
    bands = [style.Band("", [name for name, _ in row], 1.9) for row in rows]
    drawing, panels = style.grid(bands, legend=tuple(CONFIDENCES))
    for row, axes in zip(rows, panels, strict=True):
        for (name, own), panel in zip(row, axes, strict=True):
            _reliability_panel(panel, own)
            ece = ", ".join(f"{part['ece'].iloc[0]:.3f} {which}" for which, part in _confidences(own))
            style.panel_title(panel, f"{name}\nECE {ece}", below_band_title=False)
        axes[0].set_xlim(0, 1)
        axes[0].set_ylim(-0.27, 1.02)
        axes[0].set_yticks([0, 0.5, 1])
        axes[0].set_ylabel("share agreeing with the target", y=0.6)
    style.key(drawing, panels, tuple(CONFIDENCES))
    return drawing


def _confidences(own: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, own[own["confidence"] == name].sort_values("predicted")) for name in CONFIDENCES]


def _reliability_panel(panel: Axes, own: pd.DataFrame) -> None:
    """Both curves over the diagonal; below zero the tokens of each bin, on one scale, the fullest bin labelled."""
    panel.plot([0, 1], [0, 1], color="0.6", linewidth=0.7, linestyle=(0, (3, 2)))
    panel.axhline(0, color="0.35", linewidth=0.6)
    most = own["tokens"].max()
    for index, (name, part) in enumerate(_confidences(own)):
        color = CONFIDENCES[name]
        panel.plot(
            part["predicted"],
            part["observed"],
            color=color,
            marker=MARKERS[index],
            markersize=3,
            linewidth=1,
            label=name,
        )
        left = np.minimum(np.floor(part["predicted"] * 10), 9) / 10 + 0.01 + 0.04 * index
        panel.bar(left, -0.18 * part["tokens"] / most, 0.04, align="edge", color=color, linewidth=0)
        if part["tokens"].max() == most:
            fullest = int(part["tokens"].to_numpy().argmax())
            middle = min(max(left.iloc[fullest] + 0.02, 0.1), 0.9)  # inside the panel
            panel.annotate(f"{most:,}", (middle, -0.19), ha="center", va="top", fontsize=6, color="0.25")
    panel.set_xlabel(f"confidence (bars: {own.loc[own['confidence'] == 'raw', 'tokens'].sum():,} tokens)")


def _look(index: int) -> dict[str, Any]:
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 3, "linewidth": 1}


@FIGURES.register("study")
def draw_study(tables_dir: Path) -> Figure:
    """Top-1 agreement and chain length against what was varied, a panel a task: means and 95 % intervals over seeds."""
    table = read_study(tables_dir)
    key, labels = table.attrs["key"], list(dict.fromkeys(table["series"]))
    values, draw = list(dict.fromkeys(table["value"])), _curve if key in LOGARITHMIC else _dots
    height = 1.5 if key in LOGARITHMIC else (0.12 + 0.09 * len(labels)) * len(values) + 0.1
    title = f"{table['study'].iloc[0]}: {{}} ({seeds(table)})"
    parts = [(title.format(word), table.assign(shown=table[measure])) for measure, word in MEASURES.items()]
    bands, contents = task_bands(parts, "head")
    bands = [replace(band, height_in=height) for band in bands]
    drawing, panels = style.grid(bands, legend=labels if len(labels) > 1 else ())
    for band, (_, part), axes in zip(bands, contents, panels, strict=True):
        for task, panel in zip(band.tasks, axes, strict=True):
            shown = part[part["task"] == task]
            for index, (label, own) in enumerate(shown.groupby("series", sort=False)):
                draw(panel, points(own), values, index, len(labels), label)
            if shown["shown"].isna().all():
                panel.text(0.5, 0.5, NOT_MEASURED, transform=panel.transAxes, ha="center", va="center", color="0.5")
            style.panel_title(panel, style.task_label(task), below_band_title=True)
            panel.set_xlabel(LOGARITHMIC.get(key, ""))
        _scale(axes[0], part, key in LOGARITHMIC)
    if len(labels) > 1:
        style.key(drawing, panels, labels)
    return drawing


def read_study(tables_dir: Path) -> pd.DataFrame:
    """heads.csv of a study at draft position 1; `value` of the first varied setting, `series` of all others.

    `attrs["key"]` is the name of that setting. Raises EesdError for a table that is no study's.
    """
    path, table = tables_dir / "heads.csv", read_table(tables_dir, "heads")
    if table["varied"].isna().any() or table["study"].nunique() != 1:
        raise EesdError(f"{path}: not the table of one study. `eesd study` writes it, under results/studies.")
    table = table[table["position"] == 1].reset_index(drop=True)
    varied = [json.loads(text) for text in table["varied"]]
    key, *others = varied[0]
    rows = table.to_dict("records")
    table["value"] = [_value(key, row, one) for row, one in zip(rows, varied, strict=True)]
    if key in LOGARITHMIC:  # seeds meet a budget with texts of their own, so not to the token: one point, their mean
        table["value"] = table.groupby("varied")["value"].transform("mean").round().astype(int)
    table["series"] = [
        ", ".join(f"{other} {_value(other, row, one)}" for other in others)
        for row, one in zip(rows, varied, strict=True)
    ]
    # A budget beyond the corpus trains on all of it once more: the same head, so the same point.
    table = table.drop_duplicates(["task", "value", "series", "seed"])
    table.attrs["key"] = key
    return table


def _value(key: str, row: Mapping[str, Any], varied: Mapping[str, Any]) -> Any:
    """A varied setting as it is shown: what the card says was done, if it says so (all tokens, not null)."""
    value = row.get(key, varied[key])
    if key in LOGARITHMIC:
        return value
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def seeds(table: pd.DataFrame) -> str:
    """How many seeds stand behind each point of the table of `read_study`, in words."""
    counts = sorted(table.groupby(["task", "value", "series"])["seed"].nunique().unique())
    if counts == [1]:
        return "1 seed: no interval"
    return f"n = {' to '.join(str(n) for n in (counts[0], counts[-1])[: len(counts)])} seeds"


def points(own: pd.DataFrame) -> pd.DataFrame:
    """value, mean, low, high of column `shown` over seeds; low and high are NaN for one seed, all for none measured."""
    found = [(value, *mean_interval(part["shown"].dropna())) for value, part in own.groupby("value", sort=False)]
    return pd.DataFrame(found, columns=["value", "mean", "low", "high"])


def _curve(panel: Axes, points: pd.DataFrame, values: Sequence[Any], index: int, n: int, label: str) -> None:
    line = points.sort_values("value")
    look = _look(index)
    panel.plot(line["value"], line["mean"], label=label, **look)
    panel.vlines(line["value"], line["low"], line["high"], color=look["color"], linewidth=1)
    panel.set_xscale("log")
    ticks = sorted(values)
    panel.set_xticks(ticks, [_thousands(tick) for tick in ticks], minor=False)
    panel.minorticks_off()


def _thousands(number: float) -> str:
    share = number / 1000
    if share < 1:
        return f"{number:g}"
    return f"{share:.0f}k" if abs(share - round(share)) < 0.05 * share else f"{share:.1f}k"


def _dots(panel: Axes, points: pd.DataFrame, values: Sequence[Any], index: int, n: int, label: str) -> None:
    """One line a value, its series side by side, each point labelled with its mean."""
    look = {**_look(index), "linestyle": "none"}
    lines = points["value"].map(values.index) + (index - (n - 1) / 2) * 0.8 / n
    panel.hlines(lines, points["low"], points["high"], color=look["color"], linewidth=1)
    panel.plot(points["mean"], lines, label=label, **look)
    for at, (_, row) in zip(lines, points.iterrows(), strict=True):
        if np.isnan(row["mean"]):
            continue
        end = np.nanmax([row["mean"], row["high"]])
        panel.annotate(
            f"{row['mean']:.3f}", (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6
        )
    panel.set_yticks(range(len(values)), values)
    panel.set_ylim(len(values) - 0.5, -0.5)


def _scale(panel: Axes, part: pd.DataFrame, logarithmic: bool) -> None:
    """Room for intervals and labels. Points, unlike bars, need no axis from zero."""
    ends = [points(own)[["mean", "low", "high"]] for _, own in part.groupby(["task", "series"], sort=False)]
    numbers = pd.concat(ends).to_numpy()
    if np.isnan(numbers).all():
        return
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    room = (high - low) or 0.1 * abs(high) or 0.1
    if logarithmic:
        panel.set_ylim(low - 0.08 * room, high + 0.08 * room)
    else:
        panel.set_xlim(low - 0.08 * room, high + 0.3 * room)
