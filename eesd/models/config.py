"""The shape of a target model, read from a Hugging Face configuration.

    ModelConfig.from_hf(AutoConfig.from_pretrained("resources/models/smollm2-135m")).num_layers  # 30

Llama, Llama-2, CodeLlama, Vicuna, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3 differ only in these fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eesd.errors import EesdError, unknown

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder; sizes in elements, `window` in tokens (None: full attention)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    window: int | None = None

    @classmethod
    def from_hf(cls, hf: Any) -> ModelConfig:
        """Read a `transformers` configuration; EesdError for an architecture that is not this decoder."""
        kind = hf.model_type
        if kind not in ARCHITECTURES:
            raise unknown("model architecture", kind, ARCHITECTURES)
        _refuse_variants(hf)
        rope = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
        attention_bias = bool(getattr(hf, "attention_bias", False))
        found = cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            max_positions=hf.max_position_embeddings,
            norm_eps=hf.rms_norm_eps,
            rope_theta=float(rope.pop("rope_theta", None) or getattr(hf, "rope_theta", 10000.0)),
            rope_scaling=rope,
            qkv_bias=attention_bias or kind == "qwen2",
            output_bias=attention_bias and kind in ("llama", "qwen3"),
            qk_norm=kind == "qwen3",
            tied_head=bool(hf.tie_word_embeddings),
            window=_sliding_window(hf),
        )
        rope_frequencies(found)  # now, not in the middle of a run
        return found

    def check_exit_layer(self, layer: int) -> None:
        """EesdError unless the model can be cut after `layer` layers with some left on both sides."""
        if not 1 <= layer < self.num_layers:
            raise EesdError(f"exit_layer must lie between 1 and {self.num_layers - 1} for this model, not {layer}.")


def _refuse_variants(hf: Any) -> None:
    if getattr(hf, "mlp_bias", False):
        raise EesdError("Models with biases in the MLP (mlp_bias: true) are not supported.")
    if getattr(hf, "hidden_act", "silu") != "silu":
        raise EesdError(f"Activation '{hf.hidden_act}' is not supported; this decoder is SwiGLU (silu).")


def _sliding_window(hf: Any) -> int | None:
    """The attention window that all layers share, or None. Qwen keeps the key but switches it off."""
    kinds = set(getattr(hf, "layer_types", None) or [])
    if kinds == {"full_attention", "sliding_attention"}:
        raise EesdError("Models that mix full and sliding-window layers are not supported.")
    if kinds == {"full_attention"} or not getattr(hf, "use_sliding_window", True):
        return None
    return getattr(hf, "sliding_window", None)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse RoPE frequencies [head_dim / 2] in float32, scaled as `default`, `linear` or `llama3` say.

    `llama3` (Llama 3.1 report): wavelengths beyond `original / low_freq_factor` are stretched by `factor`,
    those under `original / high_freq_factor` kept, and those between interpolated. EesdError for another scaling;
    transformers refuses one that lacks a value.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    raise unknown("RoPE scaling", kind, ("default", "linear", "llama3"))
