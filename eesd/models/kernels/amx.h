// Products by the tiles of AMX: up to sixteen rows times sixteen outputs in one instruction, 32 k at a time, bfloat16.
//
// A tile sums the even and the odd k of its 32 apart, from zero, and adds both to what was there (Intel's manual,
// TDPBF16PS): another order than that of dot products of pairs, so a matrix is multiplied by one or the other, never both.
#pragma once

#include <algorithm>

#include "tile.h"

#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define EESD_TILES 1
#endif

namespace {

constexpr int TILE_ROWS = 16;  // and columns
constexpr int TILE_DEPTH = 32;  // k of one step

int tile_count(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// How many rows are shared out to tiles: equally, the last one overlapping its neighbour, so that all are alike.
struct Tiling {
    int count, tiles, height;
    explicit Tiling(int rows)
        : count(rows), tiles(tile_count(rows)), height((rows + tiles - 1) / tiles) {}
    int first(int tile) const { return std::min(tile * height, count - height); }
    int shared(int tile) const { return tile * height - first(tile); }  // rows that the tile before has had
};

#if defined(EESD_TILES)

// Whether the system lets this process use tiles, which has to be asked for.
bool tiles_allowed() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return allowed;
}

// Whether products over so many k go by tiles.
bool by_tiles(int k_count) { return k_count % TILE_DEPTH == 0 && tiles_allowed(); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Some compilers know of 8 of the 64 bytes that the instructions below read and write.
inline void as_in_memory(TileConfig& config) { __asm__ volatile("" : "+m"(config)); }

// The tiles of this thread while it lives; as another library has shaped them, they are afterwards. Vectors take numbers
// below the normal ones for zero meanwhile, as tiles do.
class Tiles {
    TileConfig before_;
    unsigned vector_state_ = 0;
    bool used_;
    int height_ = 0;

   public:
    const char* fetched = nullptr;  // the panel that the last product has fetched meanwhile

    explicit Tiles(bool used) : used_(used && tiles_allowed()) {
        constexpr unsigned SMALLEST_ARE_ZERO = 0x8040;
        if (!used_) return;
        as_in_memory(before_);
        _tile_storeconfig(&before_);
        as_in_memory(before_);
        vector_state_ = _mm_getcsr();
        _mm_setcsr(vector_state_ | SMALLEST_ARE_ZERO);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() {
        if (!used_) return;
        _mm_setcsr(vector_state_);
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }
    // Sums in tiles 0 to 3 and factors in 4 and 5 with so many rows; weights in 6 and 7.
    void shape(int height) {
        if (height == height_) return;
        TileConfig config;
        for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = i < 6 ? height : TILE_ROWS;
        as_in_memory(config);
        _tile_loadconfig(&config);
        height_ = height;
    }
};

// Sums of one or two tiles of rows with two or four tiles of columns, four sums at most, over `steps` of 32 k.
// x: where each tile of rows begins, rows `x_row` bytes apart; w: where each tile of columns begins, in pairs of k,
// `line` bytes from one pair to the next. `ahead`: what to fetch from memory meanwhile, so many bytes a step.
template <int ROWS, int COLUMNS>
inline void tile_sums(const bf16* const (&x)[ROWS], size_t x_row, const pair* const (&w)[COLUMNS], size_t line,
                      int steps, Ahead ahead) {
    static_assert(ROWS * COLUMNS <= 4 && COLUMNS % 2 == 0);
    __asm__ volatile("" ::: "memory");  // compilers do not know that loading a tile reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; s++) {
        size_t at = s * line * (TILE_DEPTH / 2);
        auto column = [&](int i) { return reinterpret_cast<const char*>(w[i]) + at; };
        _tile_loadd(4, x[0] + s * TILE_DEPTH, x_row);
        if constexpr (ROWS == 2) _tile_loadd(5, x[1] + s * TILE_DEPTH, x_row);
        _tile_loadd(6, column(0), line);
        for (size_t i = 0; i < ahead.step; i += 64) _mm_prefetch(ahead.at + s * ahead.step + i, _MM_HINT_T1);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, column(1), line);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (ROWS == 2) _tile_dpbf16ps(3, 5, 7);
        if constexpr (COLUMNS > 2) {
            _tile_loadd(6, column(2), line);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, column(3), line);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
}

// The sums of the first tile of rows, columns of tiles side by side, `row` floats from one row to the next.
template <int COLUMNS>
inline void store_sums(float* to, size_t row) {
    _tile_stored(0, to, row * 4);
    _tile_stored(1, to + TILE_ROWS, row * 4);
    if constexpr (COLUMNS > 2) {
        _tile_stored(2, to + 2 * TILE_ROWS, row * 4);
        _tile_stored(3, to + 3 * TILE_ROWS, row * 4);
    }
}
// Those of the second, of two columns.
inline void store_second_sums(float* to, size_t row) {
    _tile_stored(2, to, row * 4);
    _tile_stored(3, to + TILE_ROWS, row * 4);
}

#else

bool tiles_allowed() { return false; }
bool by_tiles(int) { return false; }

struct Tiles {
    explicit Tiles(bool) {}
};

#endif

}  // namespace
