// Vectors, and the one product that everything in decode.cpp is made of, but for what AMX multiplies (amx.h).
//
// Lanes are *outputs* (rows of the weight, slots of the cache), never the summed index: every sum runs over k in order,
// one fused multiply-add a step. So a number depends neither on how many query rows are computed with it, nor on the
// number of threads, nor on the width of the vectors.
//
// Processors with bfloat16 dot products, and no tiles, take bfloat16 models in pairs of k: two products are added to a
// sum in one step, twice the arithmetic of float32. Activations are rounded to bfloat16 for it, as torch does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
// TILE(n) for every number of rows that a tile can have.
#if defined(__AVX512F__) || !defined(__AVX__)
#define EVERY_TILE TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#else
#define EVERY_TILE TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#endif
constexpr int PANEL = 2 * LANES;  // outputs of one packed panel: a bfloat16 vector holds two float32 vectors

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
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

// As factors of a product: where pairs of them are multiplied, by the processor's own rounding, which takes for zero what
// such products take for zero, numbers below the normal ones.
inline void put_factors(bf16* to, const float* from, int n) {
#if defined(__AVX512BF16__)
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        _mm512_storeu_si512(
            to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + LANES), _mm512_loadu_ps(from + i)));
    for (; i + LANES <= n; i += LANES)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    __mmask16 rest = (1u << (n - i)) - 1;
    if (rest)
        _mm256_mask_storeu_epi16(to + i, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, from + i)));
#else
    for (int i = 0; i < n; i++) to[i] = to_bf16(from[i]);
#endif
}

inline void widen(float* to, const bf16* from, int n) {
    for (int i = 0; i < n; i++) to[i] = to_float(from[i]);
}

struct plain {  // a bfloat16 number in a matrix that was not packed; where there are dot products, paired when it is read
    uint16_t bits;
};

struct pair {  // of bfloat16 numbers that follow one another in k
    bf16 of[2];
};

// How weights of a kind are multiplied: in which vectors, with activations of which kind, and how many k in a step.
template <class W>
struct Kind {
    typedef vf Vector;
    typedef float Activation;
    static constexpr int DEPTH = 1;
    static constexpr int LINES = 1;  // of the matrix, as it lies in memory, in a step
};

// The PANEL weights of one step. Packed bfloat16 alternates the halves of the panel: to unpack is to shift and to mask.
inline void load_halves(const float* w, vf& low, vf& high) {
    low = load(w);
    high = load(w + LANES);
}
inline void load_halves(const bf16* w, vf& low, vf& high) {
    vu both = *reinterpret_cast<const vu_at*>(w);
    low = (vf)(both << 16);
    high = (vf)(both & 0xffff0000u);
}
inline void load_halves(const plain* w, vf& low, vf& high) {
    low = (vf)(__builtin_convertvector(*reinterpret_cast<const vh_at*>(w), vu) << 16);
    high = (vf)(__builtin_convertvector(*reinterpret_cast<const vh_at*>(w + LANES), vu) << 16);
}
inline vf spread(float x) { return all(x); }
inline void add_product(vf& sum, vf weights, vf activation) { sum += weights * activation; }

#if defined(__AVX512BF16__)
template <>
struct Kind<pair> {
    typedef __m512bh Vector;
    typedef pair Activation;
    static constexpr int DEPTH = 2;
    static constexpr int LINES = 1;
};
template <>
struct Kind<plain> : Kind<pair> {
    static constexpr int LINES = 2;
};
inline void load_halves(const pair* w, __m512bh& low, __m512bh& high) {
    low = (__m512bh)_mm512_loadu_si512(w);
    high = (__m512bh)_mm512_loadu_si512(w + LANES);
}
inline void interleave(__m512i even, __m512i odd, __m512bh& low, __m512bh& high) {
    alignas(64) static constexpr uint16_t FIRST[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(FIRST), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    low = (__m512bh)_mm512_permutex2var_epi16(even, first, odd);
    high = (__m512bh)_mm512_permutex2var_epi16(even, second, odd);
}
inline void load_lines(const plain* w, size_t line, __m512bh& low, __m512bh& high) {
    interleave(_mm512_loadu_si512(w), _mm512_loadu_si512(w + line), low, high);
}
// A last k without another.
inline void load_last(const plain* w, __m512bh& low, __m512bh& high) {
    interleave(_mm512_loadu_si512(w), _mm512_setzero_si512(), low, high);
}
inline __m512bh spread(pair x) {
    int32_t both;
    std::memcpy(&both, &x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
inline void add_product(vf& sum, __m512bh weights, __m512bh activation) {
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, weights, activation);
}
#endif

template <class W, class V>
inline void load_lines(const W* w, size_t, V& low, V& high) { load_halves(w, low, high); }

// What to fetch from memory meanwhile: `step` bytes a line from `at` on; null: nothing.
struct Ahead {
    const char* at;
    size_t step;
};

// acc[row][panel] = sum over k of w[panel][k] * x[row][k], for ROWS query rows and PANELS panels at once.
// w: PANEL weights a step of `w_step`, panels `w_panel` apart; x: rows `x_row` apart; all counted in steps of k.
template <class W, int ROWS, int PANELS, class X = typename Kind<W>::Activation>
inline __attribute__((always_inline)) void multiply(const W* __restrict w, size_t w_step, size_t w_panel,
                                                    const X* __restrict x, size_t x_row, int k_count, Ahead ahead,
                                                    vf (&acc)[ROWS][PANELS][2]) {
    constexpr int PIECES = PANELS * (PANEL * sizeof(W) > 64 ? PANEL * sizeof(W) / 64 : 1);  // of 64 bytes, in a line
    constexpr int LINES = Kind<W>::LINES;
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) acc[r][p][0] = acc[r][p][1] = vf{};
#pragma GCC unroll 4
    for (int k = 0; k < k_count; k++) {
        if (ahead.at)
            for (int i = 0; i < LINES * PIECES; i++)
                __builtin_prefetch(ahead.at + (k * LINES + i / PIECES) * ahead.step + i % PIECES * 64);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; p++) {
            typename Kind<W>::Vector low, high;
            const W* here = w + p * w_panel + k * w_step;
            // One row waits for memory alone, and what is fetched for it need only come as far as the second cache.
            const char* line = reinterpret_cast<const char*>(here);
            if (PANELS > 1 && !ahead.at) ROWS > 1 ? __builtin_prefetch(line + 1536) : __builtin_prefetch(line + 1024, 0, 2);
            load_lines(here, w_step / LINES, low, high);
            // Read the rows again for the next panel: kept in registers they would push the sums out.
            if (PANELS > 1 && ROWS > 2) __asm__("" : "+r"(x));
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                auto value = spread(x[r * x_row + k]);
                add_product(acc[r][p][0], low, value);
                add_product(acc[r][p][1], high, value);
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
