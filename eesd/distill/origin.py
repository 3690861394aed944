"""The trained head that another goes on from: found beside it by its name, and checked before anything is trained.

origin = read_origin({"init": "deep4", ...}, Path("results/heads/m/deep1"), target, fingerprint)     # reads .../m/deep4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eesd.drafting.exit_head import ExitHead, load_exit_head
from eesd.errors import EesdError, unknown
from eesd.files import sha256_file
from eesd.models.transformer import Transformer
from eesd.words import INITS, kept, origin_of


@dataclass(frozen=True)
class Origin:
    """A trained head in the target's dtype, which training may change, its card, and the SHA-256 of its weights."""

    head: ExitHead
    card: Mapping[str, Any]
    sha256: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the card of a head says of where it started, with the tokens of all heads before it."""
        before = self.card.get("origin") or {"train_tokens": 0}
        tokens = self.card["train_tokens"] + before["train_tokens"]
        return {"head": self.card["head"], "weights_sha256": self.sha256, "train_tokens": tokens}


def read_origin(settings: Mapping[str, Any], out: Path, target: Transformer, model: str) -> Origin | None:
    """The head that `init` of a head in folder `out` names, None if that starts anew; model: the target's fingerprint.

    EesdError where there is none of that name, or none that a head with these settings can go on from.
    """
    name = origin_of(settings)
    if name is None:
        return None
    folder = out.parent / name
    if not folder.is_dir():
        raise EesdError(f"{unknown('init', name, INITS)} Nor is there a trained head {folder}.")
    head, card = load_exit_head(folder, target, model)
    for key in kept(settings):
        if card["settings"][key] != settings[key]:
            raise EesdError(
                f"{folder}: has {key} {card['settings'][key]}, but the head that goes on from it has {settings[key]}. "
                f"Set {key} to {card['settings'][key]}."
            )
    return Origin(head, card, sha256_file(folder / "head.safetensors"))
