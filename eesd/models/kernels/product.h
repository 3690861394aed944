// Skinny products: a packed weight matrix times a few rows of activations; each weight comes from memory once.
#pragma once

#include <algorithm>

#include "tile.h"

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
};
Part part(int count, int thread, int threads) {
    return {int(int64_t(count) * thread / threads), int(int64_t(count) * (thread + 1) / threads)};
}

struct Rows {
    const float* data;
    const bf16* narrow;  // the same numbers rounded, for PAIRS; null where there are none
    size_t stride;
    int count;
};
inline const float* steps(Rows x, const float*) { return x.data; }
inline const pair* steps(Rows x, const pair*) { return reinterpret_cast<const pair*>(x.narrow); }

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
    switch (rows.last - rows.first) {
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

void product(const Matrix& m, Part panels, Rows x, Output y) {
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
