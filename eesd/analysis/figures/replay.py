"""Figures of replay: every controller under the oracle, cost against drafting steps, sensitivity to two settings.

Each is drawn from one replay.csv, which its entry under `replays` of the configuration decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, read_table
from eesd.analysis.order import sort_frame
from eesd.errors import EesdError

ORACLE, STATIC = "oracle", "static"
# A rule is named and coloured as the method that uses it.
METHODS = {"beta_ts": "eesd", "cali_ts": "eesd_cali", "cost_ts": "eesd_cost"}
RULES = ("hf_heuristic", "confidence", "svip", "draft_verify", "adaedl", "acceptance_product", "ucb", "exp3")
LABELS = {
    **{rule: style.method_label(rule) for rule in RULES},
    **{rule: style.method_label(method).removeprefix("EESD, ") for rule, method in METHODS.items()},
}
COLORS = {
    ORACLE: "#000000",
    STATIC: "#0072b2",
    **{rule: style.method_color(METHODS.get(rule, rule)) for rule in (*RULES, *METHODS)},
}
VANILLA = {"color": "0.55", "linewidth": 0.8, "linestyle": (0, (1, 1.5))}


def read_replay(tables_dir: Path) -> pd.DataFrame:
    """replay.csv of one hardware or more, with settings as dictionaries and a label for every line."""
    table = read_table(tables_dir, "replay")
    table["settings"] = table["settings"].map(json.loads)
    table["label"] = ""
    for name, own in table.groupby("controller", sort=False):
        changing = varying(own)
        table.loc[own.index, "label"] = [
            ", ".join([LABELS.get(name, name), *(f"{key} = {_short(s[key])}" for key in changing)])
            for s in own["settings"]
        ]
    return table


def varying(own: pd.DataFrame) -> list[str]:
    """Settings of one controller that differ between its rows, the one with most values first."""
    values = {key: {_short(s[key]) for s in own["settings"]} for key in own["settings"].iloc[0]}
    return sorted((key for key, found in values.items() if len(found) > 1), key=lambda key: -len(values[key]))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _one_hardware(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first cost table: these figures compare controllers, not machines."""
    return table[table["hardware"] == table["hardware"].iloc[0]]


def _heading(table: pd.DataFrame) -> str:
    """The hardware, and what drafted where copies go first."""
    drafter = table["drafter"].iloc[0]
    return ", ".join([table["hardware"].iloc[0], *([drafter] if "+" in drafter else [])])


