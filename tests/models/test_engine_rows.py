"""Bit for bit, the C++ engine gives a row the same numbers beside any others, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eesd.models.engine import make_engine
from eesd.models.transformer import Transformer
from tests.models.test_engine import LENGTH, SHAPES, decode, held, small, with_engine
from tests.toys import needs_compiler


@pytest.fixture(params=SHAPES)
def target(request: pytest.FixtureRequest) -> Transformer:
    return small(SHAPES[request.param])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(target: Transformer, dtype: torch.dtype) -> None:
    """One by one, in verification-sized pieces and all at once give the same bits, caches included."""
    fast = with_engine(target.to(dtype))
    one_by_one = decode(fast, list(range(1, LENGTH)))
    for cuts in ([], [33, 73, 106], list(range(7, LENGTH, 7)), [60, 62, 65, 69, 74, 80, 87, 95, 104, 114, 125, 137]):
        assert all(torch.equal(a, b) for a, b in zip(decode(fast, cuts), one_by_one, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped", "window", "panels"])
def test_rows_do_not_depend_on_each_other_behind_a_long_context(name: str, dtype: torch.dtype) -> None:
    """Some joined as chunks come, some from the results of more chunks than are joined at once."""
    fast, results = with_engine(small(SHAPES[name], dtype)), []
    text = fast.embed(torch.randint(0, 50, (1, 1300), generator=torch.Generator().manual_seed(3)))
    for size in (1, 5, 200):
        cache = fast.new_cache(1300)
        with torch.inference_mode():
            fast.run(text[:, :1100], slice(None), cache)
            pieces = [
                fast.run(text[:, first : first + size], slice(None), cache, first) for first in range(1100, 1300, size)
            ]
        results.append(torch.cat(pieces, 1))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq", [1, 90, 150])
def test_texts_do_not_depend_on_each_other(
    target: Transformer, dtype: torch.dtype, seq: int, engine_alone: Callable[[], None]
) -> None:
    """Texts that threads share out, and the last of them, which is left over, give the bits that each gives alone."""
    engine_alone()
    fast, threads = with_engine(target.to(dtype)), torch.get_num_threads()
    count = 5 if seq > 1 else 70
    hidden = fast.embed(torch.randint(0, 50, (count, seq), generator=torch.Generator().manual_seed(2)))
    with torch.inference_mode():
        alone = [(fast.new_cache(seq), text[None]) for text in hidden]
        outputs = torch.cat([fast.run(text, slice(None), cache) for cache, text in alone])
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                together = fast.new_cache(seq, batch=count)
                assert torch.equal(fast.run(hidden, slice(None), together), outputs)
                assert torch.equal(held(together), torch.cat([held(cache) for cache, _ in alone], 2))
        finally:
            torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_of_one_call_go_on_at_their_own_slots(target: Transformer, dtype: torch.dtype) -> None:
    """Two texts that end in different chunks of the cache; of grouped heads, enough rows that threads share them."""
    fast, threads, seq, begun = with_engine(target.to(dtype)), torch.get_num_threads(), 32, (50, 130)
    texts = [torch.randint(0, 50, (1, n + seq), generator=torch.Generator().manual_seed(n)) for n in begun]
    batch = torch.cat([fast.embed(text[:, -seq:]) for text in texts])
    slots = torch.tensor(begun)[:, None] + torch.arange(seq)
    results = []
    with torch.inference_mode():
        for text, first in zip(texts, begun, strict=True):
            cache = fast.new_cache(170)
            steps = [fast.run(fast.embed(text[:, :first]), slice(None), cache)]
            steps += [
                fast.run(fast.embed(text[:, i : i + 1]), slice(None), cache, i) for i in range(first, first + seq)
            ]
            results.append((torch.cat(steps[1:], 1), cache))
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                together = fast.new_cache(170, batch=2)
                for row, (text, first) in enumerate(zip(texts, begun, strict=True)):
                    alone = fast.new_cache(170)
                    fast.run(fast.embed(text[:, :first]), slice(None), alone)
                    together.keys[:, row], together.values[:, row] = alone.keys[:, 0], alone.values[:, 0]
                outputs = fast.run(batch, slice(None), together, slots)
                assert torch.equal(outputs, torch.cat([output for output, _ in results]))
                assert torch.equal(held(together), torch.cat([held(cache) for _, cache in results], 2))
        finally:
            torch.set_num_threads(threads)


@needs_compiler
def test_layers_cut_in_two_and_threads_change_nothing() -> None:
    fast = with_engine(small(SHAPES["grouped"], torch.bfloat16))
    hidden = fast.embed(torch.arange(5)[None])
    threads = torch.get_num_threads()
    with torch.inference_mode():
        whole = fast.run(hidden, slice(None), fast.new_cache(9), 0)
        cache = fast.new_cache(9)
        assert torch.equal(fast.run(fast.run(hidden, slice(0, 1), cache), slice(1, None), cache), whole)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(fast.run(hidden, slice(None), fast.new_cache(9), 0), whole)
        finally:
            torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-37])
def test_one_row_gives_what_many_give_down_to_the_smallest_numbers(scale: float) -> None:
    engine = make_engine("cpp")
    weight = (torch.randn(300, 64) * scale).bfloat16()
    x = (torch.randn(40, 64) * 1e-2).bfloat16()
    with torch.inference_mode(False), torch.no_grad():
        engine.pack(weight)
        many = engine.linear(x, weight)
        assert torch.equal(torch.cat([engine.linear(row[None], weight) for row in x]), many)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("live", [3, 64, 65, 100])
def test_slots_that_are_not_live_may_hold_anything(target: Transformer, dtype: torch.dtype, live: int) -> None:
    """No number where a rejected token was, or in what a prompt before has left."""
    fast = with_engine(target.to(dtype))
    tokens, results = torch.randint(0, 50, (1, live)), []
    for left in (0.0, float("nan")):
        cache = fast.new_cache(110)
        for stored in (cache.keys, cache.values):
            stored.fill_(left)
        with torch.inference_mode():
            hidden = fast.run(fast.embed(tokens[:, :-1]), slice(None), cache)
            results.append((hidden, fast.run(fast.embed(tokens[:, -1:]), slice(None), cache, live - 1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
