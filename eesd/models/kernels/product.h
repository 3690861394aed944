// Skinny products: a packed weight matrix times a few rows of activations; each weight comes from memory once.
#pragma once

#include <algorithm>

#include "amx.h"

namespace {

enum Format : int32_t { FLOAT32, BFLOAT16, PAIRS };

struct Matrix {  // packed [panels][k][PANEL] on the Python side, as PAIRS [panels][k / 2][PANEL][2]
    const void* data;
    const float* bias;  // null: none
    int32_t outputs, inputs;
    Format format;
};

struct Part {
    int first, last;
    int size() const { return last - first; }
};
Part part(int count, int thread, int threads) {
    return {int(int64_t(count) * thread / threads), int(int64_t(count) * (thread + 1) / threads)};
}

struct Place {
    int thread, threads;  // a runtime may give fewer than asked for
};

// Some panels of a matrix.
Matrix slice(const Matrix& m, Part panels) {
    size_t first = size_t(panels.first) * PANEL, width = m.format == FLOAT32 ? sizeof(float) : sizeof(bf16);
    return {static_cast<const char*>(m.data) + first * m.inputs * width, m.bias ? m.bias + first : nullptr,
            panels.size() * PANEL, m.inputs, m.format};
}

struct Rows {
    const float* data;
    const bf16* narrow;  // the numbers rounded, which is all that PAIRS read; null where there are none
    size_t stride;
    int count;
};
inline const float* steps(Rows x, const float*) { return x.data; }
inline const pair* steps(Rows x, const pair*) { return reinterpret_cast<const pair*>(x.narrow); }

void put(float* to, const float* from, int n) { std::copy(from, from + n, to); }
void put(bf16* to, const float* from, int n) {
    for (int i = 0; i < n; i++) to[i] = to_bf16(from[i]);
}
void put(float& to, float from) { to = from; }
void put(bf16& to, float from) { to = to_bf16(from); }

// Rows of activations that products read: as they are, rounded where the weights are PAIRS, or both.
struct Activations {
    float* data;
    bf16* narrow;
    size_t stride;
    Rows rows(int count) const { return {data, narrow, stride, count}; }
    // As a matrix of this format reads them.
    void put(Format format, int row, size_t first, const float* from, int count) const {
        size_t at = row * stride + first;
        format == PAIRS ? put_factors(narrow + at, from, count) : ::put(data + at, from, count);
    }
    void round(int row, size_t first, size_t count) const {
        size_t at = row * stride + first;
        if (narrow) put_factors(narrow + at, data + at, count);
    }
};

struct Output {
    float* data;
    size_t stride;
    bool add;  // to what is there
};

template <class W, int ROWS, int PANELS>
void panel_tile(const Matrix& m, int panel, Rows x, int row, Output y, Ahead ahead) {
    vf acc[ROWS][PANELS][2];
    constexpr int DEPTH = Kind<W>::DEPTH;
    size_t count = m.inputs / DEPTH, size = count * PANEL, stride = x.stride / DEPTH;
    const W* weights = static_cast<const W*>(m.data) + panel * size;
    auto activations = steps(x, static_cast<const typename Kind<W>::Activation*>(nullptr)) + row * stride;
    multiply<W, ROWS, PANELS>(weights, PANEL, size, activations, stride, count, ahead, acc);
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2 * PANELS; half++) {
            int n = panel * PANEL + half * LANES;
            vf value = acc[r][half / 2][half % 2];
            if (m.bias) value += load(m.bias + n);
            float* to = y.data + (row + r) * y.stride + n;
            store(to, y.add ? load(to) + value : value);
        }
}

template <class W>
void panel_rows(const Matrix& m, int panel, Rows x, Part rows, Output y, Ahead ahead) {
    switch (rows.size()) {
#define TILE(n) \
    case n: return panel_tile<W, n, 1>(m, panel, x, rows.first, y, ahead);
        EVERY_TILE
#undef TILE
    }
}

// y = x w^T for some panels. Few rows take several panels at once, to have enough sums under way; pairs have enough
// from two rows on.
template <class W>
void product_as(const Matrix& m, Part panels, Rows x, Output y) {
    int panel = panels.first;
    if (x.count == 1)
        for (; panel + 4 <= panels.last; panel += 4) panel_tile<W, 1, 4>(m, panel, x, 0, y, {});
    if (x.count == 2 && Kind<W>::DEPTH == 1)
        for (; panel + 2 <= panels.last; panel += 2) panel_tile<W, 2, 2>(m, panel, x, 0, y, {});
    if (x.count == 3 && Kind<W>::DEPTH == 1)
        for (; panel + 2 <= panels.last; panel += 2) panel_tile<W, 3, 2>(m, panel, x, 0, y, {});
    int tiles = (x.count + MAX_TILE - 1) / MAX_TILE;
    size_t bytes = size_t(m.inputs) / Kind<W>::DEPTH * PANEL * sizeof(W);
    for (; panel < panels.last; panel++) {
        const char* next = static_cast<const char*>(m.data) + (panel + 1) * bytes;
        // Every tile fetches its share of the next panel: else the first would wait for memory that others do not use.
        for (int t = 0; t < tiles; t++) {
            Ahead share{next + bytes / tiles * t, PANEL * sizeof(W) / tiles};
            panel_rows<W>(m, panel, x, part(x.count, t, tiles), y, share);
        }
    }
}

