"""Other libraries as method rows: what users would run without this suite.

    hf_generate: {peer: hf_generate}
    hf_lookup: {peer: hf_generate, generation: {prompt_lookup_num_tokens: 10, max_matching_ngram_size: 2}}
    hf_early_exit: {peer: hf_generate, generation: {assistant_early_exit: 4, num_assistant_tokens: 4}}

`generation` holds options of `transformers.GenerationConfig` under their own names; what is left out has that library's
default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from eesd.decoding.generate import Generation, OnTokens, Round
from eesd.decoding.sampling import Sampling
from eesd.registry import Registry

# Either of these makes `generate` draft and verify.
DRAFTING = ("prompt_lookup_num_tokens", "assistant_early_exit")


@lru_cache(maxsize=1)
def _load(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model, once for all methods of a group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


class HuggingFaceGenerate:
    """`transformers` generate as it comes (not compiled, dynamic cache) on the same weights, dtype and threads."""

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        sampling: Sampling,
        eos: Collection[int],
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = _load(model_dir, dtype)
        self.sampling, self.eos, self.options = sampling, sorted(eos), dict(generation or {})
        self.drafts = any(key in self.options for key in DRAFTING)

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], seed: int, max_new_tokens: int, on_tokens: OnTokens | None = None
    ) -> Generation:
        """Continue one prompt; only the total time is known, and rounds only if the options draft.

        A draft that is verified in the same pass as the prompt is no round, although its tokens are in the output.
        """
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        # Or fields left open, such as a repetition penalty, would be filled from the model's folder: another law. The
        # settings of an assistant, which here is the model itself, are read from this place only.
        self.model.generation_config = GenerationConfig(
            **{key: value for key, value in self.options.items() if key not in DRAFTING}
        )
        passes = _Passes()
        with _watched(self.model, passes) if self.drafts else nullcontext():
            began = perf_counter()
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config(max_new_tokens),
                **({"streamer": passes} if self.drafts else {}),
            )
            tokens = output[0, len(prompt) :].tolist()
            seconds = {"total": perf_counter() - began}
        if on_tokens:
            on_tokens(tokens, "target")
        return Generation(tokens, passes.rounds(), "eos" if tokens[-1] in self.eos else "length", seconds)

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        common = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.eos,
            "pad_token_id": self.eos[0] if self.eos else 0,
            **self.options,
        }
        if self.sampling.greedy:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            **common,
        )


class _Passes(BaseStreamer):
    """Counts the tokens that go into and come out of every pass through all layers."""

    def __init__(self) -> None:
        self.fed: list[int] = []
        self.settled: list[int] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then what every pass settled."""
        self.settled.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""

    def rounds(self) -> list[Round]:
        """Every pass but the first: the last settled token is fed with the draft, and one token is the target's own."""
        pairs = zip(self.fed[1:], self.settled[2:], strict=True)
        return [Round(fed - 1, settled - 1, "peer") for fed, settled in pairs]


@contextmanager
def _watched(model: PreTrainedModel, passes: _Passes) -> Iterator[None]:
    """Count the model's passes through all of its layers; an early exit lowers the number of layers for a draft."""
    depth = model.config.num_hidden_layers

    def count(module: PreTrainedModel, _: Any, arguments: dict[str, Any]) -> None:
        if module.config.num_hidden_layers == depth:
            passes.fed.append(arguments["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


PEERS: Registry[type[HuggingFaceGenerate]] = Registry("peer")
PEERS.register("hf_generate")(HuggingFaceGenerate)
