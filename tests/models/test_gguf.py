"""GGUF: a tiny Llama written as llama.cpp does comes back with the same logits; damaged files give one clear error."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from eesd.errors import EesdError
from eesd.models.gguf import check_gguf
from eesd.models.loading import convert, load_target, load_tokenizer

LAYERS, HEADS, KV_HEADS = 2, 4, 2
# Every byte as a token, then one merge and one special token: the smallest byte-level BPE.
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = [*BYTES, "on", "<|im_end|>"]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the interleaved order that llama.cpp stores for Llama."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, architecture: str = "llama", without: str = "-", rope: str | None = None) -> torch.nn.Module:
    """Write a random Llama with its MLP in Q8_0; return the model with the values that the file holds.

    Tensors whose name contains `without` are left out; `rope` is a RoPE scaling to claim.
    """
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["o n"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    if rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
        if without not in name:
            add_tensor(writer, names.get_name(name, try_suffixes=(".weight",)), parameter.data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return model


def add_tensor(writer: gguf.GGUFWriter, name: str, values: torch.Tensor) -> None:
    """Add one tensor; a quantised one is replaced in place by what can be read back."""
    array = values.numpy()
    if "ffn" in name and array.ndim == 2:
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(array, kind)
        array[:] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        return
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    writer.add_tensor(name, permuted(array, heads).copy() if heads else array)


@torch.inference_mode()
def test_gguf_is_dequantised_with_equal_logits(tmp_path: Path):
    reference = write_gguf(tmp_path / "tiny.gguf")
    settings = {"source": "gguf", "path": str(tmp_path / "tiny.gguf"), "dtype": "float32"}
    out = convert(settings, tmp_path / "tiny")
    target = load_target(out, "float32")
    tokens = torch.randint(0, len(TOKENS), (1, 20), generator=torch.Generator().manual_seed(0))
    logits = target.logits(target.run(target.embed(tokens), slice(None)))
    assert (logits - reference(tokens).logits).abs().max() < 1e-3
    tokenizer = load_tokenizer(out)
    assert tokenizer.tokenize("on  12") == ["on", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64


def test_damaged_files_give_one_clear_error(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    damages = {
        "empty": b"",
        "not gguf": b"PK" + content[2:],
        "header cut": content[:200],
        "tokens cut": content[:3000],
        "weights cut": content[:-1000],
        "zeroed header": content[:8] + bytes(200) + content[208:],
    }
    for name, damaged in damages.items():
        path.write_bytes(damaged)
        with pytest.raises(EesdError, match="not a complete GGUF model") as caught:
            convert({"source": "gguf", "path": str(path)}, tmp_path / "out")
        assert str(path) in str(caught.value), name
        assert not (tmp_path / "out").exists()


def test_missing_tensors_and_scaled_rope_are_refused(tmp_path: Path):
    write_gguf(tmp_path / "part.gguf", without="layers.1.mlp.up_proj")
    with pytest.raises(EesdError, match=r"not a complete GGUF model \(without model\.layers\.1\.mlp\.up_proj"):
        convert({"source": "gguf", "path": str(tmp_path / "part.gguf")}, tmp_path / "out")
    write_gguf(tmp_path / "long.gguf", rope="linear")
    with pytest.raises(EesdError, match="scaled RoPE"):
        check_gguf(tmp_path / "long.gguf")


def test_other_architectures_are_refused_before_loading(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", "mamba")
    with pytest.raises(EesdError, match=r"Unknown GGUF architecture 'mamba'.*Known: llama"):
        check_gguf(tmp_path / "tiny.gguf")
