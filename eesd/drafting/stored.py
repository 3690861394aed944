"""Trained heads on disk: `head.safetensors` and `card.json` in one folder, whatever their kind.

card, tensors = read_head(path, "exit_layer", target, fingerprint(model_dir))
fill_head(head, tensors, target, path)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eesd.errors import EesdError
from eesd.files import read_json
from eesd.models.transformer import Transformer

REMEDY = "Delete the head's folder and train it again."


def read_card(path: Path) -> dict[str, Any]:
    """The card in a head's folder; EesdError for a damaged one."""
    return read_json(path / "card.json", REMEDY)


def read_head(path: Path | str, kind: str, target: Transformer, model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Card and weights of a folder, on the target's device.

    Raises EesdError when files are missing or damaged, or the head is of another kind or was trained for another model
    than that of fingerprint `model`.
    """
    path = Path(path)
    try:
        card = read_card(path)
        tensors = load_file(path / "head.safetensors", device=str(target.device))
    except FileNotFoundError as error:
        raise EesdError(
            f"{path}: no trained head here. Train it with `snakemake --cores all {path}/head.safetensors`."
        ) from error
    except SafetensorError as error:
        raise EesdError(f"{path}: damaged ({error}). {REMEDY}") from error
    if card["kind"] != kind:
        raise EesdError(
            f"{path}: this head is of kind {card['kind']}, but the drafter reads heads of kind {kind}. Give the method "
            "another head, or another drafter."
        )
    if card["fingerprint"] != model:
        raise EesdError(
            f"{path}: this head was trained for a model with fingerprint {card['fingerprint']}, "
            f"but the target's is {model}. Train a head for this model."
        )
    return card, tensors


def fill_head(head: nn.Module, tensors: Mapping[str, Tensor], target: Transformer, path: Path | str) -> None:
    """Give a head without memory its weights in the target's dtype, frozen; EesdError where they do not fit."""
    weights = {name: t if name == "token_ids" else t.to(target.dtype) for name, t in tensors.items()}
    try:
        head.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise EesdError(f"{path}: these weights do not fit a head of this model ({error}).") from error
    head.requires_grad_(False).eval()
