"""Named parts: tasks, drafters, controllers and figures register themselves under the name a configuration uses.

CONTROLLERS: Registry[type[Controller]] = Registry("controller")

@CONTROLLERS.register("static")
class Static(Controller): ...

CONTROLLERS["statc"]  # EesdError: Unknown controller 'statc'. Did you mean 'static'? Known: ...
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from eesd.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary of one kind of part, filled by a decorator."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`; a name can be taken only once."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise unknown(self.kind, name, self._parts)
        return self._parts[name]

    def names(self) -> list[str]:
        """Registered names in alphabetical order."""
        return sorted(self._parts)


def import_modules(package: str, folders: Iterable[str]) -> None:
    """Import all modules of a package, whose `__path__` is `folders`: a new part needs its file and nothing else."""
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{package}.{module.name}")


def registered_in(folder: Path, registry: str) -> dict[str, Path]:
    """File by name of the parts that a package registers, read from its source: drafters would import torch."""
    pattern = re.compile(rf"""^@{registry}\.register\(["']([^"']+)["']\)""", re.MULTILINE)
    files = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    return {name: path for path, text in files.items() for name in pattern.findall(text)}
