"""Graphs: the numbers of plain torch, from recordings that hold nothing but tensor operations on fixed memory."""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eesd.control import make_controller
from eesd.decoding.generate import generate
from eesd.drafting.assistant import AssistantDrafter
from eesd.drafting.early_exit import EarlyExitDrafter
from eesd.drafting.exit_head import ExitHeadDrafter
from eesd.drafting.self_sd import SelfSDDrafter, Skips
from eesd.errors import EesdError
from eesd.models import graphs
from eesd.models.engine import attach_engine
from eesd.models.graphs import CudaGraphs, live_slots
from eesd.models.transformer import FEW_QUERIES, Transformer
from tests.models.tape import Tape, Traced
from tests.models.test_engine import SHAPES
from tests.toys import exit_drafter, tiny_target

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def small_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SMALLEST_LIVE", 8)


def with_graphs(target: Transformer, *drafters: ExitHeadDrafter) -> Transformer:
    """A copy of the target, and the drafters themselves, decoding through traced graphs."""
    fast = copy.deepcopy(target)
    attach_engine(fast, "graphs")
    fast.engine.backend = Traced()
    for drafter in drafters:
        fast.engine.pack(drafter.head.layer)
    return fast


def in_pieces(target: Transformer, pieces: list[tuple[int, int]], capacity: int = 60) -> list[Tensor]:
    """States of tokens run from slot a to slot b, piece after piece, and the cache they leave."""
    tokens = torch.randint(0, target.config.vocab_size, (1, capacity), generator=torch.Generator().manual_seed(1))
    cache = target.new_cache(capacity)
    with torch.inference_mode():
        states = [target.run(target.embed(tokens[:, a:b]), slice(None), cache, a) for a, b in pieces]
    return [*states, cache.keys, cache.values]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max())), float((a - b).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers_as_plain_torch(shape: str) -> None:
    """Prompt, single tokens, verification, rollback, growth through all sizes of the live part."""
    target = tiny_target(dtype=torch.float64, **SHAPES[shape])
    pieces = [(0, 35), (35, 36), (36, 41), (37, 38), (38, 42), (39, 40), (40, 41), (41, 60), (3, 4), (4, 9), (9, 10)]
    fast = with_graphs(target)
    assert_close(in_pieces(fast, pieces), in_pieces(target, pieces))
    # (tokens, live slots) of the graphs; the prompt of 35 tokens is not for them.
    assert {(key[2], key[3]) for key in fast.engine._graphs} == {
        (1, 60), (5, 60), (4, 60), (19, 60), (1, 8), (5, 16), (1, 16)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("grouped", torch.float32), ("window", torch.float64), ("qk_norm", torch.float32), ("biases", torch.float64)],
)
def test_greedy_decoding_gives_the_same_tokens_and_rounds(shape: str, dtype: torch.dtype) -> None:
    target = tiny_target(dtype=dtype, **SHAPES[shape])
    for controller in ({"name": "beta_ts", "k_max": 5}, None):
        plain, drafter = exit_drafter(target, 2, 30), exit_drafter(target, 2, 30)
        fast, found = with_graphs(target, drafter), []
        for model, drafts in ((target, plain), (fast, drafter)):
            options = {"drafter": drafts, "controller": make_controller(controller)} if controller else {}
            found.append(generate(model, PROMPT, max_new_tokens=30, **options))
        assert found[0].tokens == found[1].tokens
        assert found[0].rounds == found[1].rounds
        assert len(fast.engine.backend.recorded) == len(fast.engine._graphs) > 0


