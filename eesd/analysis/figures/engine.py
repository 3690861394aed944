"""Where a token's time goes, and what verifying several tokens at once costs, against the bound of memory."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.analysis import style
from eesd.analysis.figures.base import FIGURES, read_table
from eesd.errors import EesdError

LABEL_GAP = 0.07  # of the axis, between labels of lines that end side by side
BESIDE = {"textcoords": "offset points", "va": "center", "fontsize": 6.5}
DRAFTED = 4  # tokens drafted in the round that is drawn
PIECES = {
    "first layers": "#e69f00",
    "exit layer": "#f0e442",
    "draft head": "#d55e00",
    "remaining layers and head": "#0072b2",
}


@FIGURES.register("engine")
def draw_engine(tables_dir: Path) -> Figure:
    """For each model and machine: milliseconds of a vanilla token and of an EESD round; verification against tokens."""
    table = read_table(tables_dir, "engine")
    measured = list(table.groupby(["model", "device", "dtype", "engine", "threads"], sort=False, dropna=False))
    drawing = Figure(figsize=(style.PAGE_IN, 2.3 * len(measured)), layout="constrained")
    panels = drawing.subplots(len(measured), 2, squeeze=False)
    for ((model, device, dtype, engine, _), own), (left, right) in zip(measured, panels, strict=True):
        where = f"{model}, {dtype}, {device}, {engine}"
        _round_panel(left, own[own["context_tokens"] == own["context_tokens"].min()], where)
        _verify_panel(right, own)
    return drawing


def _seconds(own: pd.DataFrame, path: str, query_tokens: int = 1, default: float | None = None) -> float:
    """Seconds of a piece; `default`, or EesdError, where it was not measured."""
    found = own[(own["path"] == path) & (own["query_tokens"] == query_tokens)]
    if len(found):
        return float(found["seconds"].iloc[0])
    if default is None:
        raise EesdError(f"engine.csv: no cost of {path} for {query_tokens} tokens. Measure again with `eesd hardware`.")
    return default


def _parts(own: pd.DataFrame) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by piece of a vanilla token, and of a round that drafts `DRAFTED` tokens.

    Totals are those of the decode loop. A draft step, measured whole, is divided as its pieces are that were timed
    alone, whose calls cost more than the one of a step or of a vanilla token; what is left is verification.
    """
    pieces = {"first layers": "first_layers", "exit layer": "exit_layer", "draft head": "draft_head"}
    alone = {name: _seconds(own, path) for name, path in pieces.items()}
    shrunk = _seconds(own, "draft") / sum(alone.values())
    first = shrunk * alone["first layers"]
    drafting = {name: DRAFTED * shrunk * seconds for name, seconds in alone.items()}
    drafting["first layers"] += first  # which verification needs of the last drafted token too
    drawn = sum(drafting.values())
    apart = drawn + _seconds(own, "verify_from_exit", DRAFTED + 1)
    vanilla = _seconds(own, "vanilla_round", default=_seconds(own, "round", 0, default=_seconds(own, "vanilla")))
    rest = "remaining layers and head"
    return (
        {"first layers": first, rest: vanilla - first},
        {**drafting, rest: _seconds(own, "round", DRAFTED, default=apart) - drawn},
    )


def _round_panel(panel: Axes, own: pd.DataFrame, where: str) -> None:
    """Two stacked bars: one vanilla token, and one round that drafts `DRAFTED` tokens and verifies them."""
    bars = dict(zip(("vanilla\n1 token", f"EESD round\n{DRAFTED} drafted"), _parts(own), strict=True))
    for line, parts in enumerate(bars.values()):
        left = 0.0
        for name, seconds in parts.items():
            panel.barh(line, seconds * 1e3, 0.6, left=left, color=PIECES[name], label=name if line else None)
            left += seconds * 1e3
        panel.annotate(f"{left:.1f}", (left, line), xytext=(3, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(bars)), list(bars))
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(0, panel.get_xlim()[1] * 1.12)
    panel.set_xlabel("milliseconds")
    panel.set_title(f"{where}\ncontext {own['context_tokens'].iloc[0]:.0f} tokens", loc="left")
    panel.legend(loc="upper center", bbox_to_anchor=(0.45, -0.28), ncols=2, handlelength=1.0, columnspacing=1.2)
    panel.spines[["top", "right"]].set_visible(False)


def _verify_panel(panel: Axes, own: pd.DataFrame) -> None:
    """Milliseconds of all layers and head against tokens at once, one line a context, and the time its bytes need."""
    verify = own[own["path"] == "verify"]
    contexts = sorted(verify["context_tokens"].unique())
    ends: dict[float, float] = {}
    for index, context in enumerate(contexts):
        line = verify[verify["context_tokens"] == context].sort_values("query_tokens")
        share = 0.35 + 0.6 * index / max(1, len(contexts) - 1)
        color = style.matplotlib.colormaps["Blues"](share)
        milliseconds = line["seconds"] * 1e3
        panel.plot(line["query_tokens"], milliseconds, color=color, marker="o", markersize=2.5, linewidth=1)
        ends[context] = milliseconds.iloc[-1]
    nearest = verify[verify["context_tokens"] == contexts[0]]
    bound = float((nearest["seconds"] * nearest["bandwidth_share"]).iloc[0]) * 1e3
    panel.axhline(bound, color="0.2", linewidth=0.8, linestyle=(0, (4, 2)))
    note = {"xytext": (0, -3), "textcoords": "offset points", "ha": "right", "va": "top"}
    panel.annotate("read bandwidth bound", (16, bound), **note)
    panel.set_ylim(0, None)
    panel.set_xlim(0.3, 17.8)
    below = -math.inf
    for context, milliseconds in sorted(ends.items(), key=lambda end: end[1]):
        below = max(milliseconds, below + LABEL_GAP * panel.get_ylim()[1])
        panel.annotate(f"{context:.0f}", (16, below), xytext=(4, 0), **BESIDE)
    panel.set_xticks([1, 4, 8, 12, 16])
    panel.set_xlabel("tokens verified at once (labels: context tokens)")
    panel.set_ylabel("milliseconds")
    panel.set_title("verification", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
