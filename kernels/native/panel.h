// Matrix products over packed panels.
//
// A matrix of weights [out, in] is cut into panels of 64 outputs. A panel is a run of words of 32 bits, [in words][64]:
// a word holds one float, two consecutive bfloat16 inputs of its output, or four bytes. So a register holds many outputs and never
// has to be summed across, the panel is one stream of memory, and the input is broadcast word by word.
//
// Every output is added up over its inputs in order, in one accumulator, however many rows are computed together and
// however the words are cut into blocks: a partial sum that is stored and loaded again is the same number. Hence a row's
// result does not depend on the other rows.
#pragma once

#include <algorithm>

#include "squares.h"

namespace triode {

constexpr int PANEL = 64;
constexpr int MAX_ROWS = 6;
// 128 words of a panel are 32 KiB: several groups of rows find them in the first- or second-level cache.
constexpr long BLOCK_WORDS = 128;
constexpr long PREFETCH_WORDS = 16;

template <class T>
constexpr long words_of(long numbers) {
    constexpr long in_a_word = 4 / sizeof(T);
    return (numbers + in_a_word - 1) / in_a_word;
}

constexpr long rounded_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// ROWS rows by 64 outputs, from `out` or from zero. Registers hold ROWS x GROUP vectors.
template <class T, int ROWS>
void multiply_rows(const char* x, long x_bytes, const uint32_t* panel, long words, float* out, bool from_zero) {
    constexpr int GROUP = REGISTERS == 32 ? 4 : 2;
    for (int column = 0; column < PANEL; column += GROUP * LANES) {
        Vec acc[ROWS][GROUP];
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < GROUP; g++)
                acc[r][g] = from_zero ? Vec{} : load(out + r * PANEL + column + g * LANES);
        const uint32_t* w = panel + column;
        long k = 0;
        if constexpr (ROWS > 1 && HAS_SQUARES<T>) {
            Squares<Vec, ROWS, GROUP> squares(acc);
            for (; k + 2 <= words; k += 2, w += 2 * PANEL) {
                WordVec first[GROUP], next[GROUP];
                for (int g = 0; g < GROUP; g++) {
                    first[g] = (WordVec)load(w + g * LANES);
                    next[g] = (WordVec)load(w + PANEL + g * LANES);
                }
                squares.add(x + k * 4, x_bytes, first, next);
            }
            squares.give(acc);
        }
        for (; k < words; k++, w += PANEL) {
            Vec weights[GROUP];
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) {
                weights[g] = load(w + g * LANES);
                __builtin_prefetch(w + g * LANES + PREFETCH_WORDS * PANEL);
            }
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                Vec input = broadcast(x + r * x_bytes + k * 4);
#pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++) acc[r][g] = accumulate(T{}, acc[r][g], weights[g], input);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < GROUP; g++) store(out + r * PANEL + column + g * LANES, acc[r][g]);
    }
}

// out[rows][64] (+)= x[rows][words] times one panel. `x_stride` counts numbers of type T.
template <class T>
void multiply_panel(const T* x, long x_stride, long rows, const uint32_t* panel, long words, float* out,
                    bool from_zero) {
    const char* inputs = reinterpret_cast<const char*>(x);
    const long x_bytes = x_stride * long(sizeof(T));
    const long groups = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const long block = groups == 1 ? words : BLOCK_WORDS;
    for (long first = 0; first < words; first += block) {
        const long count = std::min(block, words - first);
        const uint32_t* w = panel + first * PANEL;
        for (long group = 0; group < groups; group++) {
            const long row = rows * group / groups, end = rows * (group + 1) / groups;
            const char* in = inputs + row * x_bytes + first * 4;
            float* to = out + row * PANEL;
            const bool fresh = from_zero && first == 0;
            switch (end - row) {
                case 1: multiply_rows<T, 1>(in, x_bytes, w, count, to, fresh); break;
                case 2: multiply_rows<T, 2>(in, x_bytes, w, count, to, fresh); break;
                case 3: multiply_rows<T, 3>(in, x_bytes, w, count, to, fresh); break;
                case 4: multiply_rows<T, 4>(in, x_bytes, w, count, to, fresh); break;
                case 5: multiply_rows<T, 5>(in, x_bytes, w, count, to, fresh); break;
                case 6: multiply_rows<T, 6>(in, x_bytes, w, count, to, fresh); break;
            }
        }
    }
}

// Turns a run of a panel of signed bytes into one of T, in which every byte is exact.
inline void widen_word(float, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i++) store(to + i * PANEL, numbers[i]);
}

inline void widen_word(bf16, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i += 2) {
        const WordVec low = (WordVec)numbers[i] >> 16, high = (WordVec)numbers[i + 1] & 0xffff0000u;
        store(to + i / 2 * PANEL, (Vec)(low | high));
    }
}

template <class T>
void widen_panel(const uint32_t* bytes, long words, uint32_t* to) {
    constexpr long WIDE_WORDS = sizeof(T);
    for (long word = 0; word < words; word++)
        for (int lane = 0; lane < PANEL; lane += LANES) {
            const uint32_t* from = bytes + word * PANEL + lane;
            __builtin_prefetch(from + PREFETCH_WORDS * PANEL);
            const WordVec four = (WordVec)load(from);
            Vec numbers[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                numbers[i] = __builtin_convertvector((IntVec)(four << (24 - 8 * i)) >> 24, Vec);
            widen_word(T{}, numbers, to + word * WIDE_WORDS * PANEL + lane);
        }
}

// Which row of the source is row `row` of the packed matrix; -1 for padding.
//
// `halves` interleaves the two halves of the source (gate and up) by 16 rows, so that both are in one panel.
inline long source_row(long row, long rows, bool halves) {
    if (!halves) return row < rows ? row : -1;
    const long half = rows / 2, index = row / 32 * 16 + row % 16;
    if (index >= half) return -1;
    return row % 32 < 16 ? index : half + index;
}

inline long packed_rows(long rows, bool halves) {
    return rounded_up(halves ? rounded_up(rows / 2, 16) * 2 : rows, PANEL);
}

// One panel of a row-major matrix [rows, columns].
template <class T>
void pack_panel(const T* source, long rows, long columns, bool halves, long panel, uint32_t* to) {
    constexpr long IN_A_WORD = 4 / sizeof(T);
    constexpr long AT_ONCE = 16;
    const long words = words_of<T>(columns);
    for (long first = 0; first < words; first += AT_ONCE) {
        for (long lane = 0; lane < PANEL; lane++) {
            const long row = source_row(panel * PANEL + lane, rows, halves);
            const long end = std::min(words, first + AT_ONCE), whole = row < 0 ? first : std::min(end, columns / IN_A_WORD);
            for (long word = first; word < whole; word++)
                memcpy(to + word * PANEL + lane, source + row * columns + word * IN_A_WORD, 4);
            for (long word = std::max(first, whole); word < end; word++) {
                T numbers[IN_A_WORD] = {};
                for (long i = 0; i < IN_A_WORD; i++) {
                    const long column = word * IN_A_WORD + i;
                    if (row >= 0 && column < columns) numbers[i] = source[row * columns + column];
                }
                memcpy(to + word * PANEL + lane, numbers, 4);
            }
        }
    }
}

}  // namespace triode
