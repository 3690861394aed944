"""Toy models and drafters: milliseconds each, with known behaviour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from eesd.control import make_controller
from eesd.decoding.sampling import Sampling
from eesd.decoding.tree import Branching, Candidate, Tree
from eesd.drafting.base import Draftable, Drafter, Prompt
from eesd.drafting.exit_head import ExitHead, ExitHeadDrafter
from eesd.drafting.medusa import MedusaDrafter, MedusaHeads
from eesd.models.config import ModelConfig
from eesd.models.kernels import BuildError, find_compiler
from eesd.models.transformer import Transformer

VOCAB = 50


def _has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except BuildError:
        return False


# Where there is a compiler, an engine that cannot be built is a failure and no reason to skip.
needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler: none of $CXX, g++, c++, clang++")


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 256,
    }
    return ModelConfig(**{**sizes, **changes})


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    """A random target whose greedy output varies: weights are large enough to matter."""
    torch.manual_seed(seed)
    target = Transformer(tiny_config(**changes))
    for weight in target.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)
    return target.to(dtype).requires_grad_(False).eval()


def tiny_head(
    target: Transformer, rows: int | None = None, seed: int = 1, lens: bool = False, deep: bool = False
) -> ExitHead:
    """An exit head that starts as the target's last layer, norm and head, over the first `rows` tokens.

    What `lens` and `deep` add is noise that changes some of its predictions.
    """
    torch.manual_seed(seed)
    head = ExitHead(target.config, None if rows is None else torch.arange(rows), lens, deep)
    for weight in head.parameters():
        weight.data.normal_(0, 0.03)
    if lens:
        head.estimate.weight.data[:, -target.config.hidden_size :] += torch.eye(target.config.hidden_size)
    head.layer.load_state_dict(target.layers[-1].state_dict())
    head.norm.load_state_dict(target.norm.state_dict())
    head.head.weight.data.copy_(target.head_weight[: rows or target.config.vocab_size])
    return head.to(target.dtype).requires_grad_(False).eval()


def exit_drafter(
    target: Transformer, exit_layer: int = 3, rows: int | None = None, lens: bool = False, deep: bool = False
) -> ExitHeadDrafter:
    """With exit_layer = 3 of 4 and all rows the plain drafter is the target itself, so it is always right."""
    return ExitHeadDrafter(tiny_head(target, rows, 1, lens, deep), exit_layer)


def medusa_drafter(
    target: Transformer, rows: int | None = None, heads: int = 3, tied: bool = False, seed: int = 1
) -> MedusaDrafter:
    """Medusa heads that start as the target's own output head, with noise in their residual blocks."""
    torch.manual_seed(seed)
    config = target.config
    module = MedusaHeads(
        config.hidden_size, config.vocab_size, None if rows is None else torch.arange(rows), heads, tied
    )
    for weight in module.parameters():
        weight.data.normal_(0, 0.1)
    for output in module.outputs:
        output.weight.data.copy_(target.head_weight[: rows or config.vocab_size])
    return MedusaDrafter(module.to(target.dtype).requires_grad_(False).eval())


def planted_tree(shape: Sequence[tuple[int, int]], sampling: Sampling | None = None, **branching) -> Tree:
    """A tree made by hand: (parent, token) of every node, all of them kept."""
    controller = make_controller({"name": "static", "k": 9})
    tree = Tree(Branching(len(shape), **branching), 0, controller, 9, sampling or Sampling(), torch.Generator())
    for parent, token in shape:
        tree._add(Candidate(-1.0 * len(tree.tokens), 0.5, parent, token, 0, 0))
    tree.kept = list(range(1, len(shape) + 1))
    return tree


class ScriptedDrafter(Drafter):
    """Drafts from a known continuation, shifted by `error`: 0 is always right, 1 always wrong."""

    def __init__(self, prompt: Sequence[int], continuation: Sequence[int], error: int = 0) -> None:
        self.script, self.error = [*prompt, *continuation], error

    def begin(self, prompt: Prompt) -> None:
        self.vocab_size = prompt.target.config.vocab_size

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        while not chain.stop:
            slot += 1
            # Past the script any token will do.
            token = (self.script[slot] if slot < len(self.script) else 0) + self.error
            logits = torch.full((self.vocab_size,), -50.0)
            logits[token % self.vocab_size] = 50.0
            chain.extend(logits)


class SilentDrafter(Drafter):
    """Never has anything to propose."""

    def begin(self, prompt: Prompt) -> None:
        pass

    def draft(self, chain: Draftable, pending: int, slot: int) -> None:
        pass


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of a few thousand weights with a byte tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{symbol: i for i, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def corpus_settings(data_dir: Path | str, **changes) -> dict:
    """Settings of a corpus of short ASDiv answers with the states after layer 2, as the workflow would resolve them."""
    settings = {
        "tasks": ["asdiv"],
        "train_answers": 12,
        "train_answers_by_task": {},
        "calibration_answers": 4,
        "evaluation_answers": 4,
        "tokens": None,
        "max_new_tokens": 10,
        "max_prompt_tokens": 400,
        "text": "generated",
        "states": "stored",
        "temperatures": [0.0],
        "batch": 4,
        "seed": 0,
        "exit_layers": [2],
        "labels": "answers",
        "dtype": "float32",
        "resources": "resources",
        "data_dir": str(data_dir),
    }
    return {**settings, **changes}


def write_tiny_data(folder: Path, rows: int = 40) -> Path:
    """A `data_dir` with short ASDiv rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"passage": f"Ann has {i} nuts.", "question": "How many?", "answer": f"{i} (nuts)"})
        for i in range(rows)
    ]
    (folder / "asdiv.jsonl").write_text("\n".join(lines))
    return folder
