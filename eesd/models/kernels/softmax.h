// Partial softmaxes: the weights of one chunk's scores, and how the results of chunks are joined, in their order.
#pragma once

#include <limits>

#include "cache.h"

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Numbers {
    int32_t of[CHUNK];
    constexpr Numbers() : of() {
        for (int i = 0; i < CHUNK; i++) of[i] = i;
    }
};
constexpr Numbers PLACES;  // in a chunk

float lane_top(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, x[i]);
    return top;
#endif
}

// Of 16 numbers, as the other `lane_sum`.
float lane_sum(const vf (&x)[16 / LANES]) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x[0]);  // the same tree
#else
    float numbers[16];
    for (int i = 0; i < 16 / LANES; i++) store(numbers + i * LANES, x[i]);
    return lane_sum(numbers);
#endif
}

// Whether none of some queries of a batch row sees the chunk from `start` on.
bool unseen(const Attention& a, int batch, int first, int count, int start) {
    if (a.call.mask) return false;
    for (int row = a.row_of(batch, first); row <= a.row_of(batch, first + count - 1); row++) {
        int slot = a.call.slots[row];
        if (slot >= start && (!a.call.window || slot - a.call.window + 1 < start + CHUNK)) return false;
    }
    return true;
}

// Turn scores [CHUNK] of one query into weights relative to their largest; returns that and their sum.
void soften(const Attention& a, int row, int start, int live, float* scores, float& top, float& sum) {
    int slot = a.call.slots[row], from = a.call.window ? std::max(0, slot - a.call.window + 1) : 0, to = slot + 1;
    if (a.call.mask) {
        const uint8_t* mask = a.call.mask + row * a.call.mask_stride + start;
        for (int j = 0; j < live; j++)
            if (!mask[j]) scores[j] = LOWEST;
        from = 0, to = start + live;
    }
    const int first = from - start, end = std::min(to - start, live);
    vf seen[CHUNK / LANES], tops = all(LOWEST), sums[16 / LANES] = {};
    for (int i = 0; i < CHUNK / LANES; i++) {
        vi at = *reinterpret_cast<const vi_at*>(PLACES.of + i * LANES);
        vf score = load(scores + i * LANES);
        seen[i] = ((at >= first) & (at < end)) ? score : all(LOWEST);
        tops = seen[i] > tops ? seen[i] : tops;
    }
    float scale = 1.0f / std::sqrt(float(a.shape.dim));
    top = lane_top(tops) * scale;
    float shift = top == LOWEST ? 0.0f : top;  // nothing seen: all weights zero
    for (int i = 0; i < CHUNK / LANES; i++) {
        vf weights = exponential(seen[i] * scale - shift);
        store(scores + i * LANES, weights);
        sums[i % (16 / LANES)] += weights;
    }
    sum = lane_sum(sums);
}

// Of up to 16 joinings, by how much sums shrink whose top lies below the common one: first the distances.
struct Shares {
    float old[16], fresh[16];
    void exponentials() {
        for (int i = 0; i < 16; i += LANES) {
            store(old + i, exponential(load(old + i)));
            store(fresh + i, exponential(load(fresh + i)));
        }
    }
};

void begin_joining(float* joined, int dim) {
    std::fill(joined, joined + dim, 0.0f);
    joined[padded(dim)] = LOWEST;
    joined[padded(dim) + 1] = 0.0f;
}

// Add a fresh result to what is joined. One function for all: others might round otherwise.
__attribute__((noinline)) void join_one(float* joined, const float* fresh, int dim, float old_share,
                                        float fresh_share) {
    float &top = joined[padded(dim)], &sum = joined[padded(dim) + 1];
    float fresh_top = fresh[padded(dim)], fresh_sum = fresh[padded(dim) + 1];
    if (fresh_sum == 0.0f) return;
    for (int d = 0; d < dim; d++) joined[d] = joined[d] * old_share + fresh[d] * fresh_share;
    sum = sum * old_share + fresh_sum * fresh_share;
    top = std::max(top, fresh_top);
}

// Join fresh results of up to 16 queries to what is joined of theirs.
void join_queries(Results joined, Results fresh, int count, int dim) {
    Shares shares{};
    for (int q = 0; q < count; q++) {
        float old = joined.at[q * joined.row + padded(dim)], now = fresh.at[q * fresh.row + padded(dim)];
        shares.old[q] = old - std::max(old, now), shares.fresh[q] = now - std::max(old, now);
    }
    shares.exponentials();
    for (int q = 0; q < count; q++)
        join_one(joined.at + q * joined.row, fresh.at + q * fresh.row, dim, shares.old[q], shares.fresh[q]);
}

// Join the results of all chunks of one query, which follow one another.
void join_chunks(float* joined, Results results, int chunks, int dim) {
    begin_joining(joined, dim);
    float top = LOWEST;
    for (int first = 0; first < chunks; first += 16) {
        int count = std::min(16, chunks - first);
        Shares shares{};
        for (int c = 0; c < count; c++) {
            float now = results.at[(first + c) * results.row + padded(dim)], both = std::max(top, now);
            shares.old[c] = top - both, shares.fresh[c] = now - both;
            top = both;
        }
        shares.exponentials();
        for (int c = 0; c < count; c++)
            join_one(joined, results.at + (first + c) * results.row, dim, shares.old[c], shares.fresh[c]);
    }
}

// What is joined of one head of one row, as attention leaves it.
void leave(const Attention& a, int row, int head, const float* joined) {
    int dim = a.shape.dim;
    float* to = a.attended.data + row * a.attended.stride + head * dim;
    for (int d = 0; d < dim; d++) to[d] = joined[d] / joined[padded(dim) + 1];
    a.attended.round(row, head * dim, dim);
}

}  // namespace
