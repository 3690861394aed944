"""The C++ engine: torch's numbers within rounding, and what it leaves to torch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eesd.decoding.chain import read_signal
from eesd.errors import EesdError
from eesd.models import graphs
from eesd.models.cache import KVCache, read
from eesd.models.engine import attach_engine, make_engine
from eesd.models.graphs import GraphEngine, Rerun
from eesd.models.kernels.layout import fits
from eesd.models.kernels.packing import bfloat16_exact
from eesd.models.loading import load_target
from eesd.models.transformer import Layer, Transformer, head_logits, run_layers
from tests.toys import needs_compiler, tiny_target

SHAPES = {
    "llama": {},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 96, "intermediate_size": 200},
    "biases": {"qkv_bias": True, "output_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 24, "num_kv_heads": 4},
    "window": {"window": 20, "head_dim": 128},
    "panels": {"head_dim": 64},
    "three_panels": {"head_dim": 96, "num_kv_heads": 1},
    "wide": {"hidden_size": 256, "intermediate_size": 160, "qkv_bias": True, "output_bias": True, "head_dim": 64},
    "odd": {"hidden_size": 40, "intermediate_size": 61, "vocab_size": 53, "num_heads": 3, "num_kv_heads": 1},
}
LENGTH = 150
AS_TORCH = 4e-2  # of the largest number: as far as torch in bfloat16 is from float32 with the widest of these shapes


@pytest.fixture(params=SHAPES)
def target(request: pytest.FixtureRequest) -> Transformer:
    return small(SHAPES[request.param])


def small(shape: dict, dtype: torch.dtype = torch.float32) -> Transformer:
    """A random target with a long enough context; its weights are bfloat16 numbers, as a real checkpoint's are."""
    target = tiny_target(max_positions=512, **shape)
    with torch.no_grad():
        for weight in target.parameters():
            weight.mul_(0.3 if weight.dim() > 1 else 1.0).copy_(weight.bfloat16())
    return target.to(dtype)


def with_engine(target: Transformer) -> Transformer:
    fast = copy.deepcopy(target)
    assert attach_engine(fast, "cpp").name.startswith("cpp-")
    return fast


def held(cache: KVCache) -> Tensor:
    """All keys and values [layers, 2, batch, kv_heads, capacity, head_dim]."""
    return torch.stack([torch.stack(read(cache.layer(i), cache.capacity)) for i in range(len(cache.keys))])


