// Matrix products over packed panels.
//
// A matrix of weights [out, in] is cut into panels of 64 outputs. A panel is a run of words of 32 bits, [in words][64]:
// a word holds one float, two consecutive bfloat16 inputs of its output, or four bytes. So a register holds many
// outputs and never has to be summed across, the panel is one stream of memory, and the input is broadcast word by
// word.
//
// Every output is added up over its inputs in order, in one accumulator, however many rows are computed together and
// however the words are cut into blocks: a partial sum that is stored and loaded again is the same number. Hence a row's
// result does not depend on the other rows.
#pragma once

#include <algorithm>

#include "amx.h"
#include "squares.h"

namespace triode {

// Whether numbers of this type are multiplied by AMX's tiles.
#if defined(TRIODE_TILES)
template <class T>
constexpr bool HAS_TILES = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool HAS_TILES = false;
#endif

constexpr int PANEL = 64;
constexpr int MAX_ROWS = 6;
// 128 words of a panel are 32 KiB: several groups of rows find them in the first- or second-level cache.
constexpr long BLOCK_WORDS = 128;
// 16 KiB: a block of a panel and the next one, which is fetched meanwhile, are in the first-level cache together.
constexpr long CACHED_WORDS = 4 << 10;
constexpr long PREFETCH_WORDS = 16;

template <class T>
constexpr long words_of(long numbers) {
    constexpr long in_a_word = 4 / sizeof(T);
    return (numbers + in_a_word - 1) / in_a_word;
}

constexpr long rounded_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// What is fetched while a panel is multiplied: for each of its words so many cache lines, and so many bytes further on.
template <int LINES>
struct Ahead {
    const char* at;
    long step;
};

// Few rows wait for memory: what comes a little later.
inline Ahead<4> from_there(const uint32_t* at) { return {reinterpret_cast<const char*>(at), PANEL * 4}; }

inline Ahead<4> a_little_ahead(const uint32_t* at) { return from_there(at + PREFETCH_WORDS * PANEL); }

// Otherwise each of the parts of the rows fetches its share of the block that comes next, having `done` so many words.
inline Ahead<2> share_of(const uint32_t* next_block, long word_bytes, long done, long parts) {
    const long step = std::min(128L, (word_bytes + parts - 1) / parts);
    return {reinterpret_cast<const char*>(next_block) + done * step, step};
}

// The words of a panel; lanes are its outputs.
struct PanelWords {
    const uint32_t* panel;

    const uint32_t* at(long word, long lane) const { return panel + word * PANEL + lane; }
};

// ROWS rows by 64 outputs, from `out` or from zero. Registers hold ROWS x GROUP vectors. `weights.at(word, lane)` are those
// of LANES outputs.
template <class T, int ROWS, class Words, int LINES>
void multiply_rows(const char* x, long x_bytes, const Words& weights, long words, float* out, bool from_zero,
                   Ahead<LINES> ahead) {
    constexpr int GROUP = REGISTERS == 32 ? 4 : 2;
    for (int column = 0; column < PANEL; column += GROUP * LANES) {
        Vec acc[ROWS][GROUP];
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < GROUP; g++)
                acc[r][g] = from_zero ? Vec{} : load(out + r * PANEL + column + g * LANES);
        long k = 0;
        if constexpr (ROWS > 1 && HAS_SQUARES<T>) {
            Squares<Vec, ROWS, GROUP> squares(acc);
            for (; k + 2 <= words; k += 2) {
                WordVec first[GROUP], next[GROUP];
                for (int g = 0; g < GROUP; g++) {
                    first[g] = (WordVec)load(weights.at(k, column + g * LANES));
                    next[g] = (WordVec)load(weights.at(k + 1, column + g * LANES));
                }
                squares.add(x + k * 4, x_bytes, first, next);
            }
            squares.give(acc);
        }
        const char* next = ahead.at;
        for (; k < words; k++, next += ahead.step) {
            Vec w[GROUP];
#pragma GCC unroll 4
            for (int line = 0; line < LINES; line++) __builtin_prefetch(next + 64 * line);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) w[g] = load(weights.at(k, column + g * LANES));
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                Vec input = broadcast(x + r * x_bytes + k * 4);
#pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++) acc[r][g] = accumulate(T{}, acc[r][g], w[g], input);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < GROUP; g++) store(out + r * PANEL + column + g * LANES, acc[r][g]);
    }
}

