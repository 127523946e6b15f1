// Rows of bytes times groups of weights (`grouped.h`) by AMX's tiles (`amx.h`), where there are any. Integers are exact,
// and each group is scaled as elsewhere: the results are those of `multiply_grouped`, bit for bit.
#pragma once

#include "amx.h"
#include "grouped.h"

namespace triode {

#if defined(TRIODE_TILES)

static_assert(PANEL == TILES_OUTPUTS, "a panel is as wide as the tiles of its sums");

// For 64 inputs by 64 outputs the tiles are loaded and stored in some 120 cycles, whatever the rows; VPDPBUSD takes 32 for
// each row. (From published throughputs: no such processor was at hand.)
constexpr long MIN_TILE_ROWS = 6;

// A group as words of bytes, which 4 bits become in `room`.
template <int BITS>
const uint32_t* bytes_of(const uint32_t* at, long words, uint32_t* room) {
    if constexpr (BITS == 8) return at;
    for (long word = 0; word < words; word++)
        for (int lane = 0; lane < PANEL; lane += LANES)
            store(room + word * PANEL + lane, (Vec)four_inputs<BITS>(at + lane, word));
    return room;
}

// Adds the scaled sums [rows][64] of one group.
template <class Kind>
void scale_sums(const ByteRows& x, long rows, long index, const uint32_t* at, const Layout& layout, const int32_t* sums,
                float* out) {
    for (long r = 0; r < rows; r++) {
        typedef GroupProduct<Kind, 1, 4> Product;
        const ByteRows row = x.from(r);
        const Product product{row, index, at, layout, out + r * PANEL, a_little_ahead(at)};
        const IntVec offset = IntVec{} - row.sums[index] * Kind::ZERO;
        for (int column = 0; column < PANEL; column += Product::COLUMNS * LANES) {
            IntVec acc[1][Product::COLUMNS];
            for (int c = 0; c < Product::COLUMNS; c++)
                acc[0][c] = (IntVec)load(sums + r * PANEL + column + c * LANES) + offset;
            if (index == 0)
                product.template scale<true>(column, acc);
            else
                product.template scale<false>(column, acc);
        }
    }
}

// All `count` groups of a panel, `at_once` rows at a time.
template <class Kind>
void multiply_groups_by_tiles(const ByteRows& x, long rows, long at_once, const uint32_t* panel, const Layout& layout,
                              long count, float* out) {
    alignas(64) int32_t sums[TILE_ROWS * PANEL];
    alignas(64) uint32_t room[MAX_GROUP / 4 * PANEL];
    const long words = layout.group / 4, step = words % TILE_WORDS ? MIN_GROUP / 4 : TILE_WORDS;
    const Tiles tiles(at_once, step);
    for (long index = 0; index < count; index++) {
        const uint32_t* at = panel + index * layout.group_size();
        const uint32_t* bytes = bytes_of<Kind::BITS>(at, words, room);
        for (long row = 0; row < rows; row += at_once) {
            const ByteRows part = x.from(row);
            const char* inputs = reinterpret_cast<const char*>(part.bytes + index * layout.group);
            clear_sums();
            add_steps<int8_t>(inputs, part.stride, bytes, step, words / step);
            store_sums(sums);
            scale_sums<Kind>(part, at_once, index, at, layout, sums, out + row * PANEL);
        }
    }
}

template <class Kind>
void multiply_all_by_tiles(const ByteRows& x, long rows, const uint32_t* panel, const Layout& layout, long inputs,
                           float* out) {
    const long whole = rows / TILE_ROWS * TILE_ROWS, rest = rows - whole, count = layout.groups(inputs);
    if (whole) multiply_groups_by_tiles<Kind>(x, whole, TILE_ROWS, panel, layout, count, out);
    if (rest) multiply_groups_by_tiles<Kind>(x.from(whole), rest, rest, panel, layout, count, out + whole * PANEL);
}

#endif

// out[rows][64] = rows of bytes times one panel.
inline void multiply_byte_rows(const ByteRows& x, long rows, const uint32_t* panel, const uint32_t* next_panel,
                               const Layout& layout, long inputs, float* out) {
#if defined(TRIODE_TILES)
    if (rows >= MIN_TILE_ROWS) {
        if (layout.format.bits == 8)
            multiply_all_by_tiles<Kind<8, 128, false>>(x, rows, panel, layout, inputs, out);
        else if (layout.format.has_minimum)
            multiply_all_by_tiles<Kind<4, 0, true>>(x, rows, panel, layout, inputs, out);
        else
            multiply_all_by_tiles<Kind<4, 8, false>>(x, rows, panel, layout, inputs, out);
        return;
    }
#endif
    multiply_grouped(x, rows, panel, next_panel, layout, inputs, out);
}

}  // namespace triode
