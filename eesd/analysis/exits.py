"""Speedup against the layer that drafts exit at: methods that differ in nothing but the exit layer of their heads.

    exit_records(speedups, settings, cards)[0]      # {"series": "static k = 2", "exit_layer": 4, "speedup": 1.2, ...}

`settings` are those that rows carry: (model, method) -> settings; the cards of heads say where they exit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from eesd.control import CONTROLLERS, Controller
from eesd.words import BASELINE


def series(method: Mapping[str, Any], context: str) -> str:
    """All that methods of one line share: controller, tree, lookup, context. Of resolved or written settings."""
    tree, first = method.get("tree"), method.get("lookup")
    parts = [_rule(method["controller"])]
    if tree:
        typical = tree["acceptance"] == "typical"
        parts.append(f"tree of {tree['nodes']}" + (f" and width {tree['width']}" if tree["width"] else ""))
        parts += [f"typical acceptance {tree['epsilon']} {tree['delta']}"] if typical else []
    if first:
        parts.append(f"after lookup of {first['min_ngram']} to {first['max_ngram']} by {_rule(first['controller'])}")
    if context != "verified":
        parts.append(f"context {context}")
    return ", ".join(parts)


def _rule(controller: Mapping[str, Any]) -> str:
    """Name of a controller and those of its settings that are not its defaults; lengths and thresholds always."""
    name = controller["name"]
    kind = CONTROLLERS[name] if name in CONTROLLERS.names() else Controller  # rows may outlive a controller
    usual = {part.name: part.default for part in fields(kind)}
    told = {key: value for key, value in controller.items() if key != "name"}
    shown = [
        f"{key} = {told[key]}" for key in told if key in ("k", "tau") or _plain(told[key]) != _plain(usual.get(key))
    ]
    return " ".join([name, *shown])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def training(head: Mapping[str, Any]) -> str:
    """What heads of one line share: all settings of their training but where they exit."""
    return json.dumps({key: value for key, value in head.items() if key != "exit_layer"}, sort_keys=True)


def exit_records(
    speedups: Iterable[Mapping[str, Any]],
    settings: Mapping[tuple[str, str], Mapping[str, Any]],
    cards: Mapping[tuple[str, str], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Speedups over vanilla of all methods whose line has two exit layers or more; none if there is no such line.

    Lines of one series say too what of their heads' training differs. cards: (model, head) -> card.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    lines: dict[Any, set[int]] = {}
    for record in speedups:
        method = settings[record["model"], record["method"]]
        card = cards.get((record["model"], method.get("head")))
        if record["baseline"] == BASELINE and card and card["kind"] == "exit_layer":
            one = {**record, "series": series(method, card["context"]), "exit_layer": card["exit_layer"]}
            line = (record["model"], record["group"], one["series"]), training(card["settings"])
            lines.setdefault(line, set()).add(card["exit_layer"])
            found.append((line, {**one, "head": card["head"]}))
    drawn = [line for line, layers in lines.items() if len(layers) > 1]
    more = {line: _apart(line[1], [how for place, how in drawn if place == line[0]]) for line in drawn}
    return [{**one, "series": ", ".join([one["series"], *more[line]])} for line, one in found if line in more]


def _apart(own: str, all_lines: Sequence[str]) -> list[str]:
    """Those settings of a line's training that other lines have otherwise."""
    mine, others = json.loads(own), [json.loads(line) for line in all_lines]
    return [f"{key} = {mine.get(key)}" for key in sorted(mine) if any(one.get(key) != mine[key] for one in others)]
