"""Early exit without training: the target's own norm and head on the states after its first N layers.

The self-speculative decoding of LayerSkip (arXiv 2404.16710) on a model that was not trained for it. Drafting and
verification share the first N layers and their cache; nothing is added to the model, and no layer runs
twice on a token.

    early_exit: {drafter: early_exit, exit_layer: 24, controller: {name: static, k: 4}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eesd.drafting.base import DRAFTERS, Draftable, Drafter, Prompt
from eesd.models.passes import Passes
from eesd.models.transformer import Transformer


@DRAFTERS.register("early_exit")
class EarlyExitDrafter(Drafter):
    """Drafts a chain with the target's first `exit_layer` layers, norm and head."""

    def __init__(self, exit_layer: int) -> None:
        self.exit_layer = exit_layer

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> EarlyExitDrafter:
        """Needs `exit_layer`."""
        target.config.check_exit_layer(settings["exit_layer"])
        return cls(settings["exit_layer"])

    def begin(self, prompt: Prompt) -> None:
        """The prompt's keys and values of the first layers are in the target's cache already."""
        self.passes = Passes(prompt.target, prompt.cache, layers=list(prompt.target.layers)[: self.exit_layer])

    def draft(self, chain: Draftable, pending: int, slot: int) -> Tensor | None:
        """One target pass of N layers and the full head for every drafted token."""
        states, token = [], pending
        while not chain.stop:
            found = self.passes.run([token], None, slot)
            states.append(found.final)
            token, slot = chain.extend(found.logits[0]), slot + 1
        return torch.cat(states, 1) if states else None
