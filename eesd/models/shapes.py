"""Models that are only a shape: random weights, to learn what decoding costs where no checkpoint is at hand.

    target = random_target(SHAPES["llama-2-13b"], torch.bfloat16, "cuda")

A shape too large for the device is built from as many distinct layers as fit, repeated until the model has all its
layers; together they exceed every cache, so each pass reads as many bytes from memory as the real model would.
"""

from __future__ import annotations

import torch
from torch import nn

from eesd.models.config import ModelConfig
from eesd.models.transformer import Transformer

SHAPES = {
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=100000.0, tied_head=True),
    "llama-2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "llama-2-13b": ModelConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "llama-2-70b": ModelConfig(32000, 8192, 28672, 80, 64, 8, 128, 4096),
}
# Distinct layers on a CPU: far beyond its last-level cache, and made in reasonable time.
DISTINCT_BYTES = 8e9
# Share of a GPU's free memory for them; embedding, heads, caches and graphs need the rest.
DISTINCT_SHARE = 0.7


def random_target(config: ModelConfig, dtype: torch.dtype, device: str, seed: int = 0) -> Transformer:
    """A target with random weights; its layers are distinct as far as memory allows, then they repeat."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        target = Transformer(config)
        layer_bytes = sum(p.numel() for p in target.layers[0].parameters()) * dtype.itemsize
    distinct = max(1, min(config.num_layers, int(_room(torch.device(device)) / layer_bytes)))
    layers = [random_module(target.layers[i], dtype, device) for i in range(distinct)]
    target.layers = nn.ModuleList(layers[i % distinct] for i in range(config.num_layers))
    for name in ("embedding", "norm", "head"):
        if getattr(target, name) is not None:
            setattr(target, name, random_module(getattr(target, name), dtype, device))
    return target.requires_grad_(False).eval()


def _room(device: torch.device) -> float:
    """Bytes that distinct layers may take."""
    return DISTINCT_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else DISTINCT_BYTES


def random_module(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """The module off the meta device: matrices small and random, norms 1, biases 0."""
    module = module.to(dtype).to_empty(device=device)
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.02)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module