def test_half_precision_stays_within_its_rounding() -> None:
    target = tiny_target(dtype=torch.float64)
    pieces = [(0, 20), (20, 21), (21, 26), (26, 27)]
    expected = in_pieces(target, pieces)
    half = target.to(torch.bfloat16)
    for a, b, c in zip(in_pieces(with_graphs(half), pieces), in_pieces(half, pieces), expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-2 * c.abs().max()


def test_layers_in_parts_and_several_caches() -> None:
    """Graphs of one cache leave the others alone, also one that begins where a freed one lay."""
    target = tiny_target(dtype=torch.float64)
    fast = with_graphs(target)
    found = []
    for model in (target, fast):
        caches = [model.new_cache(20) for _ in range(3)]
        with torch.inference_mode():
            for slot in range(12):
                for shift, cache in enumerate(caches):
                    hidden = model.embed(torch.tensor([[slot + shift]]))
                    early = model.run(hidden, slice(0, 2), cache, slot)
                    found.append(model.run(early, slice(2, None), cache, slot))
        found += [cache.keys for cache in caches]
    half = len(found) // 2
    assert_close(found[half:], found[:half])


def test_the_first_run_writes_at_its_own_slots_alone() -> None:
    fast = with_graphs(tiny_target())
    cache = fast.new_cache(20)
    with torch.inference_mode():
        fast.run(fast.embed(torch.arange(12)[None]), slice(None), cache)
        before = cache.keys.clone()
        fast.run(fast.embed(torch.tensor([[7, 8]])), slice(None), cache, 12)
    assert torch.equal(cache.keys[..., :12, :], before[..., :12, :])
    assert not cache.keys[..., 14:, :].any()


def test_results_are_the_callers_own() -> None:
    fast = with_graphs(tiny_target())
    with torch.inference_mode():
        cache = fast.new_cache(20)
        first = fast.run(fast.embed(torch.tensor([[1]])), slice(None), cache, 0)
        kept = first.clone()
        fast.run(fast.embed(torch.tensor([[2]])), slice(None), cache, 1)
    assert torch.equal(first, kept)


def test_calls_left_to_torch() -> None:
    target = with_graphs(tiny_target())
    hidden, layers = torch.randn(1, 2, 32), list(target.layers)

    def answer(hidden=hidden, slots=0, positions=None, mask=None, capacity=9, batch=1) -> Tensor | None:
        cache = target.new_cache(capacity, batch)
        caches = [cache.layer(i) for i in range(4)]
        return target.engine.run_layers(layers, target.rotary, hidden, caches, slots, positions, mask)

    assert answer() is None  # autograd
    with torch.no_grad():
        assert answer() is not None
        assert answer(slots=7) is not None and answer(slots=8) is None and answer(slots=-1) is None
        pair, seen = torch.tensor([[0, 1]]), torch.ones(1, 1, 2, 2, dtype=torch.bool)
        assert answer(slots=pair) is None and answer(slots=pair, positions=pair) is None
        assert answer(positions=pair) is None and answer(mask=seen) is None
        assert answer(slots=pair, positions=pair, mask=seen) is not None
        assert answer(slots=pair, positions=pair, mask=seen.float()) is None
        assert answer(slots=pair, positions=pair, mask=torch.ones(1, 1, 2, 10, dtype=torch.bool)) is None
        assert answer(hidden=hidden.expand(2, 2, 32), batch=2) is None and answer(batch=2) is None
        assert answer(hidden=torch.randn(1, FEW_QUERIES + 1, 32), capacity=99) is None
        assert target.engine.run_layers(layers, target.rotary, hidden, [None] * 4, 0, None, None) is None
        target.layers[2].packed = None
        assert answer() is None


def test_weights_may_change_in_place_and_move() -> None:
    target = tiny_target(dtype=torch.float64)
    fast = with_graphs(target)
    caches, hidden = [model.new_cache(20) for model in (target, fast)], torch.randn(1, 2, 32, dtype=torch.float64)

    def both() -> tuple[list[Tensor], list[Tensor]]:
        with torch.inference_mode():
            return [
                [model.run(hidden, slice(None), cache, 3), cache.keys.clone(), cache.values.clone()]
                for model, cache in zip((fast, target), reversed(caches), strict=True)
            ]

    assert_close(*both())
    recorded = fast.engine.backend.recorded
    for model in (target, fast):
        with torch.no_grad():
            model.layers[1].down.weight.mul_(2)
    assert_close(*both())
    assert len(recorded) == len(fast.engine._graphs) == 1
    for model in (target, fast):
        model.layers[2].qkv.weight = torch.nn.Parameter(model.layers[2].qkv.weight * 3, requires_grad=False)
    assert_close(*both())
    assert fast.layers[2].packed is None and not fast.engine._graphs
    assert_close(*both())
    assert len(recorded) == 1
    fast.engine.pack(fast.layers[2])
    assert_close(*both())
    assert len(recorded) == 2


def test_two_targets_do_not_share_anything() -> None:
    first, second = tiny_target(seed=0), tiny_target(seed=1)
    fast = [with_graphs(first), with_graphs(second)]
    outputs = [generate(model, PROMPT, max_new_tokens=20).tokens for model in (*fast, *fast)]
    assert (
        outputs[:2] == outputs[2:] == [generate(model, PROMPT, max_new_tokens=20).tokens for model in (first, second)]
    )
    assert copy.deepcopy(fast[0]).layers[0].packed is None


def test_threads_take_turns() -> None:
    target = tiny_target()
    target_tokens = {seed: generate(target, [seed, 2], max_new_tokens=20).tokens for seed in range(4)}
    attach_engine(target, "graphs")
    found = {}

    def decode(seed: int) -> None:
        found[seed] = generate(target, [seed, 2], max_new_tokens=20).tokens

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == target_tokens


def test_graphs_are_bounded_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    target = tiny_target(dtype=torch.float64)
    fast = with_graphs(target)
    pieces = [(0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 16), (16, 18)]
    assert_close(in_pieces(fast, pieces), in_pieces(target, pieces))
    assert len(fast.engine._graphs) == 3


def test_a_failed_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = with_graphs(tiny_target())

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fast.engine.backend, "capture", full, raising=False)
    with pytest.raises(EesdError, match=r"out of memory(.|\n)*EESD_ENGINE=torch"):
        generate(fast, PROMPT, max_new_tokens=4)
    assert not fast.engine._graphs


def test_inference_mode_may_come_and_go() -> None:
    fast = with_graphs(tiny_target())
    cache, hidden = fast.new_cache(20), torch.randn(1, 1, 32)
    with torch.inference_mode():
        first = fast.run(hidden, slice(None), cache, 0)
    with torch.no_grad():
        assert torch.equal(fast.run(hidden, slice(None), cache, 0), first)
    assert len(fast.engine._graphs) == 1


