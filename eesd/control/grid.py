"""Controllers as a configuration lists them: settings with defaults, and grids of settings.

expand([{"name": "static", "grid": {"k": [1, 2]}}])      # [{"name": "static", "k": 1}, {"name": "static", "k": 2}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from eesd.control.base import Controller, make_controller
from eesd.errors import EesdError


def all_settings(controller: Controller) -> dict[str, Any]:
    """A controller's settings, defaults included."""
    return {part.name: getattr(controller, part.name) for part in fields(controller) if part.init}


def expand(controllers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings of single controllers, one for each combination of the values in a `grid`; each is checked.

    EesdError for settings that are there twice, defaults filled in: two lines by one name could not be told apart.
    """
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for entry in controllers:
        fixed = {key: value for key, value in entry.items() if key != "grid"}
        grid = entry.get("grid", {})
        if not isinstance(grid, Mapping):
            raise EesdError(f"grid of a replayed controller must give lists of values by setting, not {grid!r}.")
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise EesdError(f"grid.{name} of a replayed controller must be a list of values, not {values!r}.")
        for values in product(*grid.values()):
            settings = {**fixed, **dict(zip(grid, values, strict=True))}
            controller = make_controller(settings)
            whole = json.dumps([settings["name"], all_settings(controller)], sort_keys=True)
            if whole in seen:
                raise EesdError(f"Replayed controllers have {settings} twice. Take one of them out.")
            seen.add(whole)
            found.append(settings)
    return found
