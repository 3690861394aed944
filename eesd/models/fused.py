"""Decoder layers of a GPU in seven kernels each, written in Triton, for up to 32 tokens at a time.

A decoding step is the time to read the weights, if nothing else comes between. Torch launches about eighteen kernels a
layer; here rotation, cache writes, gating and residual sums are done by the products that they concern:

    norm | q/k/v product, rotation, cache write | attention | output product, sum | norm | gate and up | down, sum

Beyond 256 slots of the cache attention is cut into parts, which another kernel puts together. Each kernel is launched
while the one before still runs, and asks for its first weights before it waits for its input.

Sums are the same whatever the number of tokens: products take blocks of 16 or 32 rows in one order of sums, and parts
of the cache start at fixed slots. So the numbers of a token depend neither on the tokens that go with it nor on the
free part of the cache, and verification of a chain of up to 31 drafted tokens gives vanilla's numbers bit for bit. Sums
are float32; what is kept between kernels has the model's dtype, logits float32.

Attention in parts: Dao et al. 2023, https://pytorch.org/blog/flash-decoding/. Launching early:
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from eesd.models import fused_kernels as kernels
from eesd.models.transformer import RMSNorm

if TYPE_CHECKING:
    from torch.nn import Linear

    from eesd.models.cache import LayerCache
    from eesd.models.transformer import Layer

VERSION = triton.__version__
# What Triton raises for kernels that a device or its compiler does not take.
FAILURES = (RuntimeError, TritonError)
DTYPES = (torch.bfloat16,)
# Rows of a block: the fewest that matrix units take.
ROWS = 16
# Beyond so many rows torch's products are faster.
MOST_ROWS = 128
# Cache slots that one program of the attention looks at, and those it looks at in one step.
PART = 256
STEP = 64
# Parts that are put together in one step.
PARTS = 16
# What a program asks for of its features (of gate and up, the gate's) before its input is there: times 128 bytes.
AHEAD = 4


def takes(layers: Sequence[Layer], dtype: torch.dtype) -> bool:
    """Whether the kernels compute these layers in this dtype."""
    return dtype in DTYPES and all(_fits(layer) for layer in layers)


def takes_head(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `head_logits` computes these states [.., hidden] and this head [outputs, hidden]."""
    few = 0 < hidden.numel() <= MOST_ROWS * hidden.shape[-1]
    return few and hidden.dtype in DTYPES and weight.dtype == hidden.dtype and weight.is_contiguous()


def _fits(layer: Layer) -> bool:
    config = layer.config
    dim = config.head_dim
    weights = (layer.qkv.weight, layer.o.weight, layer.gate_up.weight, layer.down.weight)
    return (
        not config.qk_norm
        and dim in (32, 64, 128, 256)
        and all(weight.is_contiguous() and weight.dtype in DTYPES for weight in weights)
    )


def run_layers(
    layers: Sequence[Layer],
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    caches: Sequence[LayerCache],
    slots: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    live: int,
) -> None:
    """Run layers that `takes` allows on `hidden` [1, rows, hidden], in place, with `live` slots of the caches in sight.

    angles: cos and sin [positions, head_dim] of `Rotary.table`. slots, positions: [1, 1], of the first token of a
    chain, mask None; or [1, rows], of a tree's tokens, with mask [1, 1, rows, live].
    """
    config, rows = layers[0].config, hidden.shape[1]
    queries, attended = (hidden.new_empty(rows, config.num_heads * config.head_dim) for _ in range(2))
    normal, gated = torch.empty_like(hidden), hidden.new_empty(rows, config.intermediate_size)
    chain = mask is None
    seen = slots if chain else mask.view(torch.uint8)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        if layer.runs_attention:
            _norm(hidden, layer.attn_norm, normal)
            _write_heads(layer, normal, angles, slots, positions, queries, keys, values, chain)
            _gather(layer, queries, keys, values, seen, slots, attended, live, chain)
            _add(attended, layer.o, hidden)
        if layer.runs_mlp:
            _norm(hidden, layer.mlp_norm, normal)
            outputs, size = config.intermediate_size, config.hidden_size
            grid, block = _cut(normal, outputs, size, 2)
            kernels.gate_up[grid](normal, layer.gate_up.weight, gated, rows, outputs, size, **block)
            _add(gated, layer.down, hidden)


def head_logits(hidden: Tensor, norm: RMSNorm | None, weight: Tensor) -> Tensor:
    """float32 logits [.., outputs] of states [.., hidden] behind a norm, if any, and a head [outputs, hidden]."""
    outputs, size = weight.shape
    rows, hidden = hidden.numel() // size, hidden.contiguous()
    out = hidden.new_empty(*hidden.shape[:-1], outputs, dtype=torch.float32)
    # Triton launches on the current device, wherever the tensors lie.
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        if norm is not None:
            hidden, given = torch.empty_like(hidden), hidden
            _norm(given, norm, hidden)
        grid, block = _cut(hidden, outputs, size, 1)
        kernels.logits[grid](hidden, weight, out, rows, outputs, size, **block)
    return out


