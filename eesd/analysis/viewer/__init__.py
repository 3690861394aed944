"""The trace viewer: one page, without a network, in which recorded decodes can be watched round by round.

    python -m eesd viewer --out figures/viewer.html results/views/smollm2-135m/*.jsonl

What `eesd view` has recorded is put into page.html with its style and script; the same rows give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eesd.analysis.order import method_key, natural
from eesd.analysis.style import method_color, method_label, task_label
from eesd.errors import EesdError
from eesd.files import read_jsonl, write_atomic

PARTS = Path(__file__).parent
TITLE_LENGTH = 60
NEEDED = ("model", "group", "task", "item", "method", "prompt", "first", "rounds", "decode_s")


def write_viewer(views: Sequence[Path | str], out: Path | str) -> None:
    """Write the page; EesdError naming file and line where a row is no view."""
    rows = []
    for path in views:
        for number, row in enumerate(read_jsonl(path), 1):
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise EesdError(f"{path}:{number}: no '{missing[0]}'. Expected rows of `eesd view`.")
            rows.append(complete(row))
    rows.sort(
        key=lambda row: (*(natural(row[key]) for key in ("model", "group", "task", "item")), method_key(row["method"]))
    )
    write_atomic(out, page(rows))


def complete(row: dict) -> dict:
    """A row with what the page shows: labels, colour, title, length."""
    tokens = 1 + sum(one["kept"] + (one["text"] is not None) for one in row["rounds"])
    title = " ".join(row["prompt"].split())
    return {
        **row,
        "tokens": tokens,
        "label": method_label(row["method"]),
        "color": method_color(row["method"]),
        "task_label": task_label(row["task"]),
        "run": f"{row['model']}, {row['group']}",
        "title": title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1] + "\u2026",
    }


def page(rows: Sequence[dict]) -> str:
    """The whole page. `<` is escaped in the data, so that no text of a model can end the element it lies in."""
    html = (PARTS / "page.html").read_text(encoding="utf-8")
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    for mark, content in (
        ("STYLE", (PARTS / "style.css").read_text(encoding="utf-8")),
        ("SCRIPT", (PARTS / "viewer.js").read_text(encoding="utf-8")),
        ("DATA", data),
    ):
        html = html.replace(f"/*{mark}*/", content, 1)
    return html
