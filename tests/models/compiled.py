"""Compile what `fused` would launch for GPUs that are not here: `python -m tests.models.compiled ARCH SHARED_BYTES`.

Prints, as JSON, every kernel in the order of launches, with the bytes of shared memory it asks for. A process of its
own, because Triton's interpreter, in which the tests run kernels, is switched on for a whole process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as build
from triton.runtime.jit import JITFunction

from eesd.models import fused
from eesd.models.config import ModelConfig
from eesd.models.shapes import SHAPES
from eesd.models.transformer import LayerCaches, Transformer

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}
WIDE = ModelConfig(640, 2048, 4096, 1, 8, 4, 256, 4096, window=512, qkv_bias=True, output_bias=True)


def main(arch: int, shared: int) -> None:
    """Compile all kernels of one layer and head of each model, of one token and of a tree of 20, in a long context."""
    target, made = GPUTarget("cuda", arch, 32), []

    def run(kernel: JITFunction, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = kernel.arg_names
        values = {**dict(zip(names, given, strict=False)), **{k: v for k, v in options.items() if k in names}}
        fixed = {param.name for param in kernel.params if param.is_constexpr}
        signature = {name: "constexpr" if name in fixed else _type(values[name]) for name in names}
        constants = {(names.index(name),): values[name] for name in fixed}
        # As on the device: numbers and addresses that 16 divides allow wider reads.
        free = [name for name in names if name not in fixed and name not in kernel.do_not_specialize]
        even = [name for name in free if isinstance(values[name], Tensor) or values[name] % 16 == 0]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
        source = ASTSource(kernel, signature, constants, attributes)
        options = {name: value for name, value in options.items() if name not in names}
        done = build(source, target=target, options=options)
        made.append([kernel.__name__, done.metadata.shared])

    JITFunction.run = run
    fused._shared_memory = lambda device: shared
    fused._early = lambda device: {"EARLY": True, "launch_pdl": True} if arch >= 90 else {"EARLY": False}
    for shape in (SHAPES["llama-2-7b"], SHAPES["smollm2-135m"], WIDE):
        with torch.device("meta"), torch.inference_mode():
            whole = Transformer(shape).to(torch.bfloat16)
            cache = whole.new_cache(4096, num_layers=1)
            caches, angles = (
                LayerCaches(cache.keys, cache.values),
                torch.empty(2, 4096, shape.head_dim, dtype=whole.dtype),
            )
            for rows, places in ((1, (1, None)), (20, (20, torch.empty(1, 1, 20, 4096, dtype=torch.bool)))):
                slots = torch.empty(1, places[0], dtype=torch.long)
                hidden = torch.empty(1, rows, shape.hidden_size, dtype=whole.dtype)
                fused.run_layers(whole.layers[:1], hidden, tuple(angles), caches, slots, slots, places[1], 4096)
                fused.head_logits(hidden, whole.norm, whole.head_weight)
    print(json.dumps(made))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
