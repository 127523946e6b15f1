// Products by AMX's tiles, registers of up to 16 rows of 64 bytes, and the instructions that multiply two of them.
//
// A panel (`panel.h`) lies as such an instruction wants its second factor: a row of a tile is a word of 16 outputs. So
// nothing is packed anew. Four tiles hold the sums of 16 rows by a panel's 64 outputs, one holds inputs, three hold weights.
//
// Bytes are multiplied exactly, so that their products are those of `dot_bytes`. Those of bfloat16 have an order of their
// own (Intel SDM, volume 2, TDPBF16PS): of the up to 32 inputs of an instruction the even ones are added up and the odd
// ones, by fused multiply-add, then the two sums, then that to what was there; to nearest, and what is below 2^-126 is zero.
// Where there are tiles, every product of bfloat16 takes them, however few rows it has, and cuts inputs at multiples of
// 32. Hence a row's result depends on no other row here either.
//
// Whoever loads this build has asked the system for the tiles (`isa.py`).
#pragma once

#include <type_traits>

#include "vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TRIODE_TILES

namespace triode {

constexpr long TILE_ROWS = 16;
constexpr long TILE_WORDS = 16;
constexpr long TILE_OUTPUTS = 16;
constexpr long TILES_OUTPUTS = 4 * TILE_OUTPUTS;
// 32 KiB of weights: with the rows and their sums they stay in a first-level cache of 48.
constexpr long STEPS_A_BLOCK = 8;

// Compilers do not know that tiles are loaded from memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Gives tiles the shapes of products of so many rows by so many words, at most 16 of each, as long as it lives.
class Tiles {
  public:
    Tiles(long rows, long words) {
        Shapes shapes{};
        shapes.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            const bool holds_weights = tile > INPUTS;
            shapes.rows[tile] = uint8_t(holds_weights ? words : rows);
            shapes.row_bytes[tile] = uint16_t(tile == INPUTS ? words * 4 : TILE_OUTPUTS * 4);
        }
        load(shapes);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }

  private:
    static constexpr int INPUTS = 4;

    struct alignas(64) Shapes {
        uint8_t palette;
        uint8_t start_row;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Shapes) == 64, "what LDTILECFG reads");

    static void load(const Shapes& shapes) {
        asm volatile("" ::"r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
};

// The sums of one part of the rows, [rows][64] numbers of four bytes.
inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load_sums(const void* from) {
    const char* sums = static_cast<const char*>(from);
    finish_stores();
    _tile_loadd(0, sums, TILES_OUTPUTS * 4);
    _tile_loadd(1, sums + TILE_OUTPUTS * 4, TILES_OUTPUTS * 4);
    _tile_loadd(2, sums + TILE_OUTPUTS * 8, TILES_OUTPUTS * 4);
    _tile_loadd(3, sums + TILE_OUTPUTS * 12, TILES_OUTPUTS * 4);
}

inline void store_sums(void* to) {
    char* sums = static_cast<char*>(to);
    _tile_stored(0, sums, TILES_OUTPUTS * 4);
    _tile_stored(1, sums + TILE_OUTPUTS * 4, TILES_OUTPUTS * 4);
    _tile_stored(2, sums + TILE_OUTPUTS * 8, TILES_OUTPUTS * 4);
    _tile_stored(3, sums + TILE_OUTPUTS * 12, TILES_OUTPUTS * 4);
    finish_stores();
}

// Tiles have literal numbers: sums += inputs times weights, which are bfloat16, or signed bytes and bytes without a sign.
#define TRIODE_TILE_DOT(T, sums, weights)       \
    if constexpr (std::is_same_v<T, bf16>)      \
        _tile_dpbf16ps(sums, 4, weights);       \
    else                                        \
        _tile_dpbsud(sums, 4, weights)

// sums += rows `x_bytes` apart times `steps` times so many words of a panel.
template <class T>
void add_steps(const char* x, long x_bytes, const uint32_t* panel, long words, long steps) {
    finish_stores();
    for (long step = 0; step < steps; step++, x += words * 4, panel += words * TILES_OUTPUTS) {
        const char* weights = reinterpret_cast<const char*>(panel);
        for (long word = 0; word < words; word++)
            for (int line = 0; line < 4; line++)
                __builtin_prefetch(weights + (2 * TILE_WORDS + word) * TILES_OUTPUTS * 4 + 64 * line);
        _tile_loadd(4, x, x_bytes);
        _tile_loadd(5, weights, TILES_OUTPUTS * 4);
        _tile_loadd(6, weights + TILE_OUTPUTS * 4, TILES_OUTPUTS * 4);
        _tile_loadd(7, weights + TILE_OUTPUTS * 8, TILES_OUTPUTS * 4);
        TRIODE_TILE_DOT(T, 0, 5);
        _tile_loadd(5, weights + TILE_OUTPUTS * 12, TILES_OUTPUTS * 4);
        TRIODE_TILE_DOT(T, 1, 6);
        TRIODE_TILE_DOT(T, 2, 7);
        TRIODE_TILE_DOT(T, 3, 5);
    }
}

#undef TRIODE_TILE_DOT

// out[rows][64] (+)= rows of bfloat16 times `steps` times so many words, `at_once` rows at a time.
inline void multiply_equal_steps(const char* x, long x_bytes, long rows, long at_once, const uint32_t* panel, long words,
                                 long steps, float* out, bool from_zero) {
    const Tiles tiles(at_once, words);
    for (long step = 0; step < steps; step += STEPS_A_BLOCK)
        for (long row = 0; row < rows; row += at_once) {
            if (from_zero && step == 0)
                clear_sums();
            else
                load_sums(out + row * TILES_OUTPUTS);
            const long count = steps - step < STEPS_A_BLOCK ? steps - step : STEPS_A_BLOCK;
            add_steps<bf16>(x + row * x_bytes + step * words * 4, x_bytes, panel + step * words * TILES_OUTPUTS, words,
                            count);
            store_sums(out + row * TILES_OUTPUTS);
        }
}

// The same of any number of words: whole tiles of inputs first, then the rest of them.
inline void multiply_equal_rows(const char* x, long x_bytes, long rows, long at_once, const uint32_t* panel, long words,
                                float* out, bool from_zero) {
    const long steps = words / TILE_WORDS, whole = steps * TILE_WORDS;
    if (steps) multiply_equal_steps(x, x_bytes, rows, at_once, panel, TILE_WORDS, steps, out, from_zero);
    if (words == whole) return;
    multiply_equal_steps(x + whole * 4, x_bytes, rows, at_once, panel + whole * TILES_OUTPUTS, words - whole, 1, out,
                         from_zero && whole == 0);
}

// out[rows][64] (+)= rows of bfloat16, `x_bytes` apart, times so many words of a panel. Whoever cuts a product does so at
// multiples of TILE_WORDS.
inline void multiply_by_tiles(const char* x, long x_bytes, long rows, const uint32_t* panel, long words, float* out,
                              bool from_zero) {
    const long whole = rows / TILE_ROWS * TILE_ROWS, rest = rows - whole;
    if (whole) multiply_equal_rows(x, x_bytes, whole, TILE_ROWS, panel, words, out, from_zero);
    if (rest)
        multiply_equal_rows(x + whole * x_bytes, x_bytes, rest, rest, panel, words, out + whole * TILES_OUTPUTS, from_zero);
}

}  // namespace triode

#endif
