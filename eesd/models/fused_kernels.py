"""The Triton kernels of `fused`, which says what they are for.

Rows are tokens. Every matrix lies with its last dimension side by side, except cache entries, whose strides are given.
CHAIN: tokens lie side by side from the cache slot in `slots` on; else `slots`, `positions` and `mask` have a row each.
EARLY, AHEAD: see `_wait_for_rows`. Flags and sizes in capitals are compiled in, numbers that change with a call
are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Queries of a program of the attention: the fewest that matrix units take.
QUERIES = tl.constexpr(16)


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait for what the kernels before have written."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _wait_for_rows(weight, feature, SIZE: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr):
    """As `_wait`, meanwhile bringing the first AHEAD times 128 bytes of the features of `weight` [.., SIZE] near.

    Weights are read from DRAM: on their way to the L2 cache before the input is complete, they cost less.
    """
    if EARLY and AHEAD > 0:
        line = weight + feature[:, None].to(tl.int64) * SIZE + tl.arange(0, AHEAD)[None, :] * 64
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
    _wait(EARLY)


# ---- products -------------------------------------------------------------------------------------------------------


@triton.jit
def normalise(x, gain, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Root-mean-square norm of rows [rows, SIZE]."""
    _wait(EARLY)
    k, row = tl.arange(0, BLOCK), tl.program_id(0) * SIZE
    scale = tl.load(gain + k, mask=k < SIZE, other=0.0).to(tl.float32)
    exact = tl.load(x + row + k, mask=k < SIZE, other=0.0).to(tl.float32)
    found = exact * tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + eps) * scale
    tl.store(out + row + k, found, mask=k < SIZE)


@triton.jit
def _load_weight(weight, feature, wanted, k, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_K, features] of a weight [outputs, SIZE]."""
    at = weight + feature[None, :].to(tl.int64) * SIZE + k[:, None]
    mask = wanted[None, :] if EVEN else wanted[None, :] & (k < SIZE)[:, None]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(
    x, weight, row, inside, feature, other, wanted,
    SIZE: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, BLOCK_N] of rows x [.., SIZE] with the features `feature`, and with `other` if PAIR."""
    EVEN: tl.constexpr = SIZE % BLOCK_K == 0
    first = tl.zeros((ROWS, BLOCK_N), tl.float32)
    second = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] if EVEN else inside[:, None] & (k < SIZE)[None, :]
        rows = tl.load(x + row[:, None] * SIZE + k[None, :], mask=mask, other=0.0)
        first = tl.dot(rows, _load_weight(weight, feature, wanted, k, SIZE, EVEN), first)
        if PAIR:
            second = tl.dot(rows, _load_weight(weight, other, wanted, k, SIZE, EVEN), second)
    return first, second


