// Products by instructions that multiply two rows by two outputs at once, as ARM's BFMMLA and USMMLA do.
//
// Such an instruction reads eight bytes of each row and output. Those of an output are two words of a panel, which lie apart:
// vectors of the first and of the second words, zipped, are two outputs in each 16 bytes. Sums are kept as the instruction
// has them, (output, row), and become rows again at the end. They are those of `accumulate` and `dot_bytes`, bit for bit.
#pragma once

#include <utility>

#include "vector.h"

namespace triode {

// Whether there is such an instruction for inputs of this type.
template <class T>
constexpr bool HAS_SQUARES = false;

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
constexpr bool HAS_SQUARES<bf16> = true;

inline Vec add_square(Vec acc, WordVec w, WordVec x) {
    return (Vec)arm_square_halves((ArmFloats)acc, (ArmHalves)w, (ArmHalves)x);
}
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
template <>
constexpr bool HAS_SQUARES<int8_t> = true;

inline IntVec add_square(IntVec acc, WordVec w, WordVec x) {
    return (IntVec)arm_square_mixed((ArmWords)acc, (ArmUnsigned)w, (ArmSigned)x);
}
#endif

// Lanes of two vectors in turn: of their first halves, or of their second halves.
template <bool SECOND, class V, int... I>
V zip(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / 2 + (SECOND ? LANES / 2 : 0) + I % 2 * LANES)...);
}

// The even lanes of two vectors, or the odd ones.
template <bool ODD, class V, int... I>
V unzip(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + ODD)...);
}

typedef std::make_integer_sequence<int, LANES> AllLanes;

// Sums of ROWS rows by COLUMNS vectors of outputs. The last of an odd number of rows is its own partner.
template <class V, int ROWS, int COLUMNS>
class Squares {
  public:
    explicit Squares(const V (&rows)[ROWS][COLUMNS]) {
        for (int p = 0; p < PAIRS; p++)
            for (int c = 0; c < COLUMNS; c++) {
                sums_[p][c][0] = zip<false>(rows[2 * p][c], rows[second(p)][c], AllLanes());
                sums_[p][c][1] = zip<true>(rows[2 * p][c], rows[second(p)][c], AllLanes());
            }
    }

    // Eight bytes of each row, `x_bytes` apart, times two words of each output.
    void add(const void* x, long x_bytes, const WordVec (&first)[COLUMNS], const WordVec (&next)[COLUMNS]) {
        WordVec inputs[PAIRS];
#pragma GCC unroll 3
        for (int p = 0; p < PAIRS; p++) inputs[p] = pair(x, 2 * p * x_bytes, second(p) * x_bytes);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            const WordVec low = zip<false>(first[c], next[c], AllLanes()), high = zip<true>(first[c], next[c], AllLanes());
#pragma GCC unroll 3
            for (int p = 0; p < PAIRS; p++) {
                sums_[p][c][0] = add_square(sums_[p][c][0], low, inputs[p]);
                sums_[p][c][1] = add_square(sums_[p][c][1], high, inputs[p]);
            }
        }
    }

    void give(V (&rows)[ROWS][COLUMNS]) const {
        for (int p = 0; p < PAIRS; p++)
            for (int c = 0; c < COLUMNS; c++) {
                rows[2 * p][c] = unzip<false>(sums_[p][c][0], sums_[p][c][1], AllLanes());
                if (2 * p + 1 < ROWS) rows[2 * p + 1][c] = unzip<true>(sums_[p][c][0], sums_[p][c][1], AllLanes());
            }
    }

  private:
    static constexpr int PAIRS = (ROWS + 1) / 2;
    static constexpr int second(int pair) { return 2 * pair + 1 < ROWS ? 2 * pair + 1 : 2 * pair; }

    // Eight bytes of two rows, in each 16 bytes.
    static WordVec pair(const void* x, long row, long partner) {
        typedef uint64_t LongVec __attribute__((vector_size(LANES * 4)));
        uint64_t mine, other;
        memcpy(&mine, static_cast<const char*>(x) + row, 8);
        memcpy(&other, static_cast<const char*>(x) + partner, 8);
        LongVec both = {};
        for (int i = 0; i < LANES / 2; i++) both[i] = i % 2 ? other : mine;
        return (WordVec)both;
    }

    V sums_[PAIRS][COLUMNS][2];
};

}  // namespace triode
