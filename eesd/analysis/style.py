"""The look of every figure: sizes, colours, labels, the grid of panels, and files that are identical when redrawn.

with style():
    drawing, panels = grid([Band("main", ["asdiv", "xsum"], height_in=0.8)])
    save(drawing, Path("figures/speedup"))      # speedup.pdf .png .svg
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eesd.files import atomic_path

COLUMN_IN, PAGE_IN = 3.3, 6.8  # widths of one and two columns of a paper
MAX_COLUMNS = 4
LINE_IN = 0.19  # height of one bar with its label
DPI = 200

RC = {
    **seaborn.axes_style("ticks"),
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "0.35",
    "xtick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "pdf.fonttype": 42,  # text stays text in a paper
    "svg.hashsalt": "eesd",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}
# Without these the date of drawing is in the file, and equal tables give different bytes.
METADATA = {"pdf": {"CreationDate": None}, "png": {}, "svg": {"Date": None}}

# Okabe-Ito and Tol's muted scheme, which stay apart for colour-blind readers. Names that are not here get one of OTHERS
# by their own hash.
METHOD_COLORS = {
    "vanilla": "#7f7f7f",
    "hf_generate": "#b0a58f",
    "eesd": "#d55e00",
    "eesd_paper": "#cc79a7",
    "eesd_cali": "#e69f00",
    "eesd_cost": "#009e73",
    "eesd_tree": "#8c510a",
    "tree_verify": "#c51b7d",
    "eesd_lookup": "#1a1a1a",
    "eesd_cost_lookup": "#004d40",
    "tree_verify_lookup": "#54278f",
    "kangaroo": "#228833",
    "hf_heuristic": "#cc6677",
    "confidence": "#56b4e9",
    "svip": "#882255",
    "draft_verify": "#332288",
    "draft_verify_deep4": "#8c6bb1",
    "adaedl": "#999933",
    "acceptance_product": "#44aa99",
    "ucb": "#aa4499",
    "exp3": "#661100",
    "lookup": "#0072b2",
    "lookup_adaptive": "#08519c",
    "hf_lookup": "#8db3d1",
    "early_exit": "#117733",
    "hf_early_exit": "#9cc5a7",
    "self_sd": "#ddaa33",
    "medusa": "#aa3377",
    "medusa_tree": "#ee6677",
    "medusa_typical": "#f4a8b4",
    "medusa_tree_lookup": "#67001f",
}
OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#332288", "#882255", "#999933")
PART_COLORS = {"prefill": "#bbbbbb", "draft": "#e69f00", "verify": "#0072b2", "control": "#d55e00", "other": "#56b4e9"}
METHOD_LABELS = {
    "hf_generate": "HF generate",
    "eesd": "EESD, Beta-TS",
    "eesd_paper": "EESD, paper's layer",
    "eesd_cali": "EESD, Cali-TS",
    "eesd_cost": "EESD, Cost-TS",
    "eesd_lookup": "Draft & Verify + lookup",
    "eesd_cost_lookup": "Cost-TS + lookup",
    "tree_verify_lookup": "tree, Draft & Verify + lookup",
    "lookup": "prompt lookup",
    "lookup_adaptive": "prompt lookup, adaptive",
    "hf_lookup": "HF prompt lookup",
    "medusa": "Medusa",
    "medusa_tree": "Medusa, tree",
    "medusa_typical": "Medusa, typical",
    "medusa_tree_lookup": "Medusa, tree + lookup",
    "eesd_tree": "EESD, tree",
    "tree_verify": "tree, Draft & Verify",
    "kangaroo": "Kangaroo",
    "hf_heuristic": "HF heuristic",
    "svip": "SVIP",
    "draft_verify": "Draft & Verify",
    "draft_verify_deep4": "Draft & Verify, layer 4",
    "adaedl": "AdaEDL",
    "acceptance_product": "acceptance product",
    "ucb": "UCB",
    "exp3": "EXP3",
    "early_exit": "early exit",
    "hf_early_exit": "HF early exit",
    "self_sd": "Self-SD",
}
TASK_LABELS = {"asdiv": "ASDiv", "gsm8k": "GSM8K", "xsum": "XSum", "humaneval": "HumanEval", "mbpp": "MBPP"} | {
    "passages": "Passages",
    "instruct": "Instructions",
    "spec_bench": "Spec-Bench",
}
BASELINE_LABELS = {"vanilla": "our vanilla", "hf_generate": "HF generate"}


@dataclass(frozen=True)
class Band:
    """One row of panels, a panel a task."""

    title: str
    tasks: list[str]
    height_in: float


def method_color(name: str) -> str:
    """Colour of a method: the same in every figure, whatever else is drawn."""
    if name in METHOD_COLORS:
        return METHOD_COLORS[name]
    if match := re.fullmatch(r"(static|tree)_k(\d+)", name):
        share = 0.35 + 0.055 * min(int(match[2]), 10)  # longer drafts are darker
        return matplotlib.colors.to_hex(matplotlib.colormaps["Blues" if match[1] == "static" else "Purples"](share))
    return OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def method_label(name: str) -> str:
    """Name of a method for reading; unknown names stay as they are."""
    match = re.fullmatch(r"(static|tree)_k(\d+)", name)
    return f"{match[1]} k = {match[2]}" if match else METHOD_LABELS.get(name, name)


def task_label(name: str) -> str:
    """Name of a task for reading; unknown names stay as they are."""
    return TASK_LABELS.get(name, name)


def judged_on(task: str, positions: Iterable[float]) -> str:
    """Name of a task with the number of tokens that heads were judged on, or the fewest and the most."""
    counts = [int(count) for count in positions]
    ends = sorted({min(counts), max(counts)})
    return f"{task_label(task)} ({' to '.join(f'{end:,}' for end in ends)} tokens)"


@contextmanager
def style() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults, whatever the user's own matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def grid(bands: list[Band], legend: Sequence[str] = ()) -> tuple[Figure, list[list[Axes]]]:
    """A figure with one row of panels for each band, and room for a legend of the given labels above.

    Columns line up, and bars are equally thick everywhere.
    """
    n_columns = max(len(band.tasks) for band in bands)
    width = COLUMN_IN if n_columns == 1 else PAGE_IN
    legend_in = 0.1 + 0.155 * math.ceil(len(legend) / _legend_columns(legend, width)) if legend else 0
    # What is not panel: a title and tick labels for each band, a legend above all.
    around_in = sum(0.52 + (0.14 if band.title else 0) for band in bands) + legend_in
    height = sum(band.height_in for band in bands) + around_in
    drawing = Figure(figsize=(width, height), layout="constrained")
    drawing.get_layout_engine().set(w_pad=0.04, h_pad=0.06, wspace=0.03, hspace=0.0)
    places = drawing.add_gridspec(len(bands), n_columns, height_ratios=[band.height_in for band in bands])
    panels = []
    for row, band in enumerate(bands):
        axes: list[Axes] = []
        for column in range(len(band.tasks)):
            first = axes[0] if axes else None
            axes.append(drawing.add_subplot(places[row, column], sharex=first, sharey=first))
            axes[-1].tick_params(labelleft=first is None)
        seaborn.despine(fig=drawing)
        if band.title:
            _title(axes[0], band.title)
        panels.append(axes)
    return drawing, panels


def reach(values: Iterable[float], highs: Iterable[float]) -> float:
    """Right end of bars and their intervals, at most twice the longest bar: intervals of two prompts are far longer."""
    longest = max(values)
    return min(max([longest, *(high for high in highs if not math.isnan(high))]), 2 * longest)


def interval(panel: Axes, line: float, low: float, high: float, reach: float, **look: Any) -> float:
    """Draw an interval across bar `line` and return where it ends: at `reach`, with an arrow head, if it is longer.

    NaN ends, of a single prompt, draw nothing and give 0.
    """
    if math.isnan(low):
        return 0.0
    end = min(high, reach)
    panel.plot([low, end], [line, line], **look)
    if high > reach:
        panel.plot(end, line, ">", markersize=3, color=look["color"], zorder=look.get("zorder"))
    return end


def panel_title(axes: Axes, text: str, below_band_title: bool) -> None:
    """Left-aligned panel title, leaving a line for the title of the band where there is one."""
    axes.set_title(("\n" if below_band_title else "") + text, loc="left", color="0.25")


def _title(axes: Axes, text: str) -> None:
    # From the left edge of the figure; outside the layout, or its width would push the panels aside.
    room = 17 * axes.figure.get_figwidth()  # bold letters that fit on the line
    axes.annotate(
        text,
        fontsize=RC["font.size"] * min(1.0, room / len(text)),
        xy=(0, 1),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(3, 17),
        textcoords="offset points",
        weight="bold",
        annotation_clip=False,
        in_layout=False,
    )


def key(drawing: Figure, panels: list[list[Axes]], labels: Sequence[str]) -> None:
    """One legend above all panels for the given labels, as far as they are drawn, in that order."""
    found = {}
    for panel in [panel for axes in panels for panel in axes]:
        handles, names = panel.get_legend_handles_labels()
        found.update(zip(names, handles, strict=True))
    shown = [label for label in labels if label in found]
    columns = _legend_columns(shown, drawing.get_figwidth())
    drawing.legend(
        [found[label] for label in shown],
        shown,
        loc="outside upper left",
        ncols=columns,
        handlelength=1.0,
        columnspacing=1.5,
    )


def _legend_columns(labels: Sequence[str], width_in: float) -> int:
    # About 4.3 points a letter, and the handle and gaps beside it.
    fitting = width_in * 72 / (4.3 * max(map(len, labels)) + 28)
    return max(1, min(len(labels), int(fitting)))


def _settle(drawing: Figure) -> None:
    """Lay out once, to a millionth of the figure: the solver's last digits depend on where objects lie in memory."""
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")
    for axes in drawing.axes:
        axes.set_position([round(edge, 6) for edge in axes.get_position(original=True).bounds])


def save(drawing: Figure, stem: Path) -> list[Path]:
    """Write `stem`.pdf, .png and .svg; equal figures give equal bytes."""
    _settle(drawing)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in METADATA]
    for path, metadata in zip(paths, METADATA.values(), strict=True):
        with atomic_path(path) as temporary:
            drawing.savefig(temporary, metadata=metadata)
    return paths
