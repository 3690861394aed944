"""The Triton kernels: torch's numbers, of every row the same whatever goes with it.

Without a CUDA device they run in Triton's interpreter, in float32, since it multiplies no bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch, and with .[dev] on Linux")

from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.models import fused, graphs
from eesd.models.cache import KVCache
from eesd.models.engine import attach_engine
from eesd.models.graphs import GraphEngine, Rerun
from eesd.models.transformer import LayerCaches, Transformer
from tests.toys import exit_drafter, tiny_target

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
CAPACITY, PROMPT = 80, 30
SHAPES = {
    "llama": {"head_dim": 32},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "hidden_size": 96, "intermediate_size": 200},
    "biases": {"head_dim": 32, "qkv_bias": True, "output_bias": True},
    "window": {"head_dim": 32, "window": 20},
    "odd": {"head_dim": 64, "hidden_size": 40, "intermediate_size": 61, "vocab_size": 53},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several parts of the cache, several steps in each."""
    monkeypatch.setattr(fused, "DTYPES", (DTYPE,))
    monkeypatch.setattr(fused, "PART", 32)
    monkeypatch.setattr(fused, "PARTS", 2)
    monkeypatch.setattr(fused, "STEP", 16)
    with torch.inference_mode():
        yield


def toy(**shape: object) -> Transformer:
    return tiny_target(dtype=DTYPE, **shape).to(DEVICE)


def begun(target: Transformer) -> tuple[Tensor, KVCache, KVCache]:
    """States of a text before the first layer, and two caches that hold its first PROMPT tokens."""
    tokens = torch.randint(0, target.config.vocab_size, (1, CAPACITY), generator=torch.Generator().manual_seed(1))
    states, caches = target.embed(tokens.to(DEVICE)), []
    for _ in range(2):
        cache = target.new_cache(CAPACITY)
        target.run(states[:, :PROMPT], slice(None), cache, 0)
        caches.append(cache)
    return states, *caches


def run_fused(target: Transformer, states: Tensor, cache: KVCache, slot: int, live: int = CAPACITY) -> Tensor:
    start = torch.tensor([[slot]], device=DEVICE)
    angles, hidden = target.rotary.table(CAPACITY, DTYPE, target.device), states.clone()
    fused.run_layers(target.layers, hidden, angles, LayerCaches(cache.keys, cache.values), start, start, None, live)
    return hidden


def assert_close(found: Tensor, expected: Tensor, exact: Tensor | None = None) -> None:
    """Equal but for rounding: in half precision not much farther from `exact`, in float64, than torch is."""
    scale = float(expected.abs().max())
    if exact is None:
        assert float((found - expected).abs().max()) <= (2e-2 if CUDA else 1e-5) * scale
    else:
        assert float((found - exact).norm()) <= 2 * float((expected - exact).norm()) + 1e-5 * float(exact.norm())


def in_float64(target: Transformer, states: Tensor, rows: int, *places: Tensor) -> tuple[Tensor, KVCache]:
    """States after all layers of the `rows` tokens behind the prompt, and the cache, without rounding."""
    precise = deepcopy(target).double()
    cache = precise.new_cache(CAPACITY)
    precise.run(states[:, :PROMPT].double(), slice(None), cache, 0)
    return precise.run(states[:, PROMPT : PROMPT + rows].double(), slice(None), cache, *places or (PROMPT,)), cache


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 20])
def test_chains_have_the_numbers_of_torch(shape: str, rows: int) -> None:
    target = toy(**SHAPES[shape])
    assert fused.takes(target.layers, DTYPE)
    states, cache, other = begun(target)
    new = states[:, PROMPT : PROMPT + rows]
    expected = target.run(new, slice(None), cache, PROMPT)
    found = run_fused(target, new, other, PROMPT)
    exact, reference = in_float64(target, states, rows)
    assert_close(found, expected, exact)
    assert_close(other.keys, cache.keys, reference.keys)
    assert_close(other.values, cache.values, reference.values)
    assert_close(fused.head_logits(found, target.norm, target.head_weight), target.logits(found))
    assert_close(fused.head_logits(found[0, :1], None, target.head_weight), found[0, :1] @ target.head_weight.T)


def test_trees_have_the_numbers_of_torch() -> None:
    target = toy(**SHAPES["grouped"])
    states, cache, other = begun(target)
    # Two branches of two tokens side by side after one token.
    slots = torch.arange(PROMPT, PROMPT + 5, device=DEVICE)[None]
    positions = PROMPT + torch.tensor([[0, 1, 1, 2, 2]], device=DEVICE)
    mask = torch.ones(1, 1, 5, CAPACITY, dtype=torch.bool, device=DEVICE)
    mask[..., PROMPT:] = False
    for node, path in enumerate(([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4])):
        mask[0, 0, node, [PROMPT + place for place in path]] = True
    new = states[:, PROMPT : PROMPT + 5]
    expected = target.run(new, slice(None), cache, slots, positions, mask)
    hidden, angles = new.clone(), target.rotary.table(CAPACITY, DTYPE, target.device)
    caches = LayerCaches(other.keys, other.values)
    fused.run_layers(target.layers, hidden, angles, caches, slots, positions, mask, CAPACITY)
    exact, reference = in_float64(target, states, 5, slots, positions, mask)
    assert_close(hidden, expected, exact)
    assert_close(other.values, cache.values, reference.values)


