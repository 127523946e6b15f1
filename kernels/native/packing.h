// Lays weights out as groups of 4 or 8 bits (`grouped.h`): rounded from numbers, or taken from a GGUF file's blocks.
#pragma once

#include <vector>

#include "grouped.h"

namespace triode {

// One output's group, before its bits are spread over a panel.
struct PackedGroup {
    uint8_t* stored;
    uint16_t scale;
    uint16_t minimum;
};

inline float rounded_to_bf16(float x, uint16_t& bits) {
    bf16 rounded;
    narrow(x, rounded);
    bits = rounded.bits;
    return widen(rounded);
}

inline uint8_t nearest_level(float x, float zero, float levels) {
    return uint8_t(std::min(std::max(std::nearbyint(x) + zero, 0.f), levels));
}

// The largest magnitude over 127 is the scale. NaN makes the whole group NaN.
template <class T>
void round_to_8_bits(const T* numbers, long count, PackedGroup& to) {
    float most = 0.f;
    bool is_nan = false;
    for (long i = 0; i < count; i++) {
        most = std::max(most, std::fabs(widen(numbers[i])));
        is_nan |= std::isnan(widen(numbers[i]));
    }
    const float scale = rounded_to_bf16(is_nan ? NAN : most / 127.f, to.scale);
    const bool is_regular = scale > 0.f && std::isfinite(scale);
    for (long i = 0; i < count; i++)
        to.stored[i] = is_regular ? nearest_level(widen(numbers[i]) / scale, 128.f, 255.f) : 128;
}

// Sixteen levels from the smallest number to the largest. NaN makes the whole group NaN.
template <class T>
void round_to_4_bits(const T* numbers, long count, PackedGroup& to) {
    float least = widen(numbers[0]), most = least;
    bool is_nan = false;
    for (long i = 0; i < count; i++) {
        least = std::min(least, widen(numbers[i]));
        most = std::max(most, widen(numbers[i]));
        is_nan |= std::isnan(widen(numbers[i]));
    }
    const float minimum = rounded_to_bf16(is_nan ? NAN : least, to.minimum);
    const float scale = rounded_to_bf16((most - minimum) / 15.f, to.scale);
    const bool is_regular = scale > 0.f && std::isfinite(scale);
    for (long i = 0; i < count; i++)
        to.stored[i] = is_regular ? nearest_level((widen(numbers[i]) - minimum) / scale, 0.f, 15.f) : 0;
}

// Blocks of 32 weights as in ggml's `block_q8_0`, `block_q4_0` and `block_q4_1`.
inline long gguf_block_bytes(long name) { return name == GGUF_Q8_0 ? 34 : name == GGUF_Q4_0 ? 18 : 20; }

inline void take_gguf_block(const uint8_t* block, long name, PackedGroup& to) {
    memcpy(&to.scale, block, 2);
    if (name == GGUF_Q8_0) {
        for (int i = 0; i < 32; i++) to.stored[i] = block[2 + i] ^ 0x80;
        return;
    }
    if (name == GGUF_Q4_1) memcpy(&to.minimum, block + 2, 2);
    const uint8_t* pairs = block + (name == GGUF_Q4_1 ? 4 : 2);
    for (int i = 0; i < 16; i++) {
        to.stored[i] = pairs[i] & 0xf;
        to.stored[i + 16] = pairs[i] >> 4;
    }
}

inline void write_group(const PackedGroup& from, const Layout& layout, long lane, uint32_t* group) {
    for (long word = 0; word < layout.words; word++) {
        uint8_t bytes[4];
        for (int i = 0; i < 4; i++)
            bytes[i] = layout.format.bits == 8 ? from.stored[word * 4 + i]
                                               : uint8_t(from.stored[word * 8 + i] | from.stored[word * 8 + 4 + i] << 4);
        memcpy(group + word * PANEL + lane, bytes, 4);
    }
    uint16_t* scales = reinterpret_cast<uint16_t*>(group + layout.words * PANEL);
    scales[lane] = from.scale;
    if (layout.format.has_minimum) scales[PANEL + lane] = from.minimum;
}

// One panel of a matrix, whose groups `read(row, group, PackedGroup&)` gives. Rows of padding are zero.
template <class Read>
void pack_groups(Read read, const Layout& layout, long rows, long columns, bool halves, long panel, uint32_t* to) {
    std::vector<uint8_t> stored(layout.group);
    for (long lane = 0; lane < PANEL; lane++) {
        const long row = source_row(panel * PANEL + lane, rows, halves);
        for (long index = 0; index < layout.groups(columns); index++) {
            std::fill(stored.begin(), stored.end(), 0);
            PackedGroup group{stored.data(), 0, 0};
            if (row >= 0) read(row, index, group);
            write_group(group, layout, lane, to + index * layout.group_size());
        }
    }
}

// A row-major matrix [rows, columns] of numbers, rounded.
template <class T>
void pack_rounded(const T* source, const Layout& layout, long rows, long columns, bool halves, long panel, uint32_t* to) {
    auto read = [&](long row, long index, PackedGroup& group) {
        const T* numbers = source + row * columns + index * layout.group;
        const long count = std::min(layout.group, columns - index * layout.group);
        if (layout.format.bits == 8)
            round_to_8_bits(numbers, count, group);
        else
            round_to_4_bits(numbers, count, group);
    };
    pack_groups(read, layout, rows, columns, halves, panel, to);
}

// The blocks of a GGUF tensor, row after row.
inline void pack_gguf(const uint8_t* source, long name, const Layout& layout, long rows, long columns, bool halves,
                      long panel, uint32_t* to) {
    const long block_bytes = gguf_block_bytes(name), row_bytes = layout.groups(columns) * block_bytes;
    auto read = [&](long row, long index, PackedGroup& group) {
        take_gguf_block(source + row * row_bytes + index * block_bytes, name, group);
    };
    pack_groups(read, layout, rows, columns, halves, panel, to);
}

}  // namespace triode
