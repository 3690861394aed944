"""Facts about a model folder that are not weights: its end-of-sequence tokens, its fingerprint, its revision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from eesd.files import settings_hash

CONFIGURATION = ("generation_config.json", "config.json")


def eos_ids(model_dir: Path | str, tokenizer: Any) -> frozenset[int]:
    """All tokens that end a generation: those of generation_config.json, config.json and the tokenizer."""
    ids: set[int] = set()
    for name in CONFIGURATION:
        path = Path(model_dir) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids |= set(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(ids | ({tokenizer.eos_token_id} - {None}))


def fingerprint(model_dir: Path | str) -> str:
    """Twelve hexadecimal digits that identify weights and shape of a model folder.

    Taken from names, shapes and the first values of every tensor, so it reads kilobytes, not gigabytes.
    """
    facts = []
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                piece = tensors.get_slice(name)
                facts.append([name, piece.get_shape(), piece[:1].flatten()[:16].float().tolist()])
    return settings_hash(facts)


def revision(model_dir: Path | str) -> str:
    """What unfinished work is stamped with: the fingerprint, and the configuration, which decides what weights mean."""
    paths = [Path(model_dir) / name for name in CONFIGURATION]
    return settings_hash([fingerprint(model_dir), *(json.loads(path.read_text()) for path in paths if path.exists())])
