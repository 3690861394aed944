"""What controllers with `reset_on: never` have learnt, kept beside unfinished rows, so that an interrupted run goes on
with it.

    memory = Memory(Path("main.jsonl.memory"), methods)
    memory.restore(rows.done)         # False: what is there is not what these units taught
    memory.save([*done, unit])        # before the unit's rows are written
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

from eesd.bench.methods import Method, OwnMethod
from eesd.bench.records import Unit
from eesd.files import atomic_path


class Memory:
    """The controllers of `methods` that remember, by the units that taught them; nothing is written without any."""

    def __init__(self, path: Path, methods: dict[str, Method]) -> None:
        self.path, self.methods = path, methods
        self.remembering = [name for name, one in methods.items() if isinstance(one, OwnMethod) and one.remembers]
        # After this unit, and after the one before: a run may end between `save` and the writing of the rows.
        self.kept: dict[frozenset[Unit], bytes] = {frozenset(): self._pickled()}

    def _pickled(self) -> bytes:
        return pickle.dumps({name: self.methods[name].controllers for name in self.remembering})

    def restore(self, done: Collection[Unit]) -> bool:
        """Give the methods what the finished units taught them; False if that is not known."""
        if not self.remembering or not done:
            return True
        try:
            self.kept = pickle.loads(self.path.read_bytes())
            found: dict[str, Any] = pickle.loads(self.kept[frozenset(done)])
        except (FileNotFoundError, KeyError, pickle.UnpicklingError, EOFError):
            return False
        for name, controllers in found.items():
            self.methods[name] = self.methods[name].with_controllers(*controllers)
        return True

    def save(self, done: Collection[Unit]) -> None:
        """Note what is known after these units."""
        if self.remembering:
            kept = {**self.kept, frozenset(done): self._pickled()}
            self.kept = dict(list(kept.items())[-2:])
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(pickle.dumps(self.kept))

    def forget(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
