"""Errors that tell the user what to do.

Everything a user can get wrong raises `EesdError`; the command line prints its message and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn


class EesdError(Exception):
    """Bad input or environment. The message says what is wrong and what to do about it."""


class GivenSettings(dict[str, Any]):
    """Settings from a command line: a key that is needed and not there is an EesdError."""

    def __missing__(self, key: str) -> NoReturn:
        raise EesdError(f"--settings lacks the key '{key}'.")


def unknown(kind: str, name: str, known: Iterable[str]) -> EesdError:
    """The error for a name that is not registered, with the closest known name as a suggestion."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return EesdError(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(known) or 'none'}")
