"""The early-exit drafter of EESD (arXiv 2406.03853): the target's first N layers, one trained layer, norm and head.

Drafting runs the first N target layers on every drafted token and keeps their states, so verification starts at layer
N and no layer runs twice on a token. The exit layer has a key-value cache of its own; it holds states of accepted
tokens only once a round is over, so what is drafted depends on the accepted prefix alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eesd.drafting.base import DRAFTERS, Draftable, Drafter, Prompt, Verified
from eesd.errors import EesdError
from eesd.models.cache import KVCache
from eesd.models.config import ModelConfig
from eesd.models.special import fingerprint
from eesd.models.transformer import Layer, RMSNorm, Rotary, Transformer, head_logits, run_layers


class ExitHead(nn.Module):
    """One transformer layer, a norm and an output head over `rows` tokens of the vocabulary.

    token_ids [rows]: the token of every row, in increasing order; None means all tokens in their own order.
    """

    def __init__(self, config: ModelConfig, token_ids: Tensor | None) -> None:
        super().__init__()
        rows = config.vocab_size if token_ids is None else len(token_ids)
        self.layer = Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, rows, bias=False)
        self.register_buffer("token_ids", token_ids)

    def forward(self, states: Tensor, rotary: Rotary) -> Tensor:
        """States after N layers [batch, seq, hidden] -> states before norm and head, causal over the sequence."""
        return run_layers([self.layer], rotary, states, [None])

    def step(self, states: Tensor, rotary: Rotary, cache: KVCache, slot: int) -> Tensor:
        """Process states [1, n, hidden] at cache slots from `slot` on; draft logits [rows] after the last one."""
        hidden = run_layers([self.layer], rotary, states, [cache.layer(0)], slot)
        return head_logits(hidden[:, -1], self.norm, self.head.weight)[0]


def load_exit_head(path: Path | str, target: Transformer, model: str) -> tuple[ExitHead, dict[str, Any]]:
    """Read `head.safetensors` and `card.json` from a folder, in the target's dtype and on its device.

    Raises EesdError when files are missing or the head was trained for another model than that of fingerprint `model`.
    """
    path = Path(path)
    try:
        card = json.loads((path / "card.json").read_text())
        tensors = load_file(path / "head.safetensors", device=str(target.device))
    except FileNotFoundError as error:
        raise EesdError(
            f"{path}: no trained head here. Train it with `snakemake --cores all {path}/head.safetensors`."
        ) from error
    if card["fingerprint"] != model:
        raise EesdError(
            f"{path}: this head was trained for a model with fingerprint {card['fingerprint']}, "
            f"but the target's is {model}. Train a head for this model."
        )
    with torch.device("meta"):
        head = ExitHead(target.config, tensors.get("token_ids"))
    weights = {name: t if name == "token_ids" else t.to(target.dtype) for name, t in tensors.items()}
    head.load_state_dict(weights, assign=True)
    head.requires_grad_(False).eval()
    if target.engine:
        target.engine.pack(head.layer)
        target.engine.pack(head.head.weight)
    return head, card


@DRAFTERS.register("exit_head")
class ExitHeadDrafter(Drafter):
    """Drafts a chain with a trained exit head on the target's first `exit_layer` layers."""

    def __init__(self, head: ExitHead, exit_layer: int) -> None:
        self.head = head
        self.exit_layer = exit_layer
        self.vocabulary = head.token_ids
        self.cache: KVCache | None = None

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> ExitHeadDrafter:
        """Load the head in folder `head_path`; its card says at which layer it exits."""
        if "head_path" not in settings:
            raise EesdError("Drafter exit_head needs a trained head. Add `head: <name of a head>` to the method.")
        head, card = load_exit_head(settings["head_path"], target, fingerprint(model_dir))
        return cls(head, card["exit_layer"])

    def begin(self, prompt: Prompt) -> None:
        """Fill the exit layer's cache with the prompt."""
        self.target, self.target_cache = prompt.target, prompt.cache
        if self.cache is None or self.cache.capacity < prompt.cache.capacity:
            self.cache = prompt.target.new_cache(prompt.cache.capacity, num_layers=1)
        run_layers([self.head.layer], prompt.target.rotary, prompt.states, [self.cache.layer(0)], 0)
        # States of accepted tokens that the exit layer has not seen yet: [1, n, hidden].
        self.unseen = prompt.states[:, :0]

    def draft(self, chain: Draftable, pending: int, slot: int) -> Tensor | None:
        """One target pass of N layers and one exit-layer step for every drafted token."""
        # Filled on the device: copying a number there would wait for it.
        states, token = [], torch.full((1, 1), pending, device=self.target.device)
        while not chain.stop:
            state = self.target.run(self.target.embed(token), slice(0, self.exit_layer), self.target_cache, slot)
            states.append(state)
            fresh = torch.cat((self.unseen, state), 1)
            self.unseen = state[:, :0]
            logits = self.head.step(fresh, self.target.rotary, self.cache, slot + 1 - fresh.shape[1])
            token, slot = chain.extend(logits, self.vocabulary).view(1, 1), slot + 1
        return torch.cat(states, 1) if states else None

    def accept(self, verified: Verified) -> None:
        """The last drafted token is the one the exit layer has not processed; it matters only if it was accepted."""
        if verified.accepted == len(verified.drafted):
            self.unseen = torch.cat((self.unseen, verified.states[:, -1:]), 1)
