// A chunk of the cache by the tiles of AMX, which want its lines in pairs; for a few queries lines are read as they lie,
// by vectors that sum as tiles do.
#pragma once

#include "softmax.h"

namespace {

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
void weigh_tiles(Tiles& tiles, int queries, const bf16* x, int k_count, const pair* w, int size, Results out) {
    tiles.shape(queries);
    const bf16* const rows[] = {x};
    size_t row = k_count * sizeof(bf16), line = size * sizeof(pair);
    int n = 0, steps = k_count / TILE_DEPTH;
    for (; n + 4 * TILE_ROWS <= size; n += 4 * TILE_ROWS) {
        const pair* const columns[] = {w + n, w + n + TILE_ROWS, w + n + 2 * TILE_ROWS, w + n + 3 * TILE_ROWS};
        tile_sums(rows, row, columns, line, steps, {});
        store_sums<4>(out.at + n, out.row);
    }
    for (; n < size; n += 2 * TILE_ROWS) {
        const pair* const columns[] = {w + n, w + n + TILE_ROWS};
        tile_sums(rows, row, columns, line, steps, {});
        store_sums<2>(out.at + n, out.row);
    }
}

// As `attend_chunk`, by tiles, for heads of a multiple of 32 numbers.
void attend_chunk_by_tiles(Attention& a, int batch, int head, int chunk, int live, Part queries, const bf16* keys,
                           const bf16* values, size_t next) {
    int dim = a.shape.dim, start = chunk * CHUNK;
    pair* paired_keys = reinterpret_cast<pair*>(a.chunk_values);
    pair* paired_values = paired_keys + size_t(CHUNK) * dim / 2;
    pair_lines(keys, dim, dim, CHUNK, keys + next, paired_keys);
    pair_lines(values, CHUNK, live, dim, values + next, paired_values);
    for (int first = queries.first; first < queries.last; first += TILE_ROWS) {
        int count = std::min(TILE_ROWS, queries.last - first);
        if (a.together && unseen(a, batch, first, count, start)) continue;
        Results out = a.results(batch, head, first, chunk);
        weigh_tiles(a.tiles, count, a.narrow_queries + size_t(first) * dim, dim, paired_keys, CHUNK, {a.scores, CHUNK});
        for (int q = 0; q < count; q++) {
            float* sums = out.at + q * out.row + padded(dim);
            soften(a, a.row_of(batch, first + q), start, live, a.scores + q * CHUNK, sums[0], sums[1]);
        }
        put_factors(a.narrow, a.scores, count * CHUNK);
        weigh_tiles(a.tiles, count, a.narrow, CHUNK, paired_values, dim, out);
        if (a.together) join_queries(a.joined(first), out, count, dim);
    }
}

// out[q] = x[q] times lines of a chunk as they lie, `width` numbers each: some panels of them, of which one vector holds
// the even numbers and one the odd. What comes `next` is fetched meanwhile.
template <int Q, int PANELS>
void weigh_lying(const bf16* w, int width, int lines, const float* x, int x_row, const bf16* next, Results out) {
    vf sums[Q][PANELS][2] = {};
    for (int first = 0; first < lines; first += TILE_DEPTH) {
        vf of_odds[2][Q][PANELS][2] = {};  // first those of the even lines
        for (int odd = 0; odd < 2; odd++) {
            vf(&acc)[Q][PANELS][2] = of_odds[odd];
            for (int k = first + odd; k < std::min(first + TILE_DEPTH, lines); k += 2)
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++) {
                    size_t at = size_t(k) * width + p * PANEL;
                    _mm_prefetch(next + at, _MM_HINT_T1);
                    vu both = *reinterpret_cast<const vu_at*>(w + at);
                    vf low = (vf)(both << 16), high = (vf)(both & 0xffff0000u);
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++) {
                        acc[q][p][0] += low * x[q * x_row + k];
                        acc[q][p][1] += high * x[q * x_row + k];
                    }
                }
        }
        for (int q = 0; q < Q; q++)
            for (int p = 0; p < PANELS; p++)
                for (int i = 0; i < 2; i++) sums[q][p][i] += of_odds[0][q][p][i] + of_odds[1][q][p][i];
    }
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(LANES / 2));
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < PANELS; p++) {
            __m512 evens = (__m512)sums[q][p][0], odds = (__m512)sums[q][p][1];
            float* to = out.at + q * out.row + p * PANEL;
            store(to, (vf)_mm512_permutex2var_ps(evens, low, odds));
            store(to + LANES, (vf)_mm512_permutex2var_ps(evens, high, odds));
        }
}

template <int Q>
void weigh_lying(const bf16* w, int width, int lines, const float* x, int x_row, const bf16* next, Results out) {
    int n = 0;
    for (; n + 2 * PANEL <= width; n += 2 * PANEL)
        weigh_lying<Q, 2>(w + n, width, lines, x, x_row, next + n, {out.at + n, out.row});
    for (; n < width; n += PANEL)
        weigh_lying<Q, 1>(w + n, width, lines, x, x_row, next + n, {out.at + n, out.row});
}

// As by tiles.
template <int Q>
void attend_chunk_lying(Attention& a, int batch, int head, int chunk, int live, const bf16* keys, const bf16* values,
                        size_t next) {
    int dim = a.shape.dim, start = chunk * CHUNK;
    Results out = a.results(batch, head, 0, chunk);
    weigh_lying<Q>(keys, CHUNK, dim, a.queries, dim, keys + next, {a.scores, CHUNK});
    for (int q = 0; q < Q; q++) {
        float* sums = out.at + q * out.row + padded(dim);
        soften(a, a.row_of(batch, q), start, live, a.scores + q * CHUNK, sums[0], sums[1]);
    }
    put_factors(a.narrow, a.scores, Q * CHUNK);
    widen(a.scores, a.narrow, Q * CHUNK);
    weigh_lying<Q>(values, dim, live, a.scores, CHUNK, values + next, out);
}

#endif

}  // namespace
