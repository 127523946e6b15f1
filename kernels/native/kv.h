// How one head of one position lies in the cache: as head_dim numbers, or as signed bytes with their scale.
//
// Bytes are padded with zeros to whole words; behind them is one float that multiplies them. It is the largest number
// divided by 127. A scale a head and position, kept with its bytes, is written and read with them and needs no other memory.
#pragma once

#include <algorithm>

#include "vector.h"

namespace triode {

inline long kv_padded(long head_dim) { return (head_dim + 3) / 4 * 4; }

// `number_bytes` is that of the numbers, 1 for signed bytes.
inline long kv_head_bytes(long head_dim, long number_bytes) {
    return number_bytes == 1 ? kv_padded(head_dim) + 4 : head_dim * number_bytes;
}

inline float kv_scale(const char* head, long head_dim) {
    float scale;
    memcpy(&scale, head + kv_padded(head_dim), 4);
    return scale;
}

template <class T>
void write_kv(const float* numbers, long head_dim, T* head) {
    for (long d = 0; d < head_dim; d++) narrow(numbers[d], head[d]);
}

// A number that is not finite makes the scale NaN, and with it all of the head.
inline void write_kv(const float* numbers, long head_dim, int8_t* head) {
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
        head[d] = broken == 0.f ? int8_t(std::clamp(rounded, -127.f, 127.f)) : 0;
    }
    for (long d = head_dim; d < kv_padded(head_dim); d++) head[d] = 0;
    memcpy(head + kv_padded(head_dim), &scale, 4);
}

inline Vec widen_numbers(const float* numbers) { return load(numbers); }

inline Vec widen_numbers(const bf16* numbers) { return widen_bf16(load_shorts(&numbers->bits)); }

inline Vec widen_numbers(const int8_t* bytes) {
    typedef int8_t ByteVec __attribute__((vector_size(LANES)));
    typedef int16_t SignedVec __attribute__((vector_size(LANES * 2)));
    ByteVec v;
    memcpy(&v, bytes, sizeof v);
    // Step by step: compilers split a conversion to four times the width into single numbers.
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, SignedVec), IntVec), Vec);
}

// Numbers `first` to `first + LANES` of a head, bytes without their scale; zeros behind its end.
template <class Stored>
Vec read_kv(const char* head, long head_dim, long first) {
    const Stored* numbers = reinterpret_cast<const Stored*>(head) + first;
    if (first + LANES <= head_dim) return widen_numbers(numbers);
    Stored padded[LANES] = {};
    std::copy_n(numbers, head_dim - first, padded);
    return widen_numbers(padded);
}

}  // namespace triode
