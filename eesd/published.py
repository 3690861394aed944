"""Heads that come with the repository (`run.heads: published`): which there are, and whether a configuration fits them.

check_published(config, needed={"deep1"})       # EesdError for the first of these heads that cannot be had

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from eesd.checks import PUBLISHED
from eesd.errors import EesdError
from eesd.files import read_json
from eesd.words import kept, origin_of

PUBLISHED_HEADS = PUBLISHED / "heads"
REMEDY = "Fetch the file again."


def published_heads(model: str) -> list[str]:
    """Names of the heads that the repository brings for a model."""
    return sorted(card.parent.name for card in PUBLISHED_HEADS.glob(f"{model}/*/card.json"))


def head_settings(config: Mapping[str, Any], model: str, head: str) -> Mapping[str, Any]:
    """What `head` was, or will be, trained with: a published head that is taken over has its own settings."""
    if config["run"]["heads"] == "published" and head in published_heads(model):
        return read_json(PUBLISHED_HEADS / model / head / "card.json", REMEDY)["settings"]
    return config["heads"][head]


def check_published(config: Mapping[str, Any], needed: Iterable[str]) -> None:
    """EesdError if heads are taken over, and one of `needed` is neither published nor goes on from one that is, or a
    published one is not what the configuration says of it."""
    for model in config["run"]["models"] if config["run"]["heads"] == "published" else []:
        published = published_heads(model)
        for head in sorted(needed):
            last, after = head, None
            while last not in published and origin_of(config["heads"][last]):
                last, after = origin_of(config["heads"][last]), last
            if last not in published:
                raise EesdError(
                    f"Configuration, run.heads: no published head '{head}' for model {model} (published: "
                    f"{', '.join(published) or 'none'}). Set it to train, or let what runs use heads that are "
                    "published, as config/best.yaml does, or go on from one (`init`)."
                )
            _check_taken(config, model, last)
            if after:
                _check_kept(config, model, last, after)


def _check_taken(config: Mapping[str, Any], model: str, head: str) -> None:
    """A published head answers to its name: what it is must be what the configuration says."""
    found, said = head_settings(config, model, head), config["heads"][head]
    for key in ("kind", "exit_layer", "context", "vocab_rows", "vocabulary"):
        if key in found and found[key] != said[key]:
            raise EesdError(
                f"Configuration, heads.{head}: {key} is {said[key]}, but the published head has {found[key]}. "
                f"Set {key} to {found[key]}, set run.heads to train, or give this head another name."
            )


def _check_kept(config: Mapping[str, Any], model: str, head: str, after: str) -> None:
    found, own = head_settings(config, model, head), config["heads"][after]
    for key in kept(own):
        if found[key] != own[key]:
            raise EesdError(
                f"Configuration, heads.{after}.{key}: is {own[key]}, but the published '{head}', which it goes on "
                f"from, has {found[key]}. Set {key} of both to {found[key]}."
            )
