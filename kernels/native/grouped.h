// Weights of 4 or 8 bits with a scale for each group of inputs, and products of theirs with rows of 8 or more bits.
//
// A weight is scale * (stored - zero) + minimum, where `stored` has no sign. Panels of 64 outputs are packed as in
// `panel.h`, but a panel is a run of groups of 32, 64 or 128 inputs, or one group of all. A group is its words,
// [words][64], then the scales of the 64 outputs in 16 bits each, then as many minimums where the format has them: one
// stream of memory. A word holds four inputs of 8 bits, or eight of 4 bits, whose first four are the lower halves of
// its bytes.
//
// Rows that are multiplied as bytes are cut into the same groups, each with a scale of its own. A product of a group is an
// integer, hence exact; the groups are added up in order, in floats. So a row's result depends on no other row.
#pragma once

#include "panel.h"

namespace triode {

// Mirrored in `library.py`.
enum FormatName { PLAIN, CHANNEL8, GROUP8, GROUP4, GGUF_Q8_0, GGUF_Q4_0, GGUF_Q4_1 };

struct Format {
    int bits;
    int zero;
    bool has_minimum;
    bool is_half;  // scales and minimums are IEEE half precision, otherwise bfloat16
};

constexpr Format FORMATS[] = {
    {}, {}, {8, 128, false, false}, {4, 0, true, false}, {8, 128, false, true}, {4, 8, false, true}, {4, 0, true, true},
};

constexpr long MAX_GROUP = 128;
constexpr long MIN_GROUP = 32;
// Sums of more products of bytes could be too large for 32 bits.
constexpr long MAX_WHOLE_ROW = 1 << 15;

// How a format is laid out with groups of one size.
struct Layout {
    Format format;
    long group;
    long words;  // of one output's group

    // `size` of 0 makes one group of all inputs.
    Layout(long name, long size, long inputs)
        : format(FORMATS[name]), group(size ? size : rounded_up(inputs, MIN_GROUP)), words(group * format.bits / 32) {}

    // In words of 32 bits.
    long group_size() const { return words * PANEL + (format.has_minimum ? 2 : 1) * PANEL / 2; }
    long groups(long inputs) const { return (inputs + group - 1) / group; }

    const uint16_t* scales(const uint32_t* at) const { return reinterpret_cast<const uint16_t*>(at + words * PANEL); }
    const uint16_t* minimums(const uint32_t* at) const { return scales(at) + PANEL; }

    Vec widened(const uint16_t* from) const {
        return format.is_half ? widen_half(load_shorts(from)) : widen_bf16(load_shorts(from));
    }
};

// Rows as bytes: [rows][stride], and a scale and the sum of the bytes for each group, [rows][groups].
struct ByteRows {
    int8_t* bytes;
    float* scales;
    int32_t* sums;
    long stride;
    long groups;

    // Space for rows of up to `inputs` numbers in groups of any size.
    template <class Arena>
    void take(Arena& arena, long rows, long inputs) {
        stride = rounded_up(inputs, MAX_GROUP);
        groups = stride / MIN_GROUP;
        bytes = arena.template take<int8_t>(rows * stride);
        scales = arena.template take<float>(rows * groups);
        sums = arena.template take<int32_t>(rows * groups);
    }

    ByteRows from(long row) const {
        return {bytes + row * stride, scales + row * groups, sums + row * groups, stride, groups};
    }
};

// Rounds a group of a row to bytes from -127 to 127, by its largest magnitude over 127; zeros follow to the group's end.
//
// The scale is NaN if the group has one, so that its products are; below 2^-100 everything is zero.
template <class T>
void quantize_group(const T* x, long count, long group, int8_t* bytes, float& scale, int32_t& sum) {
    // The bits of magnitudes order like the magnitudes, NaN above all.
    uint32_t most_bits = 0;
    for (long i = 0; i < count; i++) {
        const float number = widen(x[i]);
        uint32_t bits;
        memcpy(&bits, &number, 4);
        bits &= 0x7fffffff;
        most_bits = bits > most_bits ? bits : most_bits;
    }
    float most;
    memcpy(&most, &most_bits, 4);
    if (most < 7.9e-31f) most = 0.f;
    const float inverse = most == 0.f ? 0.f : 127.f / most;
    int32_t total = 0;
    for (long i = 0; i < count; i++) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
        const float shifted = widen(x[i]) * inverse + 12582912.f;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        bytes[i] = int8_t(bits);
        total += bytes[i];
    }
    std::fill(bytes + count, bytes + group, int8_t(0));
    scale = most / 127.f;
    sum = total;
}

template <class T>
void quantize_row(const T* x, long size, long group, const ByteRows& to) {
    for (long first = 0, index = 0; first < size; first += group, index++)
        quantize_group(x + first, std::min(group, size - first), group, to.bytes + first, to.scales[index],
                       to.sums[index]);
}

