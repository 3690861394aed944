"""Other libraries as method rows: what users would run without this suite."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from eesd.decoding.generate import Generation, OnTokens
from eesd.decoding.sampling import Sampling
from eesd.registry import Registry


class HuggingFaceGenerate:
    """`transformers` generate as it comes (not compiled, dynamic cache) on the same weights, dtype and threads."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, sampling: Sampling, eos: Collection[int]) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
        self.model = model.to(device).eval()
        # Or fields left open, such as a repetition penalty, would be filled from the model's folder: another law.
        self.model.generation_config = GenerationConfig()
        self.sampling, self.eos = sampling, sorted(eos)

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], seed: int, max_new_tokens: int, on_tokens: OnTokens | None = None
    ) -> Generation:
        """Continue one prompt; rounds are unknown, and only the total time is."""
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        began = perf_counter()
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=self._config(max_new_tokens)
        )
        tokens = output[0, len(prompt) :].tolist()
        seconds = {"total": perf_counter() - began}
        if on_tokens:
            on_tokens(tokens, "target")
        return Generation(tokens, [], "eos" if tokens[-1] in self.eos else "length", seconds)

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        common = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.eos,
            "pad_token_id": self.eos[0] if self.eos else 0,
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


PEERS: Registry[type[HuggingFaceGenerate]] = Registry("peer")
PEERS.register("hf_generate")(HuggingFaceGenerate)
