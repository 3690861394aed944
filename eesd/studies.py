"""Studies: a head of the configuration trained again and again with some of its settings changed.

    variations(config, "init")[0]      # Variation("init.init-last.s0", {"init": "last"}, {"exit_layer": 4, ...})

Each variation becomes a head like those under `heads`, so the one rule that trains heads trains it, and once if several
studies have it. Imports no torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from eesd.errors import EesdError, unknown
from eesd.schema import check_entry
from eesd.words import INITS

VARIANT = "variant"  # what the varied setting is called where variations have names


@dataclass(frozen=True)
class Variation:
    """One head to train: its name, the settings that were varied, and all its settings."""

    head: str
    varied: dict[str, Any]
    settings: dict[str, Any]


def add_heads(config: dict[str, Any]) -> None:
    """Check every study, and define the heads of those that run; EesdError for the first mistake."""
    for name in config["studies"]:
        variations(config, name)
    for name in config["run"]["studies"]:
        if name not in config["studies"]:
            raise EesdError(f"Configuration, run.studies: {unknown('study', name, config['studies'])}")
        for one in variations(config, name):
            if config["heads"].setdefault(one.head, one.settings) != one.settings:
                raise _mistake(name, f"its head '{one.head}' is also defined under heads. Rename one of the two.")


def variations(config: Mapping[str, Any], study: str) -> list[Variation]:
    """Every combination of the varied values, or every variant, with every seed, in the order they are written in.

    One with the very settings of a head of an earlier study that runs is that head.
    """
    entry = config["studies"][study]
    if bool(entry["vary"]) == bool(entry["variants"]):
        raise _mistake(study, "give either vary, values of some settings, or variants, named changes: one, not both.")
    if entry["base"] not in config["heads"]:
        raise _mistake(f"{study}.base", unknown("head", entry["base"], config["heads"]))
    found = {}
    running = config["run"]["studies"]
    earlier = {name: head for name, head in config["heads"].items() if name.partition(".")[0] in running}
    for label, varied, changes, where in _changes(study, entry):
        settings = copy.deepcopy({**config["heads"][entry["base"]], **changes})
        check_entry("heads", settings, f"studies.{where}")
        if settings["corpus"] not in config["corpora"]:
            raise _mistake(f"{where}.corpus", unknown("corpus", settings["corpus"], config["corpora"]))
        if changes.get("init", INITS[0]) not in (known := [*INITS, *config["heads"]]):
            raise _mistake(f"{where}.init", unknown("init", changes["init"], known))
        for seed in entry["seeds"]:
            head = f"{study}.{label}.s{seed}"
            if head in found:
                raise _mistake(where, f"two of its variations are '{label}'. Remove one, or use variants with names.")
            whole = {**settings, "seed": seed}
            same = next((name for name, other in earlier.items() if other == whole), head)
            found[head] = Variation(same, varied, whole)
    return list(found.values())


def _changes(study: str, entry: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """(label, varied settings, changes of the base, place in the configuration) of each variation, seeds aside."""
    for where, changes in (("vary", entry["vary"]), *((f"variants.{k}", v) for k, v in entry["variants"].items())):
        if "seed" in changes:
            raise _mistake(f"{study}.{where}", "the seed is no setting to vary: list seeds under `seeds`.")
    if entry["variants"]:
        return [(name, {VARIANT: name}, part, f"{study}.variants.{name}") for name, part in entry["variants"].items()]
    combined = [dict(zip(entry["vary"], values, strict=True)) for values in product(*entry["vary"].values())]
    labels = [".".join(f"{key}-{_short(value)}" for key, value in one.items()) for one in combined]
    return [(label, one, one, f"{study}.vary") for label, one in zip(labels, combined, strict=True)]


def _short(value: Any) -> str:
    """A value as part of a file name: 5000, lens, soft1-tv0.5, null."""
    if isinstance(value, Mapping):
        return "-".join(f"{key}{_short(part)}" for key, part in value.items() if part)
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())


def _mistake(where: str, message: object) -> EesdError:
    return EesdError(f"Configuration, studies.{where}: {message}")
