"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): several heads guess the next tokens at once from one state.

All heads read the target's normalised final state that predicted the pending token, which verification leaves behind:
head j guesses the j-th token after the pending one without running a layer of the target. Each is a residual block
h + SiLU(W h + b) and an output head; W and b start at zero, so every head starts as the target's own output head. Only
the heads are trained (Medusa-1). Unlike in the paper, they may draft only a trimmed vocabulary.

    medusa: {drafter: medusa, head: medusa4, controller: {name: static, k: 4}}
    medusa_tree: {drafter: medusa, head: medusa4, tree: {nodes: 15}, controller: {name: static, k: 4}}

As no token depends on the one before, a tree takes the best candidates of every head in fixed combinations
(eesd/drafting/medusa_tree.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eesd.drafting.base import DRAFTERS, TEXT_BATCH, Draftable, Drafter, Growable, Prompt, Verified
from eesd.drafting.stored import fill_head, read_head
from eesd.errors import EesdError
from eesd.models.special import fingerprint
from eesd.models.transformer import Transformer, head_logits, linear

if TYPE_CHECKING:
    from eesd.models.engine import Engine
    from eesd.models.graphs import GraphEngine


class MedusaHeads(nn.Module):
    """`heads` residual blocks, each with its own output head over `rows` tokens, or one for all where it is tied.

    token_ids [rows]: the token of every row, most frequent first; None means all `vocab_size` tokens in their own
    order.
    """

    def __init__(self, size: int, vocab_size: int, token_ids: Tensor | None, heads: int, tied: bool = False) -> None:
        super().__init__()
        rows = vocab_size if token_ids is None else len(token_ids)
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(heads))
        self.outputs = nn.ModuleList(nn.Linear(size, rows, bias=False) for _ in range(1 if tied else heads))
        self.register_buffer("token_ids", token_ids)

    def __len__(self) -> int:
        return len(self.blocks)

    def logits(self, states: Tensor, head: int) -> Tensor:
        """Draft logits [.., rows] of head 0, 1 .. for normalised final states [.., hidden]."""
        block, output = self.blocks[head], self.outputs[min(head, len(self.outputs) - 1)]
        return head_logits(states + F.silu(linear(states, block.weight) + block.bias), None, output.weight)


def load_medusa_heads(path: Path | str, target: Transformer, model: str) -> tuple[MedusaHeads, dict[str, Any]]:
    """The heads in a folder and their card, ready to draft for this target; EesdError as in `read_head`."""
    card, tensors = read_head(path, "medusa", target, model)
    ids, tied = tensors.get("token_ids"), "outputs.0.weight" not in tensors
    count = sum(name.startswith("blocks.") and name.endswith(".weight") for name in tensors)
    with torch.device("meta"):
        heads = MedusaHeads(target.config.hidden_size, target.config.vocab_size, ids, count, tied)
    if tied:
        tensors["outputs.0.weight"] = target.head_weight if ids is None else target.head_weight[ids]
    fill_head(heads, tensors, target, path)
    return heads, card


@DRAFTERS.register("medusa")
class MedusaDrafter(Drafter):
    """Drafts the chain of every head's most probable (or drawn) token, or a tree of their best candidates."""

    def __init__(
        self, heads: MedusaHeads, card: Mapping[str, Any] | None = None, engine: Engine | GraphEngine | None = None
    ) -> None:
        self.heads, self.card = heads, card
        self.vocabulary = heads.token_ids
        with torch.no_grad():
            self.weight = torch.cat([block.weight for block in heads.blocks])
            self.bias = torch.stack([block.bias for block in heads.blocks])
        if engine:
            for weight in (self.weight, *(output.weight for output in heads.outputs)):
                engine.pack(weight)

    @classmethod
    def build(cls, settings: Mapping[str, Any], target: Transformer, model_dir: Path) -> MedusaDrafter:
        """Load the heads in folder `head_path`."""
        if "head_path" not in settings:
            raise EesdError("Drafter medusa needs trained heads. Add `head: <name of a head>` to the method.")
        return cls(*load_medusa_heads(settings["head_path"], target, fingerprint(model_dir)), target.engine)

    def begin(self, prompt: Prompt) -> None:
        """Keep the state that predicts the first token."""
        self.target = prompt.target
        self.state = self.target.norm(prompt.final[0, -1:])

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        """One head after the other, until the chain stops or the heads end; nothing is shared with verification."""
        for logits in self._logits(self.state):
            if chain.stop:
                break
            chain.extend(logits[0], self.vocabulary)

    def draft_tree(self, tree: Growable, slot: int) -> None:
        """One head for every level: whatever the nodes before, its candidates are the same."""
        for logits in self._logits(self.state):
            if tree.stop:
                break
            tree.grow(logits, self.vocabulary)

    def _logits(self, states: Tensor) -> Iterator[Tensor]:
        """Draft logits [n, rows] of head after head for normalised final states [n, hidden].

        The blocks are one product. So are the outputs where all heads share one, whose rows are then read once; others
        are read for the heads that are asked alone.
        """
        moved = linear(states, self.weight).unflatten(-1, self.bias.shape) + self.bias
        each = (states[:, None] + F.silu(moved)).transpose(0, 1).contiguous()
        outputs = [output.weight for output in self.heads.outputs]
        if len(outputs) == 1:
            yield from head_logits(each, None, outputs[0])
        else:
            for one, output in zip(each, outputs, strict=True):
                yield head_logits(one, None, output)

    def accept(self, verified: Verified) -> None:
        """Keep the state that predicted the target's own token, which is the next pending one."""
        self.state = self.target.norm(verified.final[0, verified.accepted : verified.accepted + 1])

    def draft_text(
        self, target: Transformer, tokens: Sequence[int], prompt_tokens: int, chains: Sequence[Draftable]
    ) -> None:
        """As in the base class, from one pass over the text."""
        text = torch.tensor([tokens], device=target.device)
        final = target.run(target.embed(text), slice(None), target.new_cache(len(tokens)))
        # Of the position before each pending token.
        states = target.norm(final[0, prompt_tokens - 1 :])
        for first in range(0, len(chains), TEXT_BATCH):
            block = chains[first : first + TEXT_BATCH]
            for logits in self._logits(states[first : first + len(block)]):
                for chain, row in zip(block, logits, strict=True):
                    if not chain.stop:
                        chain.extend(row, self.vocabulary)
