"""Head cards: the JSON file beside each trained head, read into the rows of heads.csv and calibration.csv.

head_records(["results/heads/smollm2-135m/deep4/card.json"])[0]["top1_agreement"]      # 0.45
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eesd.errors import EesdError
from eesd.files import read_json

FIELDS = ("head", "kind", "exit_layer", "vocab_rows", "init", "loss", "context", "train_tokens", "model")
# The lists of bins in a card's calibration, and the number that sums each up.
CONFIDENCES = {"raw": ("bins_raw", "ece_raw"), "calibrated": ("bins", "ece")}


def head_records(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """One record for each head, task and draft position."""
    records = []
    for path, card in read_cards(paths):
        for task, found in card["agreement"].items():
            _check_agreement(path, task, found)
            records += [
                {
                    **{field: card[field] for field in FIELDS},
                    # Older cards say nothing of their vocabulary, nor of what prompts taught.
                    "vocabulary": card["settings"].get("vocabulary", "frequent"),
                    "train_labels": card.get("train_labels", card["train_tokens"]),
                    "task": task,
                    "position": position,
                    "top1_agreement": top1,
                    "expected_acceptance": acceptance,
                    "chain_length": found["chain_length"],
                    "positions": found["positions"],
                    "seed": card["settings"].get("seed"),
                    **_provenance(card),
                }
                for position, (top1, acceptance) in enumerate(
                    zip(found["top1"], found["expected_acceptance"], strict=True), 1
                )
            ]
    return records


def _provenance(card: dict[str, Any]) -> dict[str, Any]:
    # Older cards do not say.
    trained = card.get("trained", {})
    return {
        "train_seconds": card.get("train_seconds"),
        "torch": trained.get("versions", {}).get("torch"),
        **{field: trained.get(field) for field in ("device_name", "commit", "time")},
    }


def calibration_records(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """One record for each head, raw or calibrated confidence, and bin that any token falls in."""
    records = []
    for path, card in read_cards(paths):
        _check_calibration(path, card["calibration"])
        for confidence, (bins, ece) in CONFIDENCES.items():
            who = {"model": card["model"], "head": card["head"], "confidence": confidence}
            records += [{**who, **one, "ece": card["calibration"][ece]} for one in card["calibration"][bins]]
    return records


def read_cards(paths: Iterable[Path | str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every card with its path; EesdError if one is damaged or a head has two."""
    seen: dict[tuple[str, str], Path] = {}
    for path in map(Path, paths):
        card = _read_card(path)
        key = (card["model"], card["head"])
        if key in seen:
            raise EesdError(f"{path}: a second card of head '{key[1]}' of model '{key[0]}'; the first is {seen[key]}.")
        seen[key] = path
        yield path, card


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EesdError(f"{path}: no such file. Expected the card.json that `eesd train` writes.")
    card = read_json(path, "Train the head again.")
    missing = [
        field
        for field in (*FIELDS, "settings", "agreement", "calibration")
        if not isinstance(card, dict) or field not in card
    ]
    if missing:
        raise EesdError(f"{path}: no field {', '.join(missing)}. Expected the card.json that `eesd train` writes.")
    if not isinstance(card["settings"], dict):
        raise EesdError(f"{path}: 'settings' holds no settings. Expected the card.json that `eesd train` writes.")
    if not isinstance(card["agreement"], dict) or not card["agreement"]:
        raise EesdError(f"{path}: 'agreement' is empty. Expected held-out figures for each task; train the head again.")
    return card


def _check_agreement(path: Path, task: str, found: Any) -> None:
    where = f"{path}: agreement.{task}"
    for field in ("top1", "expected_acceptance", "chain_length", "positions"):
        if not isinstance(found, dict) or field not in found:
            raise EesdError(f"{where} has no {field}. Expected the card.json that `eesd train` writes.")
    shares = (found["top1"], found["expected_acceptance"])
    if not all(isinstance(values, list) and values for values in shares) or len({len(v) for v in shares}) > 1:
        raise EesdError(f"{where}: top1 and expected_acceptance need one number for each draft position.")
    for value in (*shares[0], *shares[1]):
        if not _is_number(value) or value > 1 + 1e-6:
            raise EesdError(f"{where}: {value!r} is not a share between 0 and 1.")
    for field in ("chain_length", "positions"):
        # Outputs that are all shorter than a chain have no length to measure.
        unmeasured = field == "chain_length" and found[field] is None
        if not unmeasured and not _is_number(found[field]):
            raise EesdError(f"{where}.{field} is {found[field]!r}, expected a number of at least 0.")


def _check_calibration(path: Path, found: Any) -> None:
    for bins, ece in CONFIDENCES.values():
        for field in (bins, ece):
            if not isinstance(found, dict) or field not in found:
                raise EesdError(f"{path}: calibration has no {field}. Expected the card.json that `eesd train` writes.")
        for one in found[bins] if isinstance(found[bins], list) else [found[bins]]:
            if not isinstance(one, dict) or set(one) != {"predicted", "observed", "tokens"}:
                raise EesdError(
                    f"{path}: calibration.{bins} needs predicted, observed and tokens in each bin: {one!r}."
                )
            if not all(map(_is_number, one.values())) or max(one["predicted"], one["observed"]) > 1 + 1e-6:
                raise EesdError(f"{path}: calibration.{bins} holds {one!r}, where shares are between 0 and 1.")


def _is_number(value: Any) -> bool:
    """A finite number that is not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