#if defined(EESD_TILES)
// A panel times one or two tiles of rows, from tile t on.
template <int ROWS>
void panel_of_tiles(const Matrix& m, int panel, Rows x, const Tiling& rows, int t, Output y, Ahead ahead) {
    const pair* w = static_cast<const pair*>(m.data) + size_t(panel) * (m.inputs / 2) * PANEL;
    const pair* const columns[] = {w, w + TILE_ROWS};
    const bf16* from[ROWS];
    for (int r = 0; r < ROWS; r++) from[r] = x.narrow + rows.first(t + r) * x.stride;
    tile_sums(from, x.stride * sizeof(bf16), columns, PANEL * sizeof(pair), m.inputs / TILE_DEPTH, ahead);
    for (int r = 0; r < ROWS; r++) {
        alignas(64) float sums[TILE_ROWS * PANEL];
        float* to = y.data + rows.first(t + r) * y.stride + panel * PANEL;
        bool as_they_are = !m.bias && !y.add;  // rows that two tiles share are written twice, the same
        float* out = as_they_are ? to : sums;
        size_t out_row = as_they_are ? y.stride : PANEL;
        r ? store_second_sums(out, out_row) : store_sums<2>(out, out_row);
        for (int i = rows.shared(t + r); i < rows.height && !as_they_are; i++)
            for (int half = 0; half < PANEL; half += LANES) {
                vf value = load(sums + i * PANEL + half);
                if (m.bias) value += load(m.bias + panel * PANEL + half);
                float* at = to + i * y.stride + half;
                store(at, y.add ? load(at) + value : value);
            }
    }
}

// A row times some panels by vectors, which read memory faster than tiles do, summed as those sum.
template <int PANELS>
void panels_of_row(const Matrix& m, int panel, Rows x, Output y) {
    constexpr size_t NEAR = 1024 / sizeof(pair);  // ahead in every panel
    const size_t size = size_t(m.inputs / 2) * PANEL;
    const pair *w = static_cast<const pair*>(m.data) + panel * size, *factors = reinterpret_cast<const pair*>(x.narrow);
    auto even = [](__m512i both) { return (__m512)_mm512_slli_epi32(both, 16); };
    auto odd = [](__m512i both) { return (__m512)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)); };
    vf sums[PANELS][2] = {};
    for (int k = 0; k < m.inputs / 2; k += TILE_DEPTH / 2) {
        __m512 evens[PANELS][2] = {}, odds[PANELS][2] = {};
        for (int i = k; i < k + TILE_DEPTH / 2; i++) {
            __m512i factor = (__m512i)spread(factors[i]);
            __m512 first = even(factor), second = odd(factor);
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const pair* at = w + p * size + i * PANEL + half * LANES;
                    _mm_prefetch(at + NEAR, _MM_HINT_T1);
                    __m512i both = _mm512_loadu_si512(at);
                    evens[p][half] = _mm512_fmadd_ps(even(both), first, evens[p][half]);
                    odds[p][half] = _mm512_fmadd_ps(odd(both), second, odds[p][half]);
                }
        }
        for (int p = 0; p < PANELS; p++)
            for (int half = 0; half < 2; half++) sums[p][half] += (vf)(evens[p][half] + odds[p][half]);
    }
    for (int p = 0; p < PANELS; p++)
        for (int half = 0; half < 2; half++) {
            int n = (panel + p) * PANEL + half * LANES;
            if (m.bias) sums[p][half] += load(m.bias + n);
            store(y.data + n, y.add ? load(y.data + n) + sums[p][half] : sums[p][half]);
        }
}

void product_of_tiles(const Matrix& m, Part panels, Rows x, Output y, Tiles& tiles) {
    Tiling rows(x.count);
    int panel = panels.first;
    if (x.count == 1)
        for (; panel + 4 <= panels.last; panel += 4) panels_of_row<4>(m, panel, x, y);
    tiles.shape(rows.height);
    constexpr size_t NEAR = 8192;  // bytes: as far as memory is behind
    constexpr size_t STEP = TILE_DEPTH * PANEL * sizeof(bf16);
    const size_t size = m.inputs / TILE_DEPTH * STEP, passes = (rows.tiles + 1) / 2;
    const size_t share = (STEP / passes + 63) / 64 * 64;
    for (; panel < panels.last; panel++) {
        const char* here = static_cast<const char*>(m.data) + panel * size;
        for (int t = 0; t < rows.tiles; t += 2) {
            // Each pass over a panel fetches its share of the next one; the first to read what nobody fetched, that.
            bool itself = passes == 1 || (t == 0 && here != tiles.fetched);
            Ahead ahead = itself ? Ahead{here + NEAR, STEP} : Ahead{here + size + t / 2 * (size / STEP) * share, share};
            t + 1 < rows.tiles ? panel_of_tiles<2>(m, panel, x, rows, t, y, ahead)
                               : panel_of_tiles<1>(m, panel, x, rows, t, y, ahead);
        }
        if (passes > 1) tiles.fetched = here + size;
    }
}
#endif

void product(const Matrix& m, Part panels, Rows x, Output y, Tiles& tiles) {
#if defined(EESD_TILES)
    if (m.format == PAIRS && by_tiles(m.inputs)) return product_of_tiles(m, panels, x, y, tiles);
#endif
    (void)tiles;
    switch (m.format) {
        case FLOAT32: return product_as<float>(m, panels, x, y);
        case BFLOAT16: return product_as<bf16>(m, panels, x, y);
#if defined(__AVX512BF16__)
        case PAIRS: return product_as<pair>(m, panels, x, y);
#endif
        default: return;
    }
}

int panel_count(const Matrix& m) { return (m.outputs + PANEL - 1) / PANEL; }

}  // namespace
