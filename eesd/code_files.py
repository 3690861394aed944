"""Source files behind entries of the configuration: what rules depend on beside data and settings.

    drafter_files(methods_of(config, "main"))     # base.py, exit_head.py, ... but not medusa.py

Editing or adding a part that a rule does not use reruns nothing. Imports no torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from eesd.checks import DRAFTING, method_rules
from eesd.control import CONTROLLERS
from eesd.registry import registered_in

# What every method executes of drafting (eesd/bench/methods.py).
SHARED = ("base", "medusa_tree", "stored")
IMPORTS = re.compile(r"^from eesd\.drafting\.(\w+) import", re.MULTILINE)


def methods_of(config: Mapping[str, Any], group: str) -> list[Mapping[str, Any]]:
    """The methods of a group, as configured."""
    return [config["methods"][method] for method in config["groups"][group]["methods"]]


def task_files(tasks: Iterable[str]) -> list[str]:
    """Of these tasks, and of what they extend."""
    from eesd.tasks import TASKS

    return _files(type(TASKS[task]) for task in tasks)


def controller_files(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of the controllers of these methods, and of what they extend."""
    names = {rule["name"] for method in methods for rule in method_rules(method)}
    return _files(CONTROLLERS[name] for name in names)


def drafter_files(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of the drafters of these methods, and of what they import of `eesd/drafting`."""
    files = registered_in(DRAFTING, "DRAFTERS")
    used = {name for method in methods for name in (method["drafter"], method["lookup"] and "lookup") if name}
    todo, found = [DRAFTING / f"{name}.py" for name in SHARED] + [files[name] for name in used], set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [DRAFTING / f"{name}.py" for name in IMPORTS.findall(path.read_text(encoding="utf-8"))]
    return sorted(map(str, found))


def _files(parts: Iterable[type]) -> list[str]:
    own = {base for part in parts for base in part.__mro__ if base.__module__.startswith("eesd.")}
    return sorted({inspect.getfile(base) for base in own})
