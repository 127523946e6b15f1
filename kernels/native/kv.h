// How keys and values lie in the cache: as numbers, or as signed bytes with a scale for each position and head.
//
// Sixteen consecutive positions of a block, a unit, lie together, head after head, in the order in which products read
// them (`panel.h`): nothing is turned around while a query attends. A unit's keys of one head are words of
// [words][16 positions], of which each holds one float, two bfloat16 numbers or four bytes of one position. Its values are
// [16 positions][head_dim] floats; or [8 pairs of positions][head_dim] words, in which two positions have a bfloat16 number
// each; or [16 positions][bytes]. Rows of bytes are padded with zeros to whole words. Behind a head's keys and behind its
// values, where they are bytes, come sixteen floats that multiply them: the largest number of each position over 127.
#pragma once

#include <algorithm>

#include "vector.h"

namespace triode {

constexpr long UNIT = 16;

inline long kv_padded(long head_dim) { return (head_dim + 3) / 4 * 4; }

// What one position takes. `number_bytes` is that of the numbers, 1 for signed bytes.
inline long kv_head_bytes(long head_dim, long number_bytes) {
    return number_bytes == 1 ? kv_padded(head_dim) + 4 : head_dim * number_bytes;
}

// The scales of a unit's bytes.
inline const float* kv_scales(const char* unit, long head_dim) {
    return reinterpret_cast<const float*>(unit + kv_padded(head_dim) * UNIT);
}

// Calls `take(first, numbers, count)` for pieces of a head, narrowed to T.
template <class T, class Take>
void in_pieces(const float* numbers, long head_dim, Take take) {
    constexpr long PIECE = 64;
    T piece[PIECE];
    for (long first = 0; first < head_dim; first += PIECE) {
        const long count = std::min(PIECE, head_dim - first);
        long d = 0;
        for (; d + LANES <= count; d += LANES) narrow(load(numbers + first + d), piece + d);
        for (; d < count; d++) narrow(numbers[first + d], piece[d]);
        take(first, piece, count);
    }
}

// One position's key of a head, to `unit`.
template <class T>
void write_key(T, const float* numbers, long head_dim, char* unit, long position) {
    constexpr long IN_A_WORD = 4 / sizeof(T);
    uint32_t* words = reinterpret_cast<uint32_t*>(unit) + position;
    in_pieces<T>(numbers, head_dim, [&](long first, const T* piece, long count) {
        for (long d = 0; d < count; d += IN_A_WORD) memcpy(words + (first + d) / IN_A_WORD * UNIT, piece + d, 4);
    });
}

// One position's value of a head. `is_last`: nothing is known of the position behind it, which shares its words; a weight of
// zero must find a number there.
inline void write_value(float, const float* numbers, long head_dim, char* unit, long position, bool) {
    memcpy(unit + position * head_dim * 4, numbers, head_dim * 4);
}

inline void write_value(bf16, const float* numbers, long head_dim, char* unit, long position, bool is_last) {
    bf16* pairs = reinterpret_cast<bf16*>(unit) + position / 2 * head_dim * 2;
    in_pieces<bf16>(numbers, head_dim, [&](long first, const bf16* piece, long count) {
        for (long d = 0; d < count; d++) pairs[(first + d) * 2 + position % 2] = piece[d];
    });
    if (is_last && position % 2 == 0)
        for (long d = 0; d < head_dim; d++) pairs[d * 2 + 1] = bf16{0};
}

// Rounds to bytes, which `put(d, byte)` takes, and returns their scale. A number that is not finite makes it NaN, and with
// it all of the head.
template <class Put>
float round_head(const float* numbers, long head_dim, Put put) {
    float most = 0.f, broken = 0.f;
    for (long d = 0; d < head_dim; d++) {
        most = std::max(most, std::fabs(numbers[d]));
        broken += numbers[d] * 0.f;
    }
    const float scale = most / 127.f + broken;
    const float divisor = scale > 0.f ? scale : INFINITY;
    for (long d = 0; d < head_dim; d++) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        const float rounded = (numbers[d] / divisor + 12582912.f) - 12582912.f;
        put(d, broken == 0.f ? int8_t(std::clamp(rounded, -127.f, 127.f)) : int8_t(0));
    }
    for (long d = head_dim; d < kv_padded(head_dim); d++) put(d, 0);
    return scale;
}

inline void write_key(int8_t, const float* numbers, long head_dim, char* unit, long position) {
    const float scale = round_head(numbers, head_dim, [&](long d, int8_t byte) {
        unit[(d / 4 * UNIT + position) * 4 + d % 4] = char(byte);
    });
    memcpy(unit + (kv_padded(head_dim) * UNIT + position * 4), &scale, 4);
}

inline void write_value(int8_t, const float* numbers, long head_dim, char* unit, long position, bool) {
    char* row = unit + position * kv_padded(head_dim);
    const float scale = round_head(numbers, head_dim, [&](long d, int8_t byte) { row[d] = char(byte); });
    memcpy(unit + (kv_padded(head_dim) * UNIT + position * 4), &scale, 4);
}

// Bytes `first` to `first + LANES` of a row; zeros behind its end.
inline Vec widen_bytes(const int8_t* row, long size, long first) {
    typedef int8_t ByteVec __attribute__((vector_size(LANES)));
    typedef int16_t SignedVec __attribute__((vector_size(LANES * 2)));
    int8_t padded[LANES] = {};
    const int8_t* from = row + first;
    if (first + LANES > size) {
        std::copy_n(from, size - first, padded);
        from = padded;
    }
    ByteVec v;
    memcpy(&v, from, sizeof v);
    // Step by step: compilers split a conversion to four times the width into single numbers.
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, SignedVec), IntVec), Vec);
}

}  // namespace triode