@triton.jit
def _part(
    weight, rows, outputs, SIZE: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rows [ROWS] and features [BLOCK_N] of a program, each with those that exist, once its input is there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    _wait_for_rows(weight, tl.minimum(feature, outputs - 1), SIZE, EARLY, AHEAD)
    return row, row < rows, feature, feature < outputs


@triton.jit
def _place(slots, positions, row, inside, CHAIN: tl.constexpr):
    """Cache slots and positions of rows; tokens of a chain lie side by side from the slot in `slots` on."""
    if CHAIN:
        slot = tl.load(slots) + row
        position = slot
    else:
        slot = tl.load(slots + row, mask=inside, other=0)
        position = tl.load(positions + row, mask=inside, other=0)
    return slot, position


@triton.jit(do_not_specialize=["rows"])
def qkv(
    x, weight, bias, cosine, sine, slots, positions, queries, keys, values, rows,
    key_head, key_slot, key_dim, value_head, value_slot, value_dim,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    CHAIN: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Product and rotation; queries [rows, HEADS, DIM] go to a buffer, keys and values to their cache slots.

    A program has some features of the first half of a head and those of its second half that rotation mixes them with.
    """
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = tl.program_id(1) // (HALF // BLOCK_N)
    low = tl.program_id(1) % (HALF // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = head * DIM + low
    _wait_for_rows(weight, feature, SIZE, EARLY, AHEAD)
    first, second = _product(
        x, weight, row, inside, feature, feature + HALF, low < HALF, SIZE, True, ROWS, BLOCK_N, BLOCK_K
    )
    if BIAS:
        first += tl.load(bias + feature).to(tl.float32)[None, :]
        second += tl.load(bias + feature + HALF).to(tl.float32)[None, :]
    slot, position = _place(slots, positions, row, inside, CHAIN)
    kept = inside[:, None]
    if head < HEADS + KV_HEADS:
        angle = position[:, None] * DIM + low[None, :]
        low_cosine = tl.load(cosine + angle, mask=kept, other=0.0).to(tl.float32)
        low_sine = tl.load(sine + angle, mask=kept, other=0.0).to(tl.float32)
        high_cosine = tl.load(cosine + angle + HALF, mask=kept, other=0.0).to(tl.float32)
        high_sine = tl.load(sine + angle + HALF, mask=kept, other=0.0).to(tl.float32)
        # The table has the first half of its sines negated.
        first, second = first * low_cosine + second * low_sine, second * high_cosine + first * high_sine
    if head < HEADS:
        at = queries + row[:, None] * (HEADS * DIM) + feature[None, :]
        tl.store(at, first, mask=kept)
        tl.store(at + HALF, second, mask=kept)
    elif head < HEADS + KV_HEADS:
        at = keys + (head - HEADS) * key_head + slot[:, None] * key_slot + low[None, :] * key_dim
        tl.store(at, first, mask=kept)
        tl.store(at + HALF * key_dim, second, mask=kept)
    else:
        at = values + (head - HEADS - KV_HEADS) * value_head + slot[:, None] * value_slot + low[None, :] * value_dim
        tl.store(at, first, mask=kept)
        tl.store(at + HALF * value_dim, second, mask=kept)


@triton.jit(do_not_specialize=["rows"])
def add_product(
    x, weight, bias, hidden, rows, outputs,
    SIZE: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the product of x [rows, SIZE] to `hidden` [rows, outputs]."""
    row, inside, feature, wanted = _part(weight, rows, outputs, SIZE, EARLY, AHEAD, ROWS, BLOCK_N)
    found, _ = _product(x, weight, row, inside, feature, feature, wanted, SIZE, False, ROWS, BLOCK_N, BLOCK_K)
    if BIAS:
        found += tl.load(bias + feature, mask=wanted, other=0.0).to(tl.float32)[None, :]
    at, mask = hidden + row[:, None] * outputs + feature[None, :], inside[:, None] & wanted[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0).to(tl.float32) + found, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gate_up(
    x, weight, out, rows, outputs, SIZE: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up [rows, outputs]; the weight has all gates, then all ups."""
    row, inside, feature, wanted = _part(weight, rows, outputs, SIZE, EARLY, AHEAD, ROWS, BLOCK_N)
    gate, up = _product(x, weight, row, inside, feature, feature + outputs, wanted, SIZE, True, ROWS, BLOCK_N, BLOCK_K)
    at = out + row[:, None] * outputs + feature[None, :]
    tl.store(at, gate / (1.0 + tl.exp(-gate)) * up, mask=inside[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["rows"])
def logits(
    x, weight, out, rows, outputs, SIZE: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 product [rows, outputs]."""
    row, inside, feature, wanted = _part(weight, rows, outputs, SIZE, EARLY, AHEAD, ROWS, BLOCK_N)
    found, _ = _product(x, weight, row, inside, feature, feature, wanted, SIZE, False, ROWS, BLOCK_N, BLOCK_K)
    at = out + row[:, None].to(tl.int64) * outputs + feature[None, :]
    tl.store(at, found, mask=inside[:, None] & wanted[None, :])


# ---- attention ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "live", "window", "mask_row"])
def attend(
    queries, keys, values, mask, slots, out, sums, rows, live, window, mask_row, scale,
    key_head, key_slot, key_dim, value_head, value_slot, value_dim,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    CHAIN: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Softmax attention of all queries of a key head over one part of the cache.

    WHOLE: it is the only part; out [rows, HEADS, DIM] is final. Else out [parts, rows, HEADS, DIM] and sums [2, parts,
    rows, HEADS], the largest score and the sum of exponentials, are left to `combine`.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv, part = tl.program_id(1), tl.program_id(2)
    line = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row, head = line // GROUP, kv * GROUP + line % GROUP
    inside, d = row < rows, tl.arange(0, DIM)
    place = row * HEADS + head
    _wait(EARLY)
    query = tl.load(queries + place[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
    end = tl.minimum(part * PART + PART, live)
    if CHAIN:
        slot = tl.load(slots) + row
        end = tl.minimum(end, tl.load(slots) + rows)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    found = tl.zeros((QUERIES, DIM), tl.float32)
    for start in range(part * PART, end, STEP):
        at = start + tl.arange(0, STEP)
        key = tl.load(
            keys + kv * key_head + at[None, :] * key_slot + d[:, None] * key_dim, mask=(at < end)[None, :], other=0.0
        )
        visible = inside[:, None] & (at < end)[None, :]
        if CHAIN:
            visible &= at[None, :] <= slot[:, None]
            if WINDOW:
                visible &= at[None, :] > slot[:, None] - window
        else:
            visible = tl.load(mask + row[:, None] * mask_row + at[None, :], mask=visible, other=0) != 0
        scores = tl.where(visible, tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet stays at zero.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights, kept = tl.exp2(scores - level[:, None]), tl.exp2(highest - level)
        value = tl.load(
            values + kv * value_head + at[:, None] * value_slot + d[None, :] * value_dim,
            mask=(at < end)[:, None], other=0.0,
        )  # fmt: skip
        total = total * kept + tl.sum(weights, 1)
        found = tl.dot(weights.to(value.dtype), value, found * kept[:, None])
        highest = higher
    if WHOLE:
        found /= tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        place += part * rows * HEADS
        tl.store(sums + place, highest, mask=inside)
        tl.store(sums + tl.num_programs(2) * rows * HEADS + place, total, mask=inside)
    tl.store(out + place[:, None].to(tl.int64) * DIM + d[None, :], found, mask=inside[:, None])


@triton.jit(do_not_specialize=["count", "parts"])
def combine(partial, sums, out, count, parts, DIM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out [count, DIM] from `attend`'s parts of count = rows * heads queries. Parts that saw nothing change nothing."""
    _wait(EARLY)
    query, d = tl.program_id(0), tl.arange(0, DIM)
    highest = tl.full((), float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.max(tl.load(sums + part * count + query, part < parts, float("-inf")), 0))
    total, found = tl.full((), 0.0, tl.float32), tl.zeros((DIM,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        there, place = part < parts, part * count + query
        weight = tl.exp2(tl.load(sums + place, there, float("-inf")) - highest)
        total += tl.sum(tl.load(sums + parts * count + place, there, 0.0) * weight, 0)
        values = tl.load(partial + place[:, None].to(tl.int64) * DIM + d[None, :], there[:, None], 0.0)
        found += tl.sum(values * weight[:, None], 0)
    tl.store(out + query * DIM + d, found / total)
