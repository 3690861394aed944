"""Heads that are published with the repository: taken over instead of trained, or put there.

    python -m eesd publish --head results/heads/smollm2-135m/deep4 --out published/heads/smollm2-135m/deep4
    python -m eesd take --head published/heads/smollm2-135m/deep4 --model resources/models/smollm2-135m --out ...

A published card carries the SHA-256 of its weights, so that a damaged download is noticed before anything is measured.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.files import atomic_path, read_json, sha256_file, write_atomic
from eesd.models.special import fingerprint

WEIGHTS, CARD, CHECKSUM = "head.safetensors", "card.json", "weights_sha256"


def publish_head(head: Path, out: Path) -> None:
    """Copy a trained head and its card, with the checksum of the weights in the card."""
    card = _read_card(head)
    _copy(head, out)
    write_atomic(out / CARD, json.dumps({**card, CHECKSUM: sha256_file(head / WEIGHTS)}, indent=2) + "\n")


def take_head(head: Path, model_dir: Path, out: Path) -> None:
    """Copy a published head into the results; EesdError where it is damaged or was trained for another model."""
    card = _read_card(head)
    found = sha256_file(head / WEIGHTS)
    if found != card.get(CHECKSUM):
        raise EesdError(
            f"{head / WEIGHTS}: SHA-256 is {found}, but its card says {card.get(CHECKSUM)}. Fetch the file again, or "
            "train the head (run.heads: train)."
        )
    if card["fingerprint"] != fingerprint(model_dir):
        raise EesdError(
            f"{head}: published for a model with fingerprint {card['fingerprint']}, but {model_dir} has "
            f"{fingerprint(model_dir)}. Train the head (run.heads: train)."
        )
    _copy(head, out)
    shutil.copyfile(head / CARD, out / CARD)


def _read_card(head: Path) -> dict[str, Any]:
    for name in (WEIGHTS, CARD):
        if not (head / name).is_file():
            raise EesdError(f"{head / name}: no such file. A head is a folder with {WEIGHTS} and {CARD}.")
    return read_json(head / CARD, "Fetch the head, or train it, again.")


def _copy(head: Path, out: Path) -> None:
    with atomic_path(out / WEIGHTS) as temporary:
        shutil.copyfile(head / WEIGHTS, temporary)
