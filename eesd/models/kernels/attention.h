// Causal grouped-query attention over the live part of the cache, for all query rows of a call.
//
// The cache is taken in chunks of slots at fixed places; each gives every query a partial softmax, and these are joined
// in order. So a query's sums do not depend on what other queries there are, and threads can share the chunks.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "product.h"

namespace {

constexpr int CHUNK = 64;  // slots of the cache that attention takes at a time; part of the order of its sums
constexpr int PAD = 32;    // row strides of buffers are multiples of it, whatever the vector width
constexpr int QUERIES = std::max(MAX_TILE, TILE_ROWS);  // at most so many queries take a chunk at once

struct Layer {
    // Panels of gate and up alternate. Without data in qkv there is no attention, in gate_up no MLP.
    Matrix qkv, o, gate_up, down;
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm;
};

struct Shape {
    int32_t hidden, heads, kv_heads, dim, intermediate;
    float eps;
    int32_t is_bf16;  // states between layers and cache
};

struct Call {
    void *input, *output;        // [rows, hidden]
    int32_t batch, seq, window;  // window 0: none
    const int32_t *slots, *positions;  // [batch * seq]
    const uint8_t* mask;               // [batch * seq, mask_stride], null: causal
    int64_t mask_stride;
    const float *cosine, *sine;  // [positions, dim]
    void *keys, *values;  // of the first layer: keys [chunks, dim, CHUNK], values [chunks * CHUNK, dim]
    int64_t key_layer, key_batch, key_head;  // strides of both: bytes between layers, elements within one
    int32_t threads;
};

int chunk_count(int live) { return (live + CHUNK - 1) / CHUNK; }

size_t padded(size_t n) { return (n + PAD - 1) / PAD * PAD; }

float lane_sum(const float* s) {  // of 16, as a fixed tree
    float t[8];
    for (int i = 0; i < 8; i++) t[i] = s[i] + s[i + 8];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

float lane_top(const float* s) {  // of 16
    float t[8];
    for (int i = 0; i < 8; i++) t[i] = std::max(s[i], s[i + 8]);
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; i++) t[i] = std::max(t[i], t[i + width]);
    return t[0];
}

// Without a weight (null) all numbers weigh the same.
void rms_norm(const float* x, const float* weight, float* y, int size, float eps) {
    float squares[16] = {};
    int i = 0;
    for (; i + 16 <= size; i += 16)
        for (int j = 0; j < 16; j++) squares[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < size; j++) squares[j] += x[i + j] * x[i + j];
    float scale = 1.0f / std::sqrt(lane_sum(squares) / size + eps);
    for (int j = 0; j < size; j++) y[j] = weight ? x[j] * scale * weight[j] : x[j] * scale;
}

// Everything one layer's attention needs. `C` is how the cache is stored.
struct Attention {
    const Shape& shape;
    const Call& call;
    const Layer& layer;
    const float* qkv;  // [rows, qkv_row]
    size_t qkv_row;
    void *keys, *values;
    float* partial;  // [kv_heads][rows][heads of one][chunks][dim, 2]
    int chunks;
    // This thread's. Of tiles, keys and values of a chunk in pairs of lines lie in `chunk_values`.
    float *queries, *chunk_values, *scores;
    bf16* narrow;                            // room to round what multiplies the cache
    Tiles& tiles;

