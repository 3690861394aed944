"""Speedup against the layer that drafts exit at: methods that differ in nothing but the exit layer of their heads.

    exit_records(speedups, settings, cards)[0]      # {"series": "static k = 2", "exit_layer": 4, "speedup": 1.2, ...}

`settings` are those that rows carry: (model, method) -> settings; the cards of heads say where they exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eesd.words import BASELINE

PLACE = ("model", "group", "series")


def series(method: Mapping[str, Any], context: str) -> str:
    """What methods of one line share: controller, tree, lookup and what heads read. Of resolved or written settings."""
    controller, tree = method["controller"], method.get("tree")
    name = " ".join([controller["name"], *(f"{key} = {controller[key]}" for key in ("k", "tau") if key in controller)])
    shape = f", tree of {tree['nodes']}" if tree else ""
    first = method.get("lookup")
    if first:
        shape += f", after lookup of {first['min_ngram']} to {first['max_ngram']} by {first['controller']['name']}"
    return name + shape + ("" if context == "verified" else f", context {context}")


def exit_records(
    speedups: Iterable[Mapping[str, Any]],
    settings: Mapping[tuple[str, str], Mapping[str, Any]],
    cards: Mapping[tuple[str, str], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Speedups over vanilla of all methods whose line has two exit layers or more; none if there is no such line.

    cards: (model, head) -> card.
    """
    found = []
    for record in speedups:
        method = settings[record["model"], record["method"]]
        card = cards.get((record["model"], method.get("head")))
        if record["baseline"] == BASELINE and card and card["kind"] == "exit_layer":
            label = series(method, card["context"])
            found.append({**record, "series": label, "exit_layer": card["exit_layer"], "head": card["head"]})
    lines: dict[Sequence[Any], set[int]] = {}
    for one in found:
        lines.setdefault(tuple(one[key] for key in PLACE), set()).add(one["exit_layer"])
    return [one for one in found if len(lines[tuple(one[key] for key in PLACE)]) > 1]
