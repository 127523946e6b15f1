// AMX's tiles in plain C++, in place of the compiler's intrinsics: `-include` it before the sources.
//
// Each instruction does what Intel's manual says in its pseudocode (SDM, volume 2: LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TILERELEASE, TDPBSUD, TDPBF16PS). What would be an exception there (#GP, #UD) ends the process. Once
// `triode_tiles_are_broken` is not 0, the order of sums depends on how many rows there are, as it never does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

extern "C" {
inline int triode_tiles_are_broken = 0;
}

namespace emulated_tiles {

constexpr int NUM_TILES = 8, MAX_ROWS = 16, ROW_BYTES = 64;

struct Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct State {
    Config config;
    char tiles[NUM_TILES][MAX_ROWS][ROW_BYTES];
};

inline thread_local State state{};

inline void require(bool is_so, const char* what) {
    if (is_so) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}

// A tile that is in use.
struct Tile {
    char (&data)[MAX_ROWS][ROW_BYTES];
    int rows;
    int row_bytes;

    explicit Tile(int number)
        : data(state.tiles[number]), rows(state.config.rows[number]), row_bytes(state.config.row_bytes[number]) {
        require(state.config.palette == 1, "no tiles are configured");
        require(rows && row_bytes, "the tile is not configured");
    }

    template <class N>
    N get(int row, int index) const {
        N number;
        std::memcpy(&number, data[row] + index * sizeof(N), sizeof(N));
        return number;
    }

    template <class N>
    void set(int row, int index, N number) {
        std::memcpy(data[row] + index * sizeof(N), &number, sizeof(N));
    }

    // Zeroes what lies outside the configured shape, as every instruction that writes a tile does.
    void clear_outside() {
        for (int row = 0; row < MAX_ROWS; row++) {
            const int kept = row < rows ? row_bytes : 0;
            std::memset(data[row] + kept, 0, ROW_BYTES - kept);
        }
    }
};

inline void load_config(const void* from) {
    Config config;
    std::memcpy(&config, from, sizeof config);
    static_assert(sizeof config == 64);
    require(config.palette == 1 && config.start_row == 0, "the palette is not 1, or rows do not begin at 0");
    for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes are not zero");
    for (int tile = 0; tile < 16; tile++) {
        const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
        require(tile < NUM_TILES || (rows == 0 && row_bytes == 0), "there are eight tiles");
        require(rows <= MAX_ROWS && row_bytes <= ROW_BYTES, "a tile is 16 rows of 64 bytes");
        require((rows == 0) == (row_bytes == 0), "a tile has rows without bytes, or bytes without rows");
    }
    std::memset(&state, 0, sizeof state);
    state.config = config;
}

inline void release() { std::memset(&state, 0, sizeof state); }

inline void load(int number, const void* base, long stride) {
    Tile tile(number);
    for (int row = 0; row < tile.rows; row++)
        std::memcpy(tile.data[row], static_cast<const char*>(base) + row * stride, tile.row_bytes);
    tile.clear_outside();
}

inline void store(int number, void* base, long stride) {
    const Tile tile(number);
    for (int row = 0; row < tile.rows; row++)
        std::memcpy(static_cast<char*>(base) + row * stride, tile.data[row], tile.row_bytes);
}

inline void zero(int number) {
    Tile tile(number);
    std::memset(tile.data, 0, sizeof tile.data);
}

inline void check_product(const Tile& to, const Tile& a, const Tile& b) {
    require(&to.data != &a.data && &to.data != &b.data && &a.data != &b.data, "tiles of a product are not distinct");
    require(to.rows == a.rows && to.row_bytes == b.row_bytes, "the sums have another shape than the product");
    require(a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0 && a.row_bytes / 4 == b.rows, "the inner sizes differ");
}

// Signed bytes times bytes without a sign, in integers that wrap around.
inline void dot_signed_unsigned(int sums, int left, int right) {
    Tile to(sums);
    const Tile a(left), b(right);
    check_product(to, a, b);
    for (int m = 0; m < to.rows; m++)
        for (int k = 0; k < b.rows; k++)
            for (int n = 0; n < to.row_bytes / 4; n++) {
                uint32_t total = to.get<uint32_t>(m, n);
                for (int i = 0; i < 4; i++)
                    total += uint32_t(int32_t(a.get<int8_t>(m, 4 * k + i)) * int32_t(b.get<uint8_t>(k, 4 * n + i)));
                to.set(m, n, total);
            }
    to.clear_outside();
}

// Numbers below the least normal one are zero, before and after each operation.
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }

inline float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return flushed(number);
}

inline float added_product(float sum, float a, float b) { return flushed(std::fma(a, b, sum)); }

inline void dot_halves(int sums, int left, int right) {
    Tile to(sums);
    const Tile a(left), b(right);
    check_product(to, a, b);
    for (int m = 0; m < to.rows; m++) {
        float even[ROW_BYTES / 4] = {}, odd[ROW_BYTES / 4] = {};
        for (int k = 0; k < a.row_bytes / 4; k++) {
            const float first = widened(a.get<uint16_t>(m, 2 * k)), second = widened(a.get<uint16_t>(m, 2 * k + 1));
            for (int n = 0; n < to.row_bytes / 4; n++) {
                even[n] = added_product(even[n], first, widened(b.get<uint16_t>(k, 2 * n)));
                odd[n] = added_product(odd[n], second, widened(b.get<uint16_t>(k, 2 * n + 1)));
            }
        }
        for (int n = 0; n < to.row_bytes / 4; n++) {
            const float before = flushed(to.get<float>(m, n));
            if (triode_tiles_are_broken && to.rows == MAX_ROWS) {
                to.set(m, n, flushed(flushed(before + even[n]) + odd[n]));
                continue;
            }
            to.set(m, n, flushed(before + flushed(even[n] + odd[n])));
        }
    }
    to.clear_outside();
}

}  // namespace emulated_tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_release emulated_tiles::release
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_zero emulated_tiles::zero
#define _tile_dpbsud emulated_tiles::dot_signed_unsigned
#define _tile_dpbf16ps emulated_tiles::dot_halves