def test_live_part_grows_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [live_slots(n, 3000) for n in (1, 256, 257, 1024, 1025, 2049, 3000)] == [
        256,
        256,
        512,
        1024,
        2048,
        3000,
        3000,
    ]
    assert live_slots(5, 20) == 20


def test_a_layer_is_few_kernels() -> None:
    """What one more layer launches at one token, six products included: small kernels cost bandwidth."""
    counts = []
    for layers in (1, 2):
        fast = with_graphs(tiny_target(num_layers=layers, num_kv_heads=4))
        in_pieces(fast, [(0, 1)])
        counts.append(len(fast.engine.backend.recorded[-1].launches()))
    assert counts[1] - counts[0] == 18


@pytest.mark.parametrize("window", [None, 5])
def test_a_round_reads_nothing_before_its_verdict(window: int | None) -> None:
    """On the meta device any read fails, and so does a tensor that was made on the CPU by mistake."""
    from eesd.decoding.chain import Chain
    from eesd.decoding.generate import GREEDY
    from eesd.drafting import Prompt, Verified
    from eesd.models.passes import Passes

    target, drafter = tiny_target(window=window), exit_drafter(tiny_target(), 2, 20)
    target.to("meta"), drafter.head.to("meta")
    drafter.vocabulary = drafter.head.token_ids
    attach_engine(target, "graphs").pack(drafter.head.layer)
    chain = Chain(make_controller({"name": "static", "k": 3}), 8, GREEDY, None)
    with torch.inference_mode():
        cache = target.new_cache(60)
        prompt = target.embed(torch.zeros((1, 40), dtype=torch.long, device="meta"))
        states = target.run(prompt, slice(0, 2), cache)
        drafter.begin(Prompt(target, cache, [0] * 40, states, target.run(states, slice(2, None), cache)))
        states = drafter.draft(chain, 7, 40)
        found = Passes(target, cache, 2).run([7, *chain.ids], states, 40)
        drafter.accept(Verified(7, [0, 0, 0], 2, 0, found.states, found.final))
        best = found.choices()
        assert best.shape == (4,)
        with pytest.raises(NotImplementedError, match="no data"):
            chain.read(best)


DRAFTERS = {
    "vanilla": lambda target: None,
    "exit_head": lambda target: exit_drafter(target, 2, 20),
    "early_exit": lambda target: EarlyExitDrafter(2),
    "self_sd": lambda target: SelfSDDrafter(target, Skips({1, 2}, {3})),
    "assistant": lambda target: AssistantDrafter(tiny_target(seed=1), target),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_one_read_a_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    options = {"drafter": DRAFTERS[name](target), "controller": make_controller({"name": "static"})}
    options = {} if name == "vanilla" else options
    expected = generate(target, PROMPT, max_new_tokens=30, **options)
    attach_engine(target, "graphs")
    options = {**options, "drafter": DRAFTERS[name](target)} if options else {}
    if name == "exit_head":
        options["drafter"].head.pack(target.engine)
    reads = []
    for method in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "numpy", "cpu"):
        original = getattr(Tensor, method)

        def counted(*args, original=original, method=method):
            reads.append(method)
            return original(*args)

        monkeypatch.setattr(Tensor, method, counted)
    found = generate(target, PROMPT, max_new_tokens=30, **options)
    assert reads == ["__int__", *["tolist"] * len(found.rounds)]
    assert (found.tokens, found.rounds) == (expected.tokens, expected.rounds)


def test_cuda_graphs_are_captured_as_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of `CudaGraphs`, on a torch.cuda of tapes: side stream, warm-up, one pool, turns of streams."""
    calls, bind = [], inspect.signature(torch.cuda.graph.__init__).bind

    class Stream:
        def __init__(self, device=None) -> None:
            self.wait_stream = lambda other: calls.append("wait_stream")
            self.synchronize = lambda: calls.append("synchronize stream")

    @contextmanager
    def capturing(graph: SimpleNamespace, **options):
        bind(None, graph, **options)
        assert (options["pool"], options["capture_error_mode"]) == ("pool", "thread_local")
        calls.append("capture")
        tape = Tape()
        with tape:
            yield
        graph.replay = tape.play

    streams = [Stream()]
    for name, value in {
        "Stream": Stream,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": SimpleNamespace,
        "graph": capturing,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(calls.append("warm-up")),
        "current_stream": lambda device=None: streams[-1],
        "synchronize": lambda device: calls.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    target = tiny_target()
    fast = with_graphs(target)
    fast.engine.backend = CudaGraphs(torch.device("cuda", 0))
    assert generate(fast, PROMPT, max_new_tokens=3).tokens == generate(target, PROMPT, max_new_tokens=3).tokens
    once = ["synchronize", "wait_stream", "warm-up", "synchronize stream", "capture", "synchronize"]
    assert calls == [*once, *once]  # the prompt and a token; the second token replays
    streams.append(Stream())
    fast.engine.backend.take_turn()
    assert calls[-1] == "wait_stream" and len(calls) == 13
