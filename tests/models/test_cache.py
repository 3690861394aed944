"""A chunked cache holds what a plain one does, through everything that writes, moves and reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eesd.models.cache import CHUNK, KVCache, read, write
from tests.toys import tiny_target

CAPACITY = 2 * CHUNK + 7


def both(batch: int = 1) -> list[KVCache]:
    config = tiny_target().config
    return [KVCache(config, CAPACITY, batch, num_layers=2, chunked=chunked) for chunked in (False, True)]


def fresh(cache: KVCache, seq: int) -> tuple[Tensor, Tensor]:
    _, batch, heads, _, dim = cache.values.shape
    keys, values = torch.randn(2, batch, heads, seq, dim, generator=torch.Generator().manual_seed(seq))
    return keys, values


def assert_same(caches: list[KVCache], live: int = CAPACITY) -> None:
    for layer in range(2):
        plain, chunked = (read(cache.layer(layer), live) for cache in caches)
        assert all(torch.equal(a, b) for a, b in zip(plain, chunked, strict=True))
        assert plain[0].shape[2] == live


@pytest.mark.parametrize("live", [1, CHUNK, CHUNK + 1, CAPACITY])
def test_written_side_by_side(live: int) -> None:
    caches = both()
    for cache in caches:
        write(cache.layer(1), *fresh(cache, CAPACITY), 0)
        write(cache.layer(1), *fresh(cache, 5), CHUNK - 3)
    assert_same(caches, live)
    assert caches[0].keys[1].any()


def test_rows_at_their_own_slots_and_some_of_them_taken_and_kept() -> None:
    caches, slots = both(batch=3), torch.tensor([[0, 1], [CHUNK - 1, CHUNK], [CAPACITY - 1, 9]])
    for cache in caches:
        write(cache.layer(0), *fresh(cache, 2), slots)
    assert_same(caches)
    for cache in caches:
        cache.take_rows(torch.tensor([2, 0, 0, 1]))
    assert_same(caches)
    assert caches[1].keys.shape[1] == 4 and torch.equal(caches[1].keys[0, 1], caches[1].keys[0, 2])
    taken = caches[1].keys.clone()
    for kept in ([1, 2, 3], [0, 2]):
        for cache in caches:
            cache.keep_rows(kept)
        assert_same(caches)
        taken = taken[:, kept]
        assert torch.equal(caches[1].keys, taken) and taken[0, 0].any()
    for rows in ([1, 0], [0, 0]):
        with pytest.raises(ValueError, match="must ascend"):
            caches[0].keep_rows(rows)


def test_a_branch_is_moved_across_the_border_of_chunks() -> None:
    caches = both()
    for cache in caches:
        write(cache.layer(0), *fresh(cache, CAPACITY), 0)
        cache.move([CHUNK + 1, CHUNK + 4, 2 * CHUNK], CHUNK - 1)
    assert_same(caches)
    assert torch.equal(caches[0].keys[0, :, :, CHUNK], fresh(caches[0], CAPACITY)[0][:, :, CHUNK + 4])
