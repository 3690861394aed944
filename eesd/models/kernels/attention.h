// Causal grouped-query attention over the live part of the cache, for all query rows of a call.
//
// The cache is taken in chunks of slots at fixed places; each gives every query a partial softmax, and these are joined
// in order. So a query's sums do not depend on what other queries there are, and threads can share the chunks or, of a
// prompt, the queries.
#pragma once

#include <type_traits>

#include "attention_tiles.h"

namespace {

// A matrix [k_count, size] as it lies in the cache, rows `step` apart.
template <class W>
struct Lying {
    const W* data;
    size_t step;
    int k_count, size;
};

// What a matrix is multiplied with, [queries, k_count].
template <class W>
struct Factors {
    const typename Kind<W>::Activation* data;
    size_t stride;
};

// Some panels of what `weigh` computes, from number n on.
template <class W, int Q, int PANELS>
void weigh_panels(Lying<W> w, int n, Factors<W> x, float* const* out, Ahead ahead) {
    constexpr int DEPTH = Kind<W>::DEPTH;
    vf acc[Q][PANELS][2];
    int count = w.k_count / DEPTH;
    multiply<W, Q, PANELS>(w.data + n, w.step * DEPTH, PANEL, x.data, x.stride, count, ahead, acc);
    if constexpr (DEPTH == 2) {
        // The line behind an odd last one may hold anything, and zero times that may be no number.
        for (int p = 0; p < PANELS && w.k_count % 2; p++) {
            typename Kind<W>::Vector low, high;
            load_last(w.data + n + p * PANEL + 2 * count * w.step, low, high);
            for (int q = 0; q < Q; q++) {
                auto value = spread(x.data[q * x.stride + count]);
                add_product(acc[q][p][0], low, value);
                add_product(acc[q][p][1], high, value);
            }
        }
    }
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < 2 * PANELS; p++) store(out[q] + n + p * LANES, acc[q][p / 2][p % 2]);
}

// out[q] = sum over k of x[q][k] * w[k], for Q queries; what comes next is fetched meanwhile.
template <class W, int Q>
void weigh(Lying<W> w, Factors<W> x, float* const* out, Ahead ahead) {
    constexpr int MOST = Q <= 3 ? 2 : 1;  // panels at once: enough sums under way
    int n = 0;
    for (; n + MOST * PANEL <= w.size; n += MOST * PANEL) {
        weigh_panels<W, Q, MOST>(w, n, x, out, ahead);
        if (ahead.at) ahead.at += MOST * PANEL * sizeof(W);
    }
    for (; n < w.size; n += PANEL) weigh_panels<W, Q, 1>(w, n, x, out, {});
}

template <class W>
void weigh(int queries, Lying<W> w, Factors<W> x, float* const* out, Ahead ahead) {
    switch (queries) {
#define TILE(n) \
    case n: return weigh<W, n>(w, x, out, ahead);
        EVERY_TILE
#undef TILE
    }
}

// As what the numbers of a cache are read.
template <class C>
using Read = std::conditional_t<std::is_same_v<C, bf16>, plain, C>;
template <class C>
const Read<C>* as_read(const C* x) { return reinterpret_cast<const Read<C>*>(x); }

// [queries, size] numbers as the factors of a matrix that is read so: rounded where it is read in pairs.
template <class W>
Factors<W> factors(const Attention& a, const float* x, int queries, int size) {
    if constexpr (Kind<W>::DEPTH == 1) {
        return {x, size_t(size)};
    } else {
        put_factors(a.narrow, x, queries * size);
        return {reinterpret_cast<const pair*>(a.narrow), size_t(size) / 2};
    }
}

// out[q] = weights [CHUNK] of query q times the values of a chunk. Rows that are no multiple of PANEL long are copied.
template <class C>
void weigh_values(const Attention& a, int queries, const C* values, int live, float* const* out, Ahead ahead) {
    int dim = a.shape.dim;
    if (dim % PANEL == 0) {
        Lying<Read<C>> w{as_read(values), size_t(dim), live, dim};
        return weigh(queries, w, factors<Read<C>>(a, a.scores, queries, CHUNK), out, ahead);
    }
    size_t row = padded(dim);
    for (int j = 0; j < live; j++)
        for (int d = 0; d < dim; d++) a.chunk_values[j * row + d] = to_float(values[size_t(j) * dim + d]);
    weigh(queries, Lying<float>{a.chunk_values, row, live, dim}, {a.scores, CHUNK}, out, ahead);
}