template <class T, class Words, int LINES>
void multiply_rows(long rows, const char* x, long x_bytes, const Words& weights, long words, float* out, bool from_zero,
                   Ahead<LINES> ahead) {
    switch (rows) {
        case 1: multiply_rows<T, 1>(x, x_bytes, weights, words, out, from_zero, ahead); break;
        case 2: multiply_rows<T, 2>(x, x_bytes, weights, words, out, from_zero, ahead); break;
        case 3: multiply_rows<T, 3>(x, x_bytes, weights, words, out, from_zero, ahead); break;
        case 4: multiply_rows<T, 4>(x, x_bytes, weights, words, out, from_zero, ahead); break;
        case 5: multiply_rows<T, 5>(x, x_bytes, weights, words, out, from_zero, ahead); break;
        case 6: multiply_rows<T, 6>(x, x_bytes, weights, words, out, from_zero, ahead); break;
    }
}

// out[rows][64] (+)= x[rows][words] times words that lie anywhere near. `x_stride` counts numbers of type T.
template <class T, class Words>
void multiply_words(const T* x, long x_stride, long rows, const Words& weights, long words, float* out, bool from_zero) {
    const char* inputs = reinterpret_cast<const char*>(x);
    const long x_bytes = x_stride * long(sizeof(T)), parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (long part = 0; part < parts; part++) {
        const long row = rows * part / parts, num_rows = rows * (part + 1) / parts - row;
        multiply_rows<T>(num_rows, inputs + row * x_bytes, x_bytes, weights, words, out + row * PANEL, from_zero,
                         Ahead<0>{nullptr, 0});
    }
}

// out[rows][64] (+)= x[rows][words] times one panel. `x_stride` counts numbers of type T. `next` is multiplied after it;
// null: what lies behind it.
template <class T>
void multiply_panel(const T* x, long x_stride, long rows, const uint32_t* panel, long words, float* out, bool from_zero,
                    const uint32_t* next = nullptr) {
    const char* inputs = reinterpret_cast<const char*>(x);
    const long x_bytes = x_stride * long(sizeof(T)), parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
#if defined(TRIODE_TILES)
    if constexpr (HAS_TILES<T>) return multiply_by_tiles(inputs, x_bytes, rows, panel, words, out, from_zero);
#endif
    if (parts == 1)
        return multiply_rows<T>(rows, inputs, x_bytes, PanelWords{panel}, words, out, from_zero, a_little_ahead(panel));
    const long blocks = (words * PANEL + CACHED_WORDS - 1) / CACHED_WORDS;
    for (long block = 0; block < blocks; block++) {
        const long first = words * block / blocks, end = words * (block + 1) / blocks, count = end - first;
        for (long part = 0; part < parts; part++) {
            const long row = rows * part / parts, num_rows = rows * (part + 1) / parts - row;
            const uint32_t* fetched = next && end == words ? next : panel + end * PANEL;
            const Ahead<2> ahead = share_of(fetched, PANEL * 4, part * count, parts);
            multiply_rows<T>(num_rows, inputs + row * x_bytes + first * 4, x_bytes, PanelWords{panel + first * PANEL}, count,
                             out + row * PANEL, from_zero && first == 0, ahead);
        }
    }
}

// Turns words of signed bytes into a panel of T, in which every byte is exact.
inline void widen_word(float, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i++) store(to + i * PANEL, numbers[i]);
}

inline void widen_word(bf16, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i += 2) store(to + i / 2 * PANEL, joined(numbers[i], numbers[i + 1]));
}

template <class T, class Words>
void widen_words(const Words& bytes, long words, uint32_t* to) {
    constexpr long WIDE_WORDS = sizeof(T);
    for (long word = 0; word < words; word++)
        for (int lane = 0; lane < PANEL; lane += LANES) {
            const WordVec four = (WordVec)load(bytes.at(word, lane));
            Vec numbers[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                numbers[i] = __builtin_convertvector((IntVec)(four << (24 - 8 * i)) >> 24, Vec);
            widen_word(T{}, numbers, to + word * WIDE_WORDS * PANEL + lane);
        }
}

// Bytes of a panel, each of which is fetched some time before it is read.
struct StreamedWords {
    const uint32_t* panel;

    const uint32_t* at(long word, long lane) const {
        const uint32_t* from = panel + word * PANEL + lane;
        __builtin_prefetch(from + PREFETCH_WORDS * PANEL);
        return from;
    }
};

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