@pytest.mark.parametrize("rows", [5, *([16, 17, 32] if CUDA else [])])
def test_a_row_has_its_own_numbers_bit_for_bit(rows: int) -> None:
    """Whatever goes with it, and whatever part of the cache is in sight."""
    target = toy(**SHAPES["grouped"], num_layers=2)
    states, together, alone = begun(target)
    new = states[:, PROMPT : PROMPT + rows]
    found = run_fused(target, new, together, PROMPT)
    slots = range(PROMPT, PROMPT + rows)
    singly = [run_fused(target, states[:, slot : slot + 1], alone, slot, min(CAPACITY, slot + 9)) for slot in slots]
    assert torch.equal(found, torch.cat(singly, 1))
    assert torch.equal(together.keys, alone.keys)
    logits = [fused.head_logits(one, target.norm, target.head_weight) for one in singly]
    assert torch.equal(fused.head_logits(found, target.norm, target.head_weight), torch.cat(logits, 1))


def test_layers_without_a_sublayer() -> None:
    target = toy(**SHAPES["grouped"])
    target.layers[0] = target.layers[0].keeping(attention=False, mlp=True)
    target.layers[1] = target.layers[1].keeping(attention=True, mlp=False)
    states, cache, other = begun(target)
    new = states[:, PROMPT : PROMPT + 3]
    exact, _ = in_float64(target, states, 3)
    found, expected = run_fused(target, new, other, PROMPT), target.run(new, slice(None), cache, PROMPT)
    assert_close(found, expected, exact)


def test_what_is_not_taken() -> None:
    assert not fused.takes(toy(qk_norm=True, head_dim=32).layers, DTYPE)
    assert not fused.takes(toy(head_dim=24).layers, DTYPE)
    target = toy(**SHAPES["llama"])
    assert not fused.takes(target.layers, torch.float64)
    target.layers[1].o.weight.data = target.layers[1].o.weight.data.t().contiguous().t()
    assert not fused.takes(target.layers, DTYPE)
    assert not fused.takes_head(torch.zeros(1, 32, dtype=torch.float64), target.head_weight)


@pytest.mark.parametrize("shape", ["llama", "window"])
def test_decoding_through_graphs_of_the_kernels(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts, verification and vanilla: the tokens of torch, and the rounds."""
    monkeypatch.setattr(graphs, "SMALLEST_LIVE", 16)
    target = toy(**SHAPES[shape])
    fast = deepcopy(target)
    engine = GraphEngine(Rerun(), target.device, fused) if not CUDA else attach_engine(fast)
    fast.engine = engine
    assert "+triton-" in engine.name
    calls, outputs = [], []
    for name in ("run_layers", "head_logits"):
        inner = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *given, name=name, inner=inner: calls.append(name) or inner(*given))
    for what in (*fast.layers, fast.head_weight):
        engine.pack(what)
    for options in ({}, {"controller": make_controller({"name": "static", "k": 4})}):
        found = []
        for model in (target, fast):
            drafter = exit_drafter(target, 2, 30) if options else None
            if drafter:
                drafter.vocabulary = drafter.head.to(DEVICE).token_ids
                drafter.head.pack(model.engine)
            found.append(generate(model, [3, 1, 4, 1, 5], drafter=drafter, max_new_tokens=9, **options))
        outputs.append(found[1].tokens)
        if not CUDA:  # bfloat16 of another order of sums may choose other tokens
            assert found[0].tokens == found[1].tokens
            assert found[0].rounds == found[1].rounds
    assert outputs[0] == outputs[1]
    assert {"run_layers", "head_logits"} == set(calls)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shared"), [(86, 101_376), (90, 232_448)])
def test_kernels_compile_for_gpus_that_are_not_here(root: Path, arch: int, shared: int) -> None:
    """For 7B, 135M and heads of 256: seven kernels a layer and one more in long contexts, none of them too large."""
    command = [sys.executable, "-m", "tests.models.compiled", str(arch), str(shared)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, sizes = zip(*json.loads(done.stdout), strict=True)
    attention = ["normalise", "qkv", "attend", "combine", "add_product"]
    assert list(names) == 3 * 2 * [*attention, "normalise", "gate_up", "add_product", "normalise", "logits"]
    assert max(sizes) <= shared


def test_a_head_that_has_moved_is_left_to_torch() -> None:
    target = toy(**SHAPES["llama"])
    target.engine = GraphEngine(Rerun(), target.device, fused)
    target.engine.pack(target.head_weight)
    states = torch.randn(1, target.config.hidden_size, device=DEVICE).to(DTYPE)
    assert target.engine.head_logits(states, target.norm, target.head_weight) is not None
    target.head_weight.data = target.head_weight.data.clone()
    assert target.engine.head_logits(states, target.norm, target.head_weight) is None
