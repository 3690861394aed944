"""Self-speculative decoding (Draft & Verify, arXiv 2309.08168): the target drafts for itself without some sublayers.

    self_sd: {drafter: self_sd, skips: default, controller: {name: draft_verify}}

Attention and MLP sublayers are left out separately; which ones is searched once for a model (`eesd skips`). A draft
step looks at the keys and values of the whole target for settled tokens, and writes its own, cheaper ones behind them
in the same cache; verification starts at layer 0 and overwrites these, so no draft outlives its round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eesd.drafting.base import DRAFTERS, Draftable, Drafter, Prompt
from eesd.errors import EesdError
from eesd.files import read_json
from eesd.models.passes import Passes
from eesd.models.special import fingerprint
from eesd.models.transformer import Layer, Transformer


@dataclass(frozen=True)
class Skips:
    """Layers whose attention, and layers whose MLP, a draft step leaves out."""

    attention: Collection[int] = ()
    mlp: Collection[int] = ()

    def layers(self, target: Transformer) -> list[Layer]:
        """All layers of the target with what is left of them, sharing its weights."""
        return [layer.keeping(i not in self.attention, i not in self.mlp) for i, layer in enumerate(target.layers)]

    def as_json(self) -> dict[str, list[int]]:
        """Two sorted lists."""
        return {name: sorted(layers) for name, layers in asdict(self).items()}


def load_skips(path: Path, model: str) -> Skips:
    """Read what `eesd skips` found; EesdError when it is missing, damaged or of a model of another fingerprint."""
    try:
        found = read_json(path, "Delete it and search again.")
    except FileNotFoundError as error:
        raise EesdError(f"{path}: no such file. Search it with `snakemake --cores all {path}`.") from error
    if found["fingerprint"] != model:
        raise EesdError(
            f"{path}: searched for a model with fingerprint {found['fingerprint']}, but the target's is {model}. "
            "Search again for this model."
        )
    return Skips(frozenset(found["attention"]), frozenset(found["mlp"]))


@DRAFTERS.register("self_sd")
class SelfSDDrafter(Drafter):
    """Drafts a chain with the target's own layers and head, some sublayers left out."""

    def __init__(self, target: Transformer, skips: Skips) -> None:
        self.target, self.layers = target, skips.layers(target)

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> SelfSDDrafter:
        """Needs `skips_path`, a file of `eesd skips`."""
        return cls(target, load_skips(Path(settings["skips_path"]), fingerprint(model_dir)))

    def begin(self, prompt: Prompt) -> None:
        """Nothing to prepare: drafts look at the target's own cache."""
        self.passes = Passes(self.target, prompt.cache, layers=self.layers)

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        """One pass of the remaining sublayers for every drafted token."""
        token = pending
        while not chain.stop:
            token, slot = chain.extend(self.passes.run([token], None, slot).logits[0]), slot + 1
