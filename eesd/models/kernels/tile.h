// Vectors, and the one product that everything in decode.cpp is made of.
//
// Lanes are *outputs* (rows of the weight, slots of the cache), never the summed index: every sum runs over k in order,
// one fused multiply-add a step. So a number depends neither on how many query rows are computed with it, nor on the
// number of threads, nor on the width of the vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MAX_TILE = 12;  // query rows of one tile: 2 sums each, and room for weights, in the registers there are
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int MAX_TILE = 6;
#else
constexpr int LANES = 4;
constexpr int MAX_TILE = 12;
#endif
constexpr int PANEL = 2 * LANES;  // outputs of one packed panel: a bfloat16 vector holds two float32 vectors

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_at __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

inline vf load(const float* p) { return *reinterpret_cast<const vf_at*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_at*>(p) = v; }
inline vf all(float x) { return x - vf{}; }  // minus: x + 0 would be computed, since it changes -0

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(float x) { return x; }

// Round to nearest even, as torch does.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fc0};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The PANEL weights of one k. Packed bfloat16 alternates the halves of the panel: to unpack is to shift and to mask.
inline void load_pair(const float* w, vf& low, vf& high) {
    low = load(w);
    high = load(w + LANES);
}
inline void load_pair(const bf16* w, vf& low, vf& high) {
    vu both = *reinterpret_cast<const vu_at*>(w);
    low = (vf)(both << 16);
    high = (vf)(both & 0xffff0000u);
}

// What to fetch from memory meanwhile: `step` bytes a step from `at` on; null: nothing.
struct Ahead {
    const char* at;
    size_t step;
};

// acc[row][panel] = sum over k of w[panel][k] * x[row][k], for ROWS query rows and PANELS panels at once.
// w: PANEL weights a step of `w_step`, panels `w_panel` apart; x: rows `x_row` apart.
template <class W, int ROWS, int PANELS>
inline __attribute__((always_inline)) void multiply(const W* __restrict w, size_t w_step, size_t w_panel,
                                                    const float* __restrict x, size_t x_row, int k_count, Ahead ahead,
                                                    vf (&acc)[ROWS][PANELS][2]) {
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) acc[r][p][0] = acc[r][p][1] = vf{};
#pragma GCC unroll 4
    for (int k = 0; k < k_count; k++) {
        if (ahead.at)
            for (int i = 0; i < PANELS; i++) __builtin_prefetch(ahead.at + k * ahead.step + i * 64);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; p++) {
            vf low, high;
            const W* here = w + p * w_panel + k * w_step;
            // One row on four panels is what the processor prefetches best by itself.
            if (PANELS > 1 && ROWS > 1 && !ahead.at) __builtin_prefetch(reinterpret_cast<const char*>(here) + 1536);
            load_pair(here, low, high);
            // Read the rows again for the next panel: kept in registers they would push the sums out.
            if (PANELS > 1 && ROWS > 2) __asm__("" : "+r"(x));
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                vf value = all(x[r * x_row + k]);
                acc[r][p][0] += low * value;
                acc[r][p][1] += high * value;
            }
        }
    }
}

// e^x for x <= 88 (0 below -87), relative error under 2e-7: 2^n times a polynomial, as in the Cephes library.
inline vf exponential(vf x) {
    const vf magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    vf n = x * 1.44269504f + magic;
    n = n - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi tiny = x < -87.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)power) & ~tiny);
}

#if defined(__AVX2__)
#include <immintrin.h>
// Four numbers from each of two places.
inline __m256 load_halves(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
inline __m256 load_halves(const bf16* low, const bf16* high) {
    __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
    __m128i both = _mm_unpacklo_epi64(first, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both), 16));
}
#endif

// to[column][row] = from[row][column] for 8 x 8 numbers.
template <class C>
inline void transpose_8(const C* from, size_t from_row, float* to, size_t to_row) {
#if defined(__AVX2__)
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {  // the halves of four rows first: they can come together on the way from memory
        a[i] = load_halves(from + i * from_row, from + (i + 4) * from_row);
        a[i + 4] = load_halves(from + i * from_row + 4, from + (i + 4) * from_row + 4);
    }
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            _mm256_storeu_ps(to + (i + 2 * j) * to_row, _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44));
            _mm256_storeu_ps(to + (i + 2 * j + 1) * to_row, _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee));
        }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[i * to_row + j] = to_float(from[j * from_row + i]);
#endif
}