    // Partial results of one head of one row, `partial_row()` floats for each chunk. The queries of a key-value head lie
    // side by side.
    float* partial_of(int row, int head) const {
        int group = shape.heads / shape.kv_heads, rows = call.batch * call.seq;
        return partial + ((size_t(head / group) * rows + row) * group + head % group) * chunks * partial_row();
    }
    size_t partial_row() const { return padded(shape.dim) + 2; }
};

// Norm (where the model has it) and rotate one head of one row.
void rotate(const Attention& a, const float* x, const float* norm, int row, float* y) {
    int dim = a.shape.dim, half = dim / 2;
    float normed[1024];
    if (norm) rms_norm(x, norm, normed, dim, a.shape.eps), x = normed;
    size_t at = size_t(a.call.positions[row]) * dim;
    const float *c = a.call.cosine + at, *s = a.call.sine + at;
    for (int i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        y[i] = first * c[i] - second * s[i];
        y[i + half] = second * c[i] + first * s[i];
    }
}

void put(float* to, const float* from, int n) { std::copy(from, from + n, to); }
void put(bf16* to, const float* from, int n) {
    for (int i = 0; i < n; i++) to[i] = to_bf16(from[i]);
}
void put(float& to, float from) { to = from; }
void put(bf16& to, float from) { to = to_bf16(from); }

// Write the new keys and values whose slots lie in the chunk from `start` on.
template <class C>
void write_chunk(const Attention& a, int batch, int head, int start, C* keys, C* values) {
    const Shape& s = a.shape;
    float key[1024];
    for (int row = batch * a.call.seq; row < (batch + 1) * a.call.seq; row++) {
        int slot = a.call.slots[row] - start;
        if (slot < 0 || slot >= CHUNK) continue;
        const float* x = a.qkv + row * a.qkv_row + size_t(s.heads + head) * s.dim;
        rotate(a, x, a.layer.k_norm, row, key);
        for (int d = 0; d < s.dim; d++) put(keys[d * CHUNK + slot], key[d]);
        put(values + size_t(slot) * s.dim, x + size_t(s.kv_heads) * s.dim, s.dim);
    }
}

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

// Turn scores [CHUNK] of one query into weights relative to their largest; returns that and their sum.
void soften(const Attention& a, int row, int start, int live, float* scores, float& top, float& sum) {
    const float lowest = -std::numeric_limits<float>::infinity();
    int slot = a.call.slots[row], from = a.call.window ? std::max(0, slot - a.call.window + 1) : 0, to = slot + 1;
    if (a.call.mask) {
        const uint8_t* mask = a.call.mask + row * a.call.mask_stride + start;
        for (int j = 0; j < live; j++)
            if (!mask[j]) scores[j] = lowest;
        from = 0, to = start + live;
    }
    for (int j = 0; j < std::min(from - start, CHUNK); j++) scores[j] = lowest;
    for (int j = std::max(0, std::min(to - start, live)); j < CHUNK; j++) scores[j] = lowest;

    float tops[16], sums[16] = {}, scale = 1.0f / std::sqrt(float(a.shape.dim));
    std::fill(tops, tops + 16, lowest);
    for (int j = 0; j < CHUNK; j += 16)
        for (int i = 0; i < 16; i++) tops[i] = scores[j + i] > tops[i] ? scores[j + i] : tops[i];
    top = lane_top(tops) * scale;
    float shift = top == lowest ? 0.0f : top;  // nothing seen: all weights zero
    for (int j = 0; j < CHUNK; j += LANES) store(scores + j, exponential(load(scores + j) * scale - shift));
    for (int j = 0; j < CHUNK; j += 16)
        for (int i = 0; i < 16; i++) sums[i] += scores[j + i];
    sum = lane_sum(sums);
}

#if defined(EESD_TILES)
// [lines, width] numbers of a chunk in pairs of lines; from line `live` on zero. Those that come `next` are fetched into
// the second cache meanwhile.
void pair_lines(const bf16* from, int lines, int live, int width, const bf16* next, pair* to) {
    auto read = [&](int k, int n) {
        size_t at = size_t(k) * width + n;
        __builtin_prefetch(next + at, 0, 2);
        return k < live ? _mm512_loadu_si512(from + at) : _mm512_setzero_si512();
    };
    for (int k = 0; k < lines; k += 2)
        for (int n = 0; n < width; n += PANEL) {
            __m512bh low, high;
            interleave(read(k, n), read(k + 1, n), low, high);
            pair* at = to + size_t(k / 2) * width + n;
            _mm512_storeu_si512(at, (__m512i)low);
            _mm512_storeu_si512(at + LANES, (__m512i)high);
        }
}

// out [queries, size] = x [queries, k_count] times paired lines of w.
void weigh_tiles(const Attention& a, int queries, const float* x, int k_count, const pair* w, int size, float* out,
                 size_t out_row) {
    put_factors(a.narrow, x, queries * k_count);
    a.tiles.shape(queries);
    const bf16* const rows[] = {a.narrow};
    size_t row = k_count * sizeof(bf16), line = size * sizeof(pair);
    int n = 0, steps = k_count / TILE_DEPTH;
    for (; n + 4 * TILE_ROWS <= size; n += 4 * TILE_ROWS) {
        const pair* const columns[] = {w + n, w + n + TILE_ROWS, w + n + 2 * TILE_ROWS, w + n + 3 * TILE_ROWS};
        tile_sums(rows, row, columns, line, steps, {});
        store_sums<4>(out + n, out_row);
    }
    for (; n < size; n += 2 * TILE_ROWS) {
        const pair* const columns[] = {w + n, w + n + TILE_ROWS};
        tile_sums(rows, row, columns, line, steps, {});
        store_sums<2>(out + n, out_row);
    }
}

// As `attend_chunk`, by tiles, for heads of a multiple of 32 numbers.
void attend_chunk_by_tiles(Attention& a, int batch, int head, int chunk, int live, const bf16* keys, const bf16* values,
                           size_t next) {
    int group = a.shape.heads / a.shape.kv_heads, queries = a.call.seq * group, first_row = batch * a.call.seq;
    int dim = a.shape.dim, start = chunk * CHUNK;
    size_t query_row = a.chunks * a.partial_row();
    pair* paired_keys = reinterpret_cast<pair*>(a.chunk_values);
    pair* paired_values = paired_keys + size_t(CHUNK) * dim / 2;
    pair_lines(keys, dim, dim, CHUNK, keys + next, paired_keys);
    pair_lines(values, CHUNK, live, dim, values + next, paired_values);
    for (int first = 0; first < queries; first += TILE_ROWS) {
        int count = std::min(TILE_ROWS, queries - first);
        float* out = a.partial_of(first_row, head * group) + first * query_row + chunk * a.partial_row();
        weigh_tiles(a, count, a.queries + size_t(first) * dim, dim, paired_keys, CHUNK, a.scores, CHUNK);
        for (int q = 0; q < count; q++) {
            float* sums = out + q * query_row + padded(dim);
            soften(a, first_row + (first + q) / group, start, live, a.scores + q * CHUNK, sums[0], sums[1]);
        }
        weigh_tiles(a, count, a.scores, CHUNK, paired_values, dim, out, query_row);
    }
}
#endif

// One chunk of slots of one key-value head, for all the queries of a batch row: a partial softmax each.
template <class C>
void attend_chunk(Attention& a, int batch, int head, int chunk, int live) {
    const Shape& s = a.shape;
    int group = s.heads / s.kv_heads, queries = a.call.seq * group, first_row = batch * a.call.seq;
    int start = chunk * CHUNK;
    size_t offset = batch * a.call.key_batch + head * a.call.key_head, dim_row = padded(s.dim);
    C *keys = static_cast<C*>(a.keys) + offset, *values = static_cast<C*>(a.values) + offset;
    // What is most likely the next task: the next chunk, or the first one of the next head.
    size_t next = start + CHUNK < live ? size_t(CHUNK) * s.dim : a.call.key_head - size_t(start) * s.dim;
    keys += size_t(start) * s.dim, values += size_t(start) * s.dim;
    write_chunk(a, batch, head, start, keys, values);
    live = std::min(live - start, CHUNK);
#if defined(EESD_TILES)
    if constexpr (std::is_same_v<C, bf16>)
        if (by_tiles(s.dim))
            return attend_chunk_by_tiles(a, batch, head, chunk, live, keys, values, next);
#endif

    for (int first = 0; first < queries; first += MAX_TILE) {
        int count = std::min(MAX_TILE, queries - first);
        float *out[MAX_TILE], *scores[MAX_TILE];
        for (int q = 0; q < count; q++) {
            int row = first_row + (first + q) / group, query_head = head * group + (first + q) % group;
            out[q] = a.partial_of(row, query_head) + chunk * a.partial_row();
            scores[q] = a.scores + q * CHUNK;
        }
        // While the keys are read the values are fetched, and meanwhile the keys of the next task.
        // Slots past the live ones hold anything: `soften` drops their scores, and their values are not read.
        Ahead to_values{reinterpret_cast<const char*>(values), CHUNK * sizeof(C)};
        Ahead to_keys{reinterpret_cast<const char*>(keys + next), s.dim * sizeof(C)};
        if (first > 0) to_values = to_keys = {};
        Lying<Read<C>> w{as_read(keys), CHUNK, s.dim, CHUNK};
        weigh(count, w, factors<Read<C>>(a, a.queries + size_t(first) * s.dim, count, s.dim), scores, to_values);
        for (int q = 0; q < count; q++)
            soften(a, first_row + (first + q) / group, start, live, scores[q], out[q][dim_row], out[q][dim_row + 1]);
        weigh_values(a, count, values, live, out, to_keys);
    }
}

// All chunks of all key-value heads of all batch rows, shared out evenly.
template <class C>
void attend(Attention& a, const int* live, int thread, int threads) {
    const Shape& s = a.shape;
    int group = s.heads / s.kv_heads, total = 0, prepared = -1;
    for (int b = 0; b < a.call.batch; b++) total += s.kv_heads * chunk_count(live[b]);
    Part mine = part(total, thread, threads);
    for (int b = 0, task = 0; b < a.call.batch; b++)
        for (int head = 0; head < s.kv_heads; head++)
            for (int chunk = 0; chunk * CHUNK < live[b]; chunk++, task++) {
                if (task < mine.first || task >= mine.last) continue;
                if (prepared != b * s.kv_heads + head) {
                    prepared = b * s.kv_heads + head;
                    for (int q = 0; q < a.call.seq * group; q++) {
                        int row = b * a.call.seq + q / group;
                        const float* x = a.qkv + row * a.qkv_row + size_t(head * group + q % group) * s.dim;
                        rotate(a, x, a.layer.q_norm, row, a.queries + size_t(q) * s.dim);
                    }
                }
                attend_chunk<C>(a, b, head, chunk, live[b]);
            }
}

// Join the partial softmaxes of one head of one row, in the order of the chunks.
void join(const Attention& a, int row, int head, int chunks, float* y) {
    int dim = a.shape.dim;
    size_t part_row = a.partial_row();
    const float* p = a.partial_of(row, head);
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
    std::fill(y, y + dim, 0.0f);
    for (int c = 0; c < chunks; c++, p += part_row) {
        float chunk_top = p[part_row - 2], chunk_sum = p[part_row - 1];
        if (chunk_sum == 0.0f) continue;
        float both = std::max(top, chunk_top);
        float old = exponential(all(top - both))[0], fresh = exponential(all(chunk_top - both))[0];
        for (int d = 0; d < dim; d++) y[d] = y[d] * old + p[d] * fresh;
        sum = sum * old + chunk_sum * fresh;
        top = both;
    }
    for (int d = 0; d < dim; d++) y[d] /= sum;
}

}  // namespace