// Whether a chunk of this cache goes by tiles.
template <class C>
bool takes_tiles(const Attention& a) {
    return std::is_same_v<C, bf16> && by_tiles(a.shape.dim);
}

// For so few queries chunks are read as they lie.
constexpr int FEW = 4;
bool few(const Attention& a) { return a.queries_of_head() <= FEW; }

// Some queries of a key-value head, as its chunks are multiplied with them.
template <class C>
void prepare(Attention& a, int batch, int head, Part queries) {
    int dim = a.shape.dim, group = a.group();
    for (int q = queries.first; q < queries.last; q++) {
        int row = a.row_of(batch, q);
        const float* x = a.qkv + row * a.qkv_row + size_t(head * group + q % group) * dim;
        rotate(a, x, a.layer.q_norm, row, a.queries + size_t(q) * dim);
    }
    if (!takes_tiles<C>(a)) return;
    size_t first = size_t(queries.first) * dim;
    put_factors(a.narrow_queries + first, a.queries + first, queries.size() * dim);
    if (few(a)) widen(a.queries + first, a.narrow_queries + first, queries.size() * dim);
}

// As `attend_chunk`, by vectors.
template <class C>
void attend_chunk_by_vectors(Attention& a, int batch, int head, int chunk, int live, Part queries, const C* keys,
                             const C* values, size_t next) {
    int dim = a.shape.dim, start = chunk * CHUNK;
    for (int first = queries.first; first < queries.last; first += MAX_TILE) {
        int count = std::min(MAX_TILE, queries.last - first);
        if (a.together && unseen(a, batch, first, count, start)) continue;
        Results results = a.results(batch, head, first, chunk);
        float *out[MAX_TILE], *scores[MAX_TILE];
        for (int q = 0; q < count; q++) out[q] = results.at + q * results.row, scores[q] = a.scores + q * CHUNK;
        // While the keys are read the values are fetched, and meanwhile the keys of the next task.
        // Slots past the live ones hold anything: `soften` drops their scores, and their values are not read.
        Ahead to_values{reinterpret_cast<const char*>(values), CHUNK * sizeof(C)};
        Ahead to_keys{reinterpret_cast<const char*>(keys + next), dim * sizeof(C)};
        if (first > queries.first) to_values = to_keys = {};
        Lying<Read<C>> w{as_read(keys), CHUNK, dim, CHUNK};
        weigh(count, w, factors<Read<C>>(a, a.queries + size_t(first) * dim, count, dim), scores, to_values);
        for (int q = 0; q < count; q++) {
            float* sums = out[q] + padded(dim);
            soften(a, a.row_of(batch, first + q), start, live, scores[q], sums[0], sums[1]);
        }
        weigh_values(a, count, values, live, out, to_keys);
        if (a.together) join_queries(a.joined(first), results, count, dim);
    }
}

// One chunk of slots of one key-value head, for some queries of a batch row: a partial softmax each.
template <class C>
void attend_chunk(Attention& a, int batch, int head, int chunk, int live, Part queries) {
    int start = chunk * CHUNK, dim = a.shape.dim;
    // What is most likely the next task: the next chunk, or the first one of the next head.
    size_t next = start + CHUNK < live ? size_t(CHUNK) * dim : a.call.key_head - size_t(start) * dim;
    const C *keys = a.chunk_of<C>(a.keys, batch, head, start), *values = a.chunk_of<C>(a.values, batch, head, start);
    live = std::min(live - start, CHUNK);
#if defined(EESD_TILES)
    if constexpr (std::is_same_v<C, bf16>)
        if (takes_tiles<C>(a)) {
            if (!few(a)) return attend_chunk_by_tiles(a, batch, head, chunk, live, queries, keys, values, next);
            switch (queries.size()) {
                case 1: return attend_chunk_lying<1>(a, batch, head, chunk, live, keys, values, next);
                case 2: return attend_chunk_lying<2>(a, batch, head, chunk, live, keys, values, next);
                case 3: return attend_chunk_lying<3>(a, batch, head, chunk, live, keys, values, next);
                case 4: return attend_chunk_lying<4>(a, batch, head, chunk, live, keys, values, next);
            }
        }
#endif
    attend_chunk_by_vectors(a, batch, head, chunk, live, queries, keys, values, next);
}