def prepare(weight: Tensor) -> None:
    """Compile what `head_logits` needs for a head [outputs, hidden], which would else be done while decoding."""
    norm = RMSNorm(weight.shape[1], 1e-5).to(weight)
    for rows in (ROWS, 2 * ROWS):
        head_logits(weight.new_zeros(rows, weight.shape[1]), norm, weight)


def _norm(x: Tensor, norm: RMSNorm, out: Tensor) -> None:
    """out = norm(x), both [.., size]."""
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    kernels.normalise[(x.numel() // size,)](x, norm.weight, out, norm.eps, size, block, num_warps=4, **_early(x.device))


def _write_heads(
    layer: Layer,
    normal: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    chain: bool,
) -> None:
    """Heads of normalised states [1, rows, hidden]: queries [rows, heads * dim], keys and values into their caches."""
    config, bias, (rows, size) = layer.config, layer.qkv.bias, normal.shape[1:]
    heads, kv_heads, half = config.num_heads, config.num_kv_heads, config.head_dim // 2
    grid, block = _cut(normal, (heads + 2 * kv_heads) * half, size, 2, half)
    kernels.qkv[grid](
        normal, layer.qkv.weight, normal if bias is None else bias, *angles, slots, positions, queries, keys, values,
        rows, *keys.stride()[1:], *values.stride()[1:], heads, kv_heads, config.head_dim, size, chain,
        bias is not None, **block,
    )  # fmt: skip


def _gather(
    layer: Layer,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    slots: Tensor,
    attended: Tensor,
    live: int,
    chain: bool,
) -> None:
    """What queries [rows, heads * dim] see of the first `live` slots, into `attended` of the same shape.

    mask: of a tree, in bytes [1, 1, rows, live]; of a chain it is not read.
    """
    config, rows, parts = layer.config, len(queries), triton.cdiv(live, PART)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    out, sums, early = attended, attended, _early(queries.device)
    if parts > 1:
        out = attended.new_empty(parts, rows, heads, dim, dtype=torch.float32)
        sums = out.new_empty(2, parts, rows, heads)
    # Exponentials are powers of two: exp(x) = 2 ** (x log2 e).
    scale = 1.4426950408889634 * dim**-0.5
    stages = max(1, min(3, _shared_memory(queries.device) // (4 * STEP * dim)))
    kernels.attend[(triton.cdiv(rows * (heads // kv_heads), kernels.QUERIES.value), kv_heads, parts)](
        queries, keys, values, mask, slots, out, sums, rows, live, config.window or 0, mask.stride(-2), scale,
        *keys.stride()[1:], *values.stride()[1:], heads, kv_heads, dim, chain, config.window is not None, parts == 1,
        PART=PART, STEP=STEP, num_warps=4, num_stages=stages, **early,
    )  # fmt: skip
    if parts > 1:
        kernels.combine[(rows * heads,)](out, sums, attended, rows * heads, parts, dim, PARTS, num_warps=1, **early)


def _add(x: Tensor, linear: Linear, hidden: Tensor) -> None:
    """hidden [1, rows, outputs] += linear(x [rows, size])."""
    rows, (outputs, size), bias = len(x), linear.weight.shape, linear.bias
    grid, block = _cut(x, outputs, size, 1)
    kernels.add_product[grid](
        x, linear.weight, x if bias is None else bias, hidden, rows, outputs, size, bias is not None, **block
    )


@cache
def _early(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that is launched before its input is complete, where the device can (Hopper and later)."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def _cut(x: Tensor, outputs: int, size: int, parts: int, most: int = 128) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options of a product of rows x [.., size] with weights [outputs, size].

    parts: 2 where a program has two weights for a feature. most: features that a program may have.
    """
    rows = x.numel() // size
    block = ROWS if rows <= ROWS else 2 * ROWS
    tile = _tile(outputs, size, parts)
    tile["BLOCK_N"] = min(tile["BLOCK_N"], most)
    # Blocks on their way to a program lie in its shared memory, of which devices have different amounts.
    stage = 2 * tile["BLOCK_K"] * (block + parts * tile["BLOCK_N"])
    tile["num_stages"] = max(1, min(tile["num_stages"], _shared_memory(x.device) // stage))
    grid = triton.cdiv(rows, block), triton.cdiv(outputs, tile["BLOCK_N"])
    # Nothing is asked for beyond the end of the last feature.
    return grid, {**tile, "ROWS": block, "AHEAD": AHEAD if size >= 64 * AHEAD else 0, **_early(x.device)}


def _tile(outputs: int, size: int, parts: int) -> dict[str, int]:
    """How a product is cut: for the sizes of 135M and 7B models the fastest of sixty ways on an H200.

    Many small programs where there is little to read, long runs of memory where there is much (docs/decisions.md).
    """
    if parts == 2:
        tile = (32, 128, 4, 4) if size >= 1024 else (16, 64, 2, 4)
    elif size >= 1024:
        tile = (32, 256, 2, 3) if outputs >= 16384 else (16, 512, 2, 4)
    else:
        tile = (32, 64, 2, 4) if outputs >= 4096 else (16, 64, 4, 4)
    return dict(zip(("BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 17
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
