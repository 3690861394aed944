// What a layer and a call consist of, what attention has for them, and how it writes the cache.
#pragma once

#include <cmath>

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

struct Results {  // that follow one another, `row` floats apart
    float* at;
    size_t row;
};

// Everything one layer's attention needs.
struct Attention {
    const Shape& shape;
    const Call& call;
    const Layer& layer;
    const float* qkv;  // [rows, qkv_row]
    size_t qkv_row;
    void *keys, *values;
    Activations attended;  // [rows, heads * dim]: what becomes of it
    // Partial results, `partial_row()` floats each: sums [dim], the top of the scores, and the sum of weights. Where a
    // thread takes queries through all chunks, what it has joined so far of those of one key-value head; else those of
    // all chunks, [kv_heads][rows][heads of one][chunks].
    bool together;
    float* partial;
    int chunks;
    // This thread's. Of tiles, keys and values of a chunk in pairs of lines lie in `chunk_values`.
    float *queries, *chunk_values, *scores;
    float* room;                    // for a tile's results of a chunk that are joined, or for what they are joined to
    bf16 *narrow, *narrow_queries;  // rounded: what multiplies the cache
    Tiles& tiles;

    int group() const { return shape.heads / shape.kv_heads; }
    int queries_of_head() const { return call.seq * group(); }
    int row_of(int batch, int query) const { return batch * call.seq + query / group(); }
    static size_t partial_row(int dim) { return padded(dim) + PAD / 2; }
    size_t partial_row() const { return partial_row(shape.dim); }
    // Keys or values of a key-value head from the first slot of a chunk on.
    template <class C>
    C* chunk_of(void* all, int batch, int head, int start) const {
        return static_cast<C*>(all) + batch * call.key_batch + head * call.key_head + size_t(start) * shape.dim;
    }
    Results joined(int query) const { return {partial + query * partial_row(), partial_row()}; }
    Results results(int batch, int head, int query, int chunk) const {
        if (together) return {room, partial_row()};
        size_t before = (size_t(head) * call.batch + batch) * queries_of_head() + query;
        return {partial + (before * chunks + chunk) * partial_row(), chunks * partial_row()};
    }
};

// Norm (where the model has it) and rotate one head of one row. One function for all: others might round otherwise.
__attribute__((noinline)) void rotate(const Attention& a, const float* x, const float* norm, int row, float* y) {
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

// Write the new keys and values whose slots lie in a chunk.
template <class C>
void write_chunk(const Attention& a, int batch, int head, int chunk) {
    const Shape& s = a.shape;
    const int start = chunk * CHUNK;
    C *keys = a.chunk_of<C>(a.keys, batch, head, start), *values = a.chunk_of<C>(a.values, batch, head, start);
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

}  // namespace