// Four inputs of LANES outputs from the words at `w`: `index` counts fours.
template <int BITS>
WordVec four_inputs(const uint32_t* w, long index) {
    if (BITS == 8) return (WordVec)load(w + index * PANEL);
    return (WordVec)load(w + index / 2 * PANEL) >> unsigned(4 * (index % 2)) & 0x0f0f0f0fu;
}

// acc += ROWS rows of bytes, `stride` apart, times so many words of COLUMNS vectors of outputs.
template <int BITS, int ROWS, int COLUMNS, int LINES>
ALWAYS_INLINE void dot_group(const int8_t* bytes, long stride, const uint32_t* w, long words, Ahead<LINES> ahead,
                             IntVec (&acc)[ROWS][COLUMNS]) {
    if constexpr (ROWS > 1 && HAS_SQUARES<int8_t>) {
        Squares<IntVec, ROWS, COLUMNS> squares(acc);
        for (long i = 0; i < words * (8 / BITS); i += 2) {
            WordVec first[COLUMNS], next[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) {
                first[c] = four_inputs<BITS>(w + c * LANES, i);
                next[c] = four_inputs<BITS>(w + c * LANES, i + 1);
            }
            squares.add(bytes + i * 4, stride, first, next);
        }
        squares.give(acc);
        return;
    }
    for (long k = 0; k < words; k++, w += PANEL, ahead.at += ahead.step) {
#pragma GCC unroll 4
        for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead.at + 64 * line);
#pragma GCC unroll 2
        for (int half = 0; half < 8 / BITS; half++) {
            WordVec stored[COLUMNS];
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) stored[c] = four_inputs<BITS>(w + c * LANES, half);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const WordVec input = (WordVec)broadcast(bytes + r * stride + (k * (8 / BITS) + half) * 4);
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; c++) acc[r][c] = dot_bytes<BITS>(acc[r][c], stored[c], input);
            }
        }
    }
}

// Formats whose products differ in more than the size of a group.
template <int BITS_, int ZERO_, bool HAS_MINIMUM_>
struct Kind {
    static constexpr int BITS = BITS_, ZERO = ZERO_;
    static constexpr bool HAS_MINIMUM = HAS_MINIMUM_;
};

// ROWS rows by one group of 64 outputs, added to `out` or to zero.
template <class Kind, int ROWS, int LINES>
struct GroupProduct {
    static constexpr int COLUMNS = REGISTERS == 32 ? 4 : 2;

    const ByteRows& x;
    const long index;
    const uint32_t* const at;
    const Layout& layout;
    float* const out;
    const Ahead<LINES> ahead;

    void run(bool from_zero) const {
        for (int column = 0; column < PANEL; column += COLUMNS * LANES) {
            IntVec acc[ROWS][COLUMNS];
            multiply(column, acc);
            if (from_zero)
                scale<true>(column, acc);
            else
                scale<false>(column, acc);
        }
    }

    ALWAYS_INLINE void multiply(int column, IntVec (&acc)[ROWS][COLUMNS]) const {
        const int8_t* bytes = x.bytes + index * layout.group;
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const IntVec offset = IntVec{} - x.sums[r * x.groups + index] * (Kind::ZERO - BYTE_OFFSET<Kind::BITS>);
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) acc[r][c] = offset;
        }
        dot_group<Kind::BITS>(bytes, x.stride, at + column, layout.words, ahead, acc);
    }

    template <bool FROM_ZERO>
    ALWAYS_INLINE void scale(int column, const IntVec (&acc)[ROWS][COLUMNS]) const {
        Vec scales[COLUMNS], minimums[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            scales[c] = layout.widened(layout.scales(at) + column + c * LANES);
            if (Kind::HAS_MINIMUM) minimums[c] = layout.widened(layout.minimums(at) + column + c * LANES);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const float x_scale = x.scales[r * x.groups + index];
            const Vec x_scales = splat(x_scale), x_sums = splat(x_scale * float(x.sums[r * x.groups + index]));
            float* to = out + r * PANEL + column;
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) {
                Vec total = FROM_ZERO ? Vec{} : load(to + c * LANES);
                total = multiply_add(__builtin_convertvector(acc[r][c], Vec), scales[c] * x_scales, total);
                if (Kind::HAS_MINIMUM) total = multiply_add(minimums[c], x_sums, total);
                store(to + c * LANES, total);
            }
        }
    }
};

// Groups `first` to `end` of a panel, for rows of bytes. A panel's groups are cut into blocks that stay in the cache while
// one part of the rows after the other is multiplied with them.
struct GroupBlock {
    const uint32_t* panel;
    const uint32_t* next_panel;
    const Layout& layout;
    long count;  // of the panel's groups
    long first;
    long end;
    long part;
    long parts;