def decode(target: Transformer, cuts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """States and logits of LENGTH tokens run in pieces that end at `cuts`, and the cache they leave."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, target.config.vocab_size, (1, LENGTH), generator=generator)
    cache = target.new_cache(LENGTH + 3)
    states = []
    with torch.inference_mode():
        for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            states.append(target.run(target.embed(tokens[:, begin:end]), slice(None), cache, begin))
        states = torch.cat(states, 1)
        return states, target.logits(states), held(cache)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, AS_TORCH)])
def test_same_numbers_as_torch_in_float32(
    target: Transformer, dtype: torch.dtype, tolerance: float, engine_alone: Callable[[], None]
) -> None:
    plain = decode(target, [100, 101, 104, 120])
    engine_alone()
    fast = decode(with_engine(target.to(dtype)), [100, 101, 104, 120])
    assert all(close(a, b, tolerance) for a, b in zip(fast, plain, strict=True))
    assert fast[1].dtype == torch.float32


@needs_compiler
def test_torchs_own_products_are_the_same_beside_the_engine() -> None:
    """Tiles of a processor are shared with other libraries, and may be shaped differently there."""
    fast = with_engine(small({"hidden_size": 64, "head_dim": 32}, torch.bfloat16))
    a, b = torch.randn(48, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    expected = a @ b
    with torch.inference_mode():
        for count in (1, 5, 20):
            fast.run(fast.embed(torch.arange(count)[None]), slice(None), fast.new_cache(20), 0)
            assert torch.equal(a @ b, expected)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, AS_TORCH)])
@pytest.mark.parametrize("seq", [1, 3, 40])
def test_ragged_batches_and_trees(
    target: Transformer, seq: int, dtype: torch.dtype, tolerance: float, engine_alone: Callable[[], None]
) -> None:
    """Rows at their own slots, and tokens that see what a mask says at positions that differ from their slots."""
    fast = with_engine(target.to(dtype))
    prompt, tokens = torch.randint(0, 50, (4, 70)), torch.randint(0, 50, (4, seq))
    slots = torch.tensor([70, 11, 64, 33])[:, None] + torch.arange(seq)
    results = []
    for model in (target, fast):
        cache = model.new_cache(112, batch=4)
        with torch.inference_mode():
            model.run(model.embed(prompt), slice(None), cache)
            ragged = model.run(model.embed(tokens), slice(None), cache, slots)
            mask = torch.rand(1, 1, seq, 70 + seq, generator=torch.Generator().manual_seed(0)) < 0.5
            mask[..., 0] = True
            positions = 70 + torch.arange(seq)[None] // 2
            tree = model.run(model.embed(tokens[:1]), slice(None), first_row(cache), 70, positions, mask)
        results.append((ragged, tree, held(cache)))
        engine_alone()
    assert all(close(a, b, tolerance) for a, b in zip(results[1], results[0], strict=True))


@needs_compiler
def test_which_caches_are_chunked() -> None:
    """Those of a target that decodes through the kernels, with heads that these take; still when rows are retired."""
    target = small(SHAPES["llama"])
    assert target.new_cache(70).keys.ndim == 5
    cache = with_engine(target).new_cache(70, batch=3)
    assert cache.keys.shape[3:] == (2, 64, target.config.head_dim)
    cache.keep_rows([0, 2])
    assert fits(cache.keys, cache.values, torch.float32)
    cache.take_rows(torch.tensor([1, 0, 1]))
    assert fits(cache.keys, cache.values, torch.float32)
    odd = with_engine(small({"head_dim": 20}))
    assert odd.new_cache(70).keys.ndim == 5 and odd.new_cache(70).values.shape[3] == 70
    assert with_engine(small({}).double()).new_cache(70).keys.ndim == 5


def first_row(cache):
    """The first batch row, as a cache that is a view with strides of its own."""
    first = copy.copy(cache)
    first.keys, first.values = cache.keys[:, :1], cache.values[:, :1]
    return first


@needs_compiler
def test_exit_layer_and_draft_head_with_weights_beyond_bfloat16(engine_alone: Callable[[], None]) -> None:
    target = small(SHAPES["grouped"])
    fast = with_engine(target)
    layer, weight = Layer(target.config).requires_grad_(False), torch.randn(37, target.config.hidden_size)
    assert not bfloat16_exact(weight)
    hidden = torch.randn(1, 5, target.config.hidden_size)
    results = []
    for engine in (None, fast.engine):
        if engine:
            engine_alone()
            engine.pack(layer)
            engine.pack(weight)
        with torch.inference_mode():
            cache = (fast if engine else target).new_cache(8, num_layers=1).layer(0)
            states = run_layers([layer], target.rotary, hidden, [cache])
            results.append((states, head_logits(states, target.norm, weight)))
            if engine:
                assert torch.equal(engine.linear(states, weight)[:, 2:3], engine.linear(states[:, 2:3], weight))
    assert all(close(a, b, 1e-5) for a, b in zip(*results, strict=True))
    assert copy.deepcopy(layer).packed is None


@needs_compiler
def test_calls_left_to_torch() -> None:
    """Autograd, changed weights, no cache, float64: no answer from the engine, and the right one from torch."""
    target = small(SHAPES["llama"])
    fast = with_engine(target)
    hidden = torch.randn(1, 3, target.config.hidden_size)

    def answer(cache=None, hidden=hidden) -> Tensor | None:
        cache = cache or fast.new_cache(8)
        caches = [cache.layer(i) for i in range(len(fast.layers))]
        return fast.engine.run_layers(fast.layers, fast.rotary, hidden, caches, 0, None, None)

    assert answer() is None and fast.engine.head_logits(hidden, fast.norm, fast.head_weight) is None
    with torch.no_grad():
        assert answer() is not None
        assert answer(hidden=hidden.double()) is None
        assert fast.engine.run_layers(fast.layers, fast.rotary, hidden, [None] * 4, 0, None, None) is None
        fast.layers[1].down.weight.mul_(2)
        assert answer() is None
        target.layers[1].down.weight.mul_(2)
        expected = target.run(hidden, slice(None), target.new_cache(8))
        assert torch.equal(fast.run(hidden, slice(None), fast.new_cache(8)), expected)
        fast.engine.pack(fast.layers[1])
        assert close(answer(), expected, 1e-5)
    out = fast.run(hidden.requires_grad_(), slice(None))
    assert torch.autograd.grad(out.sum(), hidden)[0].abs().sum() > 0


@needs_compiler
@pytest.mark.slow
def test_greedy_tokens_of_the_real_model(embedded_model) -> None:
    target = load_target(embedded_model, "float32")
    prompt = torch.arange(1000, 1040)[None]
    outputs = []
    for attach in (False, True):
        if attach:
            attach_engine(target, "cpp")
        with torch.inference_mode():
            cache, tokens = target.new_cache(128), prompt
            hidden = target.run(target.embed(tokens), slice(None), cache)
            for slot in range(40, 80):
                tokens = torch.cat((tokens, target.logits(hidden[:, -1:]).argmax(-1)), 1)
                hidden = target.run(target.embed(tokens[:, slot:]), slice(None), cache, slot)
        outputs.append(tokens)
    assert torch.equal(*outputs)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 15, 16, 37, 8192])
def test_statistics_of_a_softmax_are_those_of_torch(rows: int) -> None:
    engine, logits = make_engine("cpp"), 4 * torch.randn(rows, generator=torch.Generator().manual_seed(rows))
    logits[rows // 2 :: 7] = float("-inf") if rows > 1 else 0.5
    law = logits.double().softmax(-1)
    expected = float(law.max()), float(torch.special.entr(law).sum())
    assert engine.softmax_statistics(logits) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert engine.softmax_statistics(logits[:0]) is engine.softmax_statistics(logits[None]) is None
    assert engine.softmax_statistics(logits[None].expand(2, -1).T[:, 0]) == engine.softmax_statistics(logits)
    # What a chain's controller looks at is the same whichever way it is computed.
    row = logits.argmax()
    assert read_signal(logits, row, engine=engine) == pytest.approx(read_signal(logits, row), rel=1e-5, abs=1e-6)


def test_statistics_are_left_to_torch_where_the_engine_has_none() -> None:
    logits = torch.randn(20)
    assert make_engine("torch").softmax_statistics(logits) is None
    assert make_engine("graphs").softmax_statistics(logits) is None
    assert make_engine().softmax_statistics(logits.double()) is None
    assert read_signal(logits, logits.argmax(), engine=make_engine("torch")) == read_signal(logits, logits.argmax())


def test_engine_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EESD_ENGINE", raising=False)
    assert make_engine("graphs").name == "graphs (re-executed)"
    assert make_engine(device="meta").name == "torch (no engine for meta)"
    with pytest.raises(EesdError, match="computes on CPUs"):
        make_engine("cpp", "cuda")
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: Rerun())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(make_engine(device="cuda:1"), GraphEngine)
    # Kernels in Triton where it is installed, unless graphs were asked for by name.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(graphs, "find_spec", lambda name: name)
    takes = SimpleNamespace(VERSION="3", takes=lambda layers, dtype: dtype == torch.bfloat16)
    monkeypatch.setitem(sys.modules, "eesd.models.fused", takes)
    engine = make_engine(device="cuda")
    assert (engine.name, engine.device) == ("graphs (re-executed)+triton-3", torch.device("cuda:1"))
    engine.begin(SimpleNamespace(layers=[], dtype=torch.bfloat16))
    assert engine.kernels is takes
    engine.begin(SimpleNamespace(layers=[], dtype=torch.float32))
    assert engine.name == "graphs (re-executed)"
    assert make_engine("graphs", "cuda").name == "graphs (re-executed)"
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert make_engine(device="cuda").name == "graphs (re-executed)"
    monkeypatch.setenv("EESD_ENGINE", "torch")
    assert make_engine(device="cuda").name == "torch (chosen)"
