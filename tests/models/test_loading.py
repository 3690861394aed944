"""Loading and the decoder itself, against `transformers` in float32 on tiny random models of every supported kind."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from eesd.errors import EesdError
from eesd.models.kernels import multiplies_bfloat16
from eesd.models.loading import convert, load_config, load_state, load_target, load_tokenizer
from eesd.models.transformer import Transformer
from tests.toys import write_tiny_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS = {
    "llama_untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3_rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear_rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama_biases": LlamaConfig(**SIZES, attention_bias=True),
    "mistral_window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2_biases": Qwen2Config(**SIZES),
    "qwen3_qk_norm": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def make_reference(config: Any) -> Any:
    """A random `transformers` model with lively logits, non-trivial norms and non-zero biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of a few words."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "one", "two"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A saved tiny Llama with a tokenizer."""
    folder = tmp_path / "llama"
    make_reference(CONFIGS["llama_untied"]).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def full_logits(target: Transformer, tokens: Tensor) -> Tensor:
    """Logits of a whole sequence without a cache, cut after the first layer."""
    early = target.run(target.embed(tokens), slice(0, 1))
    return target.logits(target.run(early, slice(1, None)))


def cached_logits(target: Transformer, tokens: Tensor, cuts: list[int]) -> Tensor:
    """The same logits computed piece by piece with a cache."""
    cache = target.new_cache(tokens.shape[1])
    edges = [0, *cuts, tokens.shape[1]]
    pieces = []
    for start, end in pairwise(edges):
        hidden = target.run(target.embed(tokens[:, start:end]), slice(None), cache, slots=start)
        pieces.append(target.logits(hidden))
    return torch.cat(pieces, 1)


def greedy(target: Transformer, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation, token by token with a cache."""
    cache = target.new_cache(prompt.shape[1] + count)
    tokens, new, slot = [], prompt, 0
    for _ in range(count):
        hidden = target.run(target.embed(new), slice(None), cache, slots=slot)
        slot += new.shape[1]
        new = target.logits(hidden[:, -1:]).argmax(-1)
        tokens.append(new.item())
    return tokens


def check_against(reference: Any, target: Transformer, prompt: Tensor, count: int, tolerance: float = 1e-3) -> None:
    """Equal logits (uncached and cached in uneven pieces) and equal greedy tokens."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    logits = reference(expected).logits
    length = expected.shape[1]
    cuts = [length // 2, length // 2 + 1, length // 2 + 4]
    assert (full_logits(target, expected) - logits).abs().max() < tolerance
    assert (cached_logits(target, expected, cuts) - logits).abs().max() < tolerance
    assert greedy(target, prompt, count) == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_equals_transformers(name: str, tmp_path: Path):
    reference = make_reference(CONFIGS[name])
    reference.save_pretrained(tmp_path)
    target = load_target(tmp_path, "float32")
    prompt = torch.randint(3, SIZES["vocab_size"], (1, 24), generator=torch.Generator().manual_seed(1))
    check_against(reference, target, prompt, count=16)
    assert not any(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.slow
@torch.inference_mode()
def test_embedded_model_equals_transformers(embedded_model: Path):
    reference = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32, local_files_only=True).eval()
    message = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    tokenizer = load_tokenizer(embedded_model)
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    target = load_target(embedded_model, "float32")
    check_against(reference, target, prompt, count=7)
    assert tokenizer.decode(greedy(target, prompt, 7)) == "The capital of France is Paris."


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "auto"])
def test_dtypes(llama: Path, dtype: str):
    auto = "bfloat16" if multiplies_bfloat16() else "float32"
    assert load_target(llama, dtype).dtype == getattr(torch, {"auto": auto}.get(dtype, dtype))