// Calls task(batch, head, chunk) for this thread's even share of all chunks, or of those that tokens are written to.
template <class Task>
void share_chunks(const Attention& a, const int* live, bool written, Place place, Task task) {
    auto first = [&](int b) {
        const int* slots = a.call.slots + b * a.call.seq;
        return written ? *std::min_element(slots, slots + a.call.seq) / CHUNK : 0;
    };
    int total = 0, at = 0;
    for (int b = 0; b < a.call.batch; b++) total += a.shape.kv_heads * (chunk_count(live[b]) - first(b));
    Part mine = part(total, place.thread, place.threads);
    for (int b = 0; b < a.call.batch; b++)
        for (int head = 0; head < a.shape.kv_heads; head++)
            for (int chunk = first(b); chunk < chunk_count(live[b]); chunk++, at++)
                if (at >= mine.first && at < mine.last) task(b, head, chunk);
}

// Whether there are enough queries to share them out, and not the chunks: two tiles for every thread at least.
bool shares_queries(const Shape& s, const Call& call) {
    int queries = call.seq * (s.heads / s.kv_heads);
    return queries >= 4 * TILE_ROWS && tile_count(queries) * s.kv_heads * call.batch >= 2 * call.threads;
}

// Some queries of a key-value head through all chunks that any of them sees.
template <class C>
void attend_queries(Attention& a, int batch, int head, int live, Part queries) {
    prepare<C>(a, batch, head, queries);
    for (int q = queries.first; q < queries.last; q++) begin_joining(a.joined(q).at, a.shape.dim);
    for (int chunk = 0; chunk < chunk_count(live); chunk++)
        if (!unseen(a, batch, queries.first, queries.size(), chunk * CHUNK))
            attend_chunk<C>(a, batch, head, chunk, live, queries);
    for (int q = queries.first; q < queries.last; q++)
        leave(a, a.row_of(batch, q), head * a.group() + q % a.group(), a.joined(q).at);
}

// Attention of a call. Of many queries each thread takes some through all chunks, once the cache is written; of few, it
// takes some chunks, and results are joined when all are there.
template <class C, class Wait>
void attend(Attention& a, const int* live, Place place, Wait wait) {
    int dim = a.shape.dim, group = a.group(), queries = a.queries_of_head(), prepared = -1;
    if (a.together) {
        share_chunks(a, live, true, place, [&](int b, int head, int chunk) { write_chunk<C>(a, b, head, chunk); });
        wait();
        int tiles = tile_count(queries), heads = a.call.batch * a.shape.kv_heads;
        Part mine = part(heads * tiles, place.thread, place.threads);
        for (int i = mine.first / tiles; i * tiles < mine.last; i++) {
            int first = std::max(mine.first - i * tiles, 0), last = std::min(mine.last - i * tiles, tiles);
            int b = i / a.shape.kv_heads, head = i % a.shape.kv_heads;
            attend_queries<C>(a, b, head, live[b], {first * TILE_ROWS, std::min(last * TILE_ROWS, queries)});
        }
        return;
    }
    share_chunks(a, live, false, place, [&](int b, int head, int chunk) {
        write_chunk<C>(a, b, head, chunk);
        if (prepared != b * a.shape.kv_heads + head) prepare<C>(a, b, head, {0, queries});
        prepared = b * a.shape.kv_heads + head;
        attend_chunk<C>(a, b, head, chunk, live[b], {0, queries});
    });
    wait();
    Part joins = part(a.call.batch * a.call.seq * a.shape.heads, place.thread, place.threads);
    for (int j = joins.first; j < joins.last; j++) {
        int row = j / a.shape.heads, head = j % a.shape.heads, b = row / a.call.seq;
        int query = row % a.call.seq * group + head % group;
        join_chunks(a.room, {a.results(b, head / group, query, 0).at, a.partial_row()}, chunk_count(live[b]), dim);
        leave(a, row, head, a.room);
    }
}

}  // namespace
