"""Head cards: the JSON file beside each trained head, read into the rows of heads.csv.

head_records(["results/heads/smollm2-135m/exit4/card.json"])[0]["top1_agreement"]      # 0.45
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eesd.errors import EesdError

FIELDS = ("head", "kind", "exit_layer", "vocab_rows", "init", "loss", "context", "train_tokens", "model")


def head_records(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """One record for each head and task."""
    records = []
    seen: dict[tuple[str, str], Path] = {}
    for path in map(Path, paths):
        card = _read_card(path)
        key = (card["model"], card["head"])
        if key in seen:
            raise EesdError(f"{path}: a second card of head '{key[1]}' of model '{key[0]}'; the first is {seen[key]}.")
        seen[key] = path
        for task, found in card["agreement"].items():
            _check_agreement(path, task, found)
            records.append(
                {
                    **{field: card[field] for field in FIELDS},
                    "task": task,
                    "position": 1,
                    "top1_agreement": found["top1"],
                    "expected_acceptance": found["expected_acceptance"],
                    "chain_length": None,
                    "positions": found["positions"],
                }
            )
    return records


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EesdError(f"{path}: no such file. Expected the card.json that `eesd train` writes.")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EesdError(f"{path}: not valid JSON ({error}). Train the head again.") from error
    missing = [field for field in (*FIELDS, "agreement") if not isinstance(card, dict) or field not in card]
    if missing:
        raise EesdError(f"{path}: no field {', '.join(missing)}. Expected the card.json that `eesd train` writes.")
    if not isinstance(card["agreement"], dict) or not card["agreement"]:
        raise EesdError(f"{path}: 'agreement' is empty. Expected held-out figures for each task; train the head again.")
    return card


def _check_agreement(path: Path, task: str, found: Any) -> None:
    for field in ("top1", "expected_acceptance", "positions"):
        value = found.get(field) if isinstance(found, dict) else None
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (field != "positions" and value > 1 + 1e-6):
            raise EesdError(
                f"{path}: agreement.{task}.{field} is {value!r}, expected a number between 0 and 1 (or a count)."
            )