def test_convert_casts_and_keeps_shards_and_side_files(llama: Path, tmp_path: Path):
    reference = make_reference(CONFIGS["llama_untied"])
    reference.save_pretrained(llama, max_shard_size="20KB")
    (llama / "model.safetensors").unlink()
    out = convert({"source": "directory", "path": str(llama), "dtype": "bfloat16"}, tmp_path / "models" / "mine")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "generation_config.json").exists()
    assert load_tokenizer(out).eos_token == "</s>"
    ours, theirs = load_state(out), reference.to(torch.bfloat16).state_dict()
    prefix = "model.layers.1.self_attn"
    fused = torch.cat([theirs[f"{prefix}.{part}_proj.weight"] for part in "qkv"])
    assert ours["layers.1.qkv.weight"].dtype == torch.bfloat16
    assert torch.equal(ours["layers.1.qkv.weight"], fused)


def test_convert_keeps_the_stored_format_unless_told_otherwise(llama: Path, tmp_path: Path):
    out = convert({"source": "directory", "path": str(llama), "dtype": None}, tmp_path / "mine")
    assert load_state(out)["norm.weight"].dtype == load_state(llama)["norm.weight"].dtype == torch.float32


def test_convert_replaces_a_model_but_nothing_else(llama: Path, tmp_path: Path):
    settings = {"source": "directory", "path": str(llama), "dtype": "float32"}
    out = convert(settings, tmp_path / "out")
    convert(settings, out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(EesdError, match="not a converted model"):
        convert(settings, tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").exists()


def test_a_failed_conversion_leaves_nothing(llama: Path, tmp_path: Path):
    (llama / "tokenizer.json").unlink()
    with pytest.raises(EesdError, match="no tokenizer files"):
        convert({"source": "directory", "path": str(llama), "dtype": "bfloat16"}, tmp_path / "models" / "mine")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "ggfu", "path": "x"}, "Unknown model source 'ggfu'. Did you mean 'gguf'?"),
        ({"source": "hub"}, "needs a 'path'"),
        ({"source": "directory", "path": "absent", "dtype": "bfloat61"}, "Did you mean 'bfloat16'"),
        ({"source": "directory", "path": "absent"}, "no config.json"),
        ({"source": "gguf", "path": "absent.gguf"}, "no such GGUF file"),
    ],
)
def test_bad_settings(settings: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(EesdError) as caught:
        convert(settings, tmp_path / "out")
    assert message in str(caught.value)


def test_unsupported_architectures_list_the_known_ones(tmp_path: Path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(EesdError, match=r"Unknown model architecture 'gpt2'.*Known: llama, mistral, qwen2, qwen3"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(EesdError, match="Did you mean 'llama'"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EesdError, match="not a usable model configuration"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "Unknown RoPE scaling 'yarn'"),
        ({"rope_type": "linear"}, "not a usable model configuration.*factor"),
    ],
)
def test_rope_scalings_are_refused_before_anything_runs(llama: Path, scaling: dict[str, Any], message: str):
    path = llama / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 10000.0, **scaling}}))
    with pytest.raises(EesdError, match=message):
        load_config(llama)


def test_weights_that_do_not_fit_are_named(llama: Path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(EesdError, match=r"Missing tensors: model\.layers\.3\.\S+.* and 5 more"):
        load_state(llama)
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(EesdError, match=r"Missing tensors: none\. Unexpected tensors: model\.layers\.2"):
        load_state(llama)
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(EesdError, match=r"gate_up\.weight has shape \[128, 32\], but config\.json implies \[160, 32\]"):
        load_target(llama)


def test_only_complete_safetensors_are_loaded(llama: Path):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EesdError, match="damaged safetensors file"):
        load_state(llama)
    weights.rename(llama / "pytorch_model.bin")
    with pytest.raises(EesdError, match=r"pytorch_model\.bin can run code when loaded and is refused"):
        load_state(llama)
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(EesdError, match=r"lists files that are not there: model-1\.safetensors"):
        load_state(llama)


def test_a_few_layers_can_be_loaded_alone(tmp_path: Path):
    """What head training needs of a model that does not fit: these layers, norms, embedding and head."""
    folder = write_tiny_model(tmp_path / "tiny")
    whole, part = load_target(folder, "float32"), load_target(folder, "float32", layers=(1, 3))
    for index in (1, 3):
        for name, weight in whole.layers[index].state_dict().items():
            assert torch.equal(part.layers[index].state_dict()[name], weight)
    assert torch.equal(part.head_weight, whole.head_weight)
    assert next(part.layers[0].parameters()).device.type == "meta"