    template <class Kind, int ROWS>
    void multiply(const ByteRows& x, float* out) const {
        const long size = layout.group_size();
        if constexpr (ROWS > MAX_ROWS / 2 - 1)
            if (parts > 1) {
                // A share of the next block is fetched meanwhile.
                const long done = part * (end - first) * layout.words;
                const uint32_t* next = end < count ? panel + end * size : next_panel;
                Ahead<2> ahead = share_of(next, size * 4 / layout.words, done, parts);
                for (long index = first; index < end; index++, ahead.at += layout.words * ahead.step)
                    GroupProduct<Kind, ROWS, 2>{x, index, panel + index * size, layout, out, ahead}.run(index == 0);
                return;
            }
        const long distance = std::max(1L, PREFETCH_WORDS / layout.words);
        for (long index = first; index < end; index++) {
            const uint32_t* at = panel + index * size;
            const long later = index + distance;
            const uint32_t* fetched = count == 1      ? at + PREFETCH_WORDS * PANEL
                                      : later < count ? panel + later * size
                                                      : next_panel + (later - count) * size;
            GroupProduct<Kind, ROWS, 4>{x, index, at, layout, out, from_there(fetched)}.run(index == 0);
        }
    }

    template <class Kind>
    void multiply(long rows, const ByteRows& x, float* out) const {
        switch (rows) {
            case 1: multiply<Kind, 1>(x, out); break;
            case 2: multiply<Kind, 2>(x, out); break;
            case 3: multiply<Kind, 3>(x, out); break;
            case 4: multiply<Kind, 4>(x, out); break;
            case 5: multiply<Kind, 5>(x, out); break;
            case 6: multiply<Kind, 6>(x, out); break;
        }
    }
};

// out[rows][64] = rows of bytes times one panel. `next_panel` will be multiplied after it.
inline void multiply_grouped(const ByteRows& x, long rows, const uint32_t* panel, const uint32_t* next_panel,
                             const Layout& layout, long inputs, float* out) {
    const long size = layout.group_size(), count = layout.groups(inputs), parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const long blocks = parts == 1 ? 1 : std::min(count, (count * size + CACHED_WORDS - 1) / CACHED_WORDS);
    for (long index = 0; index < blocks; index++)
        for (long part = 0; part < parts; part++) {
            const GroupBlock block{
                panel, next_panel, layout, count, count * index / blocks, count * (index + 1) / blocks, part, parts,
            };
            const long row = rows * part / parts, end = rows * (part + 1) / parts;
            float* to = out + row * PANEL;
            if (layout.format.bits == 8)
                block.multiply<Kind<8, 128, false>>(end - row, x.from(row), to);
            else if (layout.format.has_minimum)
                block.multiply<Kind<4, 0, true>>(end - row, x.from(row), to);
            else
                block.multiply<Kind<4, 8, false>>(end - row, x.from(row), to);
        }
}

// Two vectors of consecutive inputs as one of words.
inline Vec paired(Vec low, Vec high) {
#if defined(__AVX512BF16__)
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order = _mm512_add_epi16(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(0x10001)));
    return (Vec)_mm512_permutexvar_epi16(order, halves);
#else
    const WordVec a = (WordVec)low, b = (WordVec)high;
    const WordVec first = (a + 0x7fffu + (a >> 16 & 1u)) >> 16, second = b + 0x7fffu + (b >> 16 & 1u);
    return (Vec)(first | (second & 0xffff0000u));
#endif
}

// Four consecutive inputs of LANES outputs, as a panel of T holds them.
inline void store_inputs(float, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i++) store(to + i * PANEL, numbers[i]);
}

inline void store_inputs(bf16, const Vec* numbers, uint32_t* to) {
    for (int i = 0; i < 4; i += 2) store(to + i / 2 * PANEL, paired(numbers[i], numbers[i + 1]));
}

// Turns a group into numbers of type T, rounded to nearest, laid out as a panel of them.
template <class T>
void widen_group(const uint32_t* at, const Layout& layout, uint32_t* to) {
    const long at_once = layout.format.bits == 8 ? 1 : 2, four_inputs = long(sizeof(T)) * PANEL;
    for (int lane = 0; lane < PANEL; lane += LANES) {
        const Vec scale = layout.widened(layout.scales(at) + lane);
        const Vec minimum = layout.format.has_minimum ? layout.widened(layout.minimums(at) + lane)
                                                      : scale * splat(float(-layout.format.zero));
        const WordVec mask = WordVec{} + (at_once == 1 ? 0xffu : 0xfu);
        for (long word = 0; word < layout.words; word++) {
            const uint32_t* from = at + word * PANEL + lane;
            __builtin_prefetch(from + PREFETCH_WORDS * PANEL);
            const WordVec stored = (WordVec)load(from);
            for (long half = 0; half < at_once; half++) {
                Vec numbers[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const IntVec number = (IntVec)(stored >> unsigned(4 * half + 8 * i) & mask);
                    numbers[i] = multiply_add(__builtin_convertvector(number, Vec), scale, minimum);
                }
                store_inputs(T{}, numbers, to + (word * at_once + half) * four_inputs + lane);
            }
        }
    }
}

}  // namespace triode