def _titles(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Title and rows of every panel: one for each task, and each drafter where there are several."""
    several = table["drafter"].nunique() > 1
    panels = []
    for (task, drafter), own in table.groupby(["task", "drafter"]):
        title = f"{style.task_label(task)} (n = {own['n_items'].iloc[0]})"
        panels.append((f"{title}, {drafter}" if several else title, own))
    return panels


@FIGURES.register("replay_regret")
def draw_regret(tables_dir: Path) -> Figure:
    """Bars for every hardware: predicted speedup of the oracle, then of the settings with intervals, best mean first.

    Lines: vanilla, and the best static k of this task chosen in hindsight.
    """
    table = read_replay(tables_dir)
    if not (table["controller"] != ORACLE).any():
        raise EesdError(
            f"{tables_dir / 'replay.csv'}: no controller beside the oracle, so there is nothing to compare."
        )
    color = {label: COLORS.get(name, "0.4") for name, label in zip(table["controller"], table["label"], strict=True)}
    parts = [(part, _best_first(part)) for _, part in table.groupby("hardware", sort=False)]
    bands = [
        style.Band(_heading(part), [title for title, _ in _titles(part)], style.LINE_IN * len(order))
        for part, order in parts
    ]
    drawing, axes = style.grid(bands)
    for (part, order), row in zip(parts, axes, strict=True):
        reach = style.reach(part["predicted_speedup"], part["ci_high"])
        for (title, own), panel in zip(_titles(part), row, strict=True):
            _draw_bars(panel, own, order, color, reach)
            panel.set_xlim(0, 1.15 * reach)
            style.panel_title(panel, title, below_band_title=True)
            if part is parts[-1][0]:
                panel.set_xlabel("predicted speedup")
    return drawing


def _best_first(part: pd.DataFrame) -> list[str]:
    """Labels of the settings on one hardware, best mean first, under the oracle."""
    rated = part[part["controller"] != ORACLE]
    return [ORACLE, *rated.groupby("label")["predicted_speedup"].mean().sort_values(ascending=False).index]


def _draw_bars(panel: Axes, own: pd.DataFrame, order: list[str], color: dict[str, str], reach: float) -> None:
    """The settings of one task on one hardware."""
    bars = own.set_index("label")
    for line, label in enumerate(order):
        speedup, low, high = bars.loc[label, ["predicted_speedup", "ci_low", "ci_high"]].astype(float)
        panel.barh(line, speedup, 0.7, color=color[label])
        end = max(speedup, style.interval(panel, line, low, high, reach, color="0.15", linewidth=0.8))
        note = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
        note["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        panel.annotate(f"{speedup:.2f}", (end, line), **note)
    panel.axvline(1, **VANILLA)
    hindsight = own["predicted_speedup"].iloc[0] / own["of_best_static"].iloc[0]
    panel.axvline(hindsight, color=COLORS[STATIC], linewidth=0.9, linestyle=(0, (4, 2)))
    panel.set_yticks(range(len(order)), order)
    panel.set_ylim(len(order) - 0.4, -0.6)


@FIGURES.register("replay_steps")
def draw_steps(tables_dir: Path) -> Figure:
    """Milliseconds a token against the steps of static drafts, as the paper's Figure 1b; other rules lie across."""
    table = _one_hardware(read_replay(tables_dir))
    if STATIC not in set(table["controller"]):
        raise EesdError(f"{tables_dir / 'replay.csv'}: no static controller. Add it with a grid over k to the replay.")
    panels = _titles(table)
    others = sort_frame(table[~table["controller"].isin([STATIC, ORACLE])], ["label"])
    labels = ["static k", *dict.fromkeys(others["label"]), "vanilla", "oracle"]
    styles = ["-", (0, (5, 1.5)), (0, (3, 1, 1, 1))]
    drawing, axes = style.grid([style.Band(_heading(table), [t for t, _ in panels], 1.9)], labels)
    for (title, own), panel in zip(panels, axes[0], strict=True):
        static = own[own["controller"] == STATIC]
        steps = static["settings"].map(lambda settings: settings["k"])
        line = pd.DataFrame({"k": steps, "ms": 1e3 * static["seconds_per_token"]}).sort_values("k")
        panel.plot(
            line["k"], line["ms"], color=COLORS[STATIC], marker="o", markersize=2.5, linewidth=1, label=labels[0]
        )
        seen: dict[str, int] = {}
        for _, row in own[~own["controller"].isin([STATIC, ORACLE])].iterrows():
            name = row["controller"]
            seen[name] = seen.get(name, -1) + 1
            look = {"color": COLORS.get(name, "0.4"), "linestyle": styles[seen[name] % len(styles)], "linewidth": 1}
            panel.axhline(1e3 * row["seconds_per_token"], label=row["label"], **look)
        best = own[own["controller"] == ORACLE].iloc[0]
        vanilla = best["seconds_per_token"] * best["predicted_speedup"]
        panel.axhline(1e3 * vanilla, label="vanilla", **VANILLA)
        panel.axhline(1e3 * best["seconds_per_token"], color="k", linewidth=0.9, label="oracle")
        panel.set_xlabel("drafting steps k")
        panel.xaxis.get_major_locator().set_params(integer=True)
        style.panel_title(panel, title, below_band_title=True)
    # Long drafts cost many times what the rules that matter do.
    axes[0][0].set_yscale("log", base=2)
    axes[0][0].yaxis.set_major_formatter(style.matplotlib.ticker.FormatStrFormatter("%g"))
    axes[0][0].set_ylabel("modelled milliseconds per token")
    style.key(drawing, axes, labels)
    return drawing


@FIGURES.register("replay_sensitivity")
def draw_sensitivity(tables_dir: Path) -> Figure:
    """Heat maps of the predicted speedup over the two settings with most values; others are averaged over."""
    table = read_replay(tables_dir)
    table = table[table["controller"] != ORACLE]
    maps = [
        (f"{LABELS.get(name, name)}, {hardware}", own, varying(own)[:2])
        for (name, hardware), own in table.groupby(["controller", "hardware"], sort=False)
        if len(varying(own)) >= 2
    ]
    if not maps:
        raise EesdError(f"{tables_dir / 'replay.csv'}: no controller with two settings that vary. Add a grid of two.")
    heights = [0.32 + 0.2 * len({_short(s[keys[0]]) for s in own["settings"]}) for _, own, keys in maps]
    titles = [[title for title, _ in _titles(own)] for _, own, _ in maps]
    bands = [style.Band(name, tasks, height) for (name, _, _), tasks, height in zip(maps, titles, heights, strict=True)]
    width = max(map(len, titles))
    drawing = Figure(figsize=(style.PAGE_IN, sum(heights) + 0.75 * len(maps)), layout="constrained")
    axes = drawing.subplots(len(maps), width, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (name, own, keys), band, row in zip(maps, bands, axes, strict=True):
        for panel in row[len(band.tasks) :]:
            panel.set_visible(False)
        for column, ((title, part), panel) in enumerate(zip(_titles(own), row, strict=False)):
            _heat_map(panel, part, keys, labelled=column == 0)
            panel.set_title(f"{name}\n{title}" if column == 0 else f"\n{title}", loc="left")
    return drawing


def _heat_map(panel: Axes, part: pd.DataFrame, keys: list[str], labelled: bool) -> None:
    """Mean predicted speedup over two settings, the best cell framed; colours span this panel's own range."""
    frame = pd.DataFrame({key: [s[key] for s in part["settings"]] for key in keys})
    order = {key: list(dict.fromkeys(sorted(map(_sortable, frame[key])))) for key in keys}
    cells = frame.map(_sortable).assign(speedup=part["predicted_speedup"].to_numpy())
    grid = cells.groupby(keys)["speedup"].mean().unstack(keys[1]).loc[order[keys[0]], order[keys[1]]]
    note = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 5.5}}
    seaborn.heatmap(grid, ax=panel, cmap="viridis", cbar=False, linewidths=0.4, **note)
    best = grid.stack().idxmax()
    place = (order[keys[1]].index(best[1]), order[keys[0]].index(best[0]))
    panel.add_patch(style.matplotlib.patches.Rectangle(place, 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.5))
    panel.set_xticks([i + 0.5 for i in range(grid.shape[1])], [_short_key(v) for v in grid.columns], rotation=0)
    panel.set_yticks([i + 0.5 for i in range(grid.shape[0])], [_short_key(v) for v in grid.index], rotation=0)
    panel.set_xlabel(keys[1])
    panel.set_ylabel(keys[0] if labelled else "")


def _sortable(value: Any) -> Any:
    """Lists as tuples: they are keys of a table and have an order."""
    return tuple(value) if isinstance(value, list) else value


def _short_key(value: Any) -> str:
    return ", ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else _short(value)
