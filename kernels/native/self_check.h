// Some products, computed before anything relies on this build: a row must have the same bits alone and in company, in one
// piece and in several, and be near to what float64 gives. A processor, or a system that pretends to be one, whose
// instructions add up in an order that depends on the number of rows is found out here.
#pragma once

#include <vector>

#include "grouped_tiles.h"
#include "packing.h"

namespace triode {

namespace self_check {

constexpr long ROWS = 37;
// Several blocks of whole tiles, and a last tile that is not full.
constexpr long INPUTS = 328;
constexpr double TOLERANCE = 1e-5;

// Multiples of 2^-16 between -1 and 1, by a linear congruential generator (Numerical Recipes' constants).
inline std::vector<float> numbers(long count) {
    std::vector<float> all(count);
    uint32_t state = 1;
    for (float& number : all) {
        state = state * 1664525u + 1013904223u;
        number = float(int32_t(state) >> 15) / 65536.f;
    }
    return all;
}

// Whether `multiply(first row, rows, out)` gives a row the same bits in any company.
template <class Multiply>
bool rows_agree(Multiply multiply) {
    std::vector<float> together(ROWS * PANEL), apart(ROWS * PANEL);
    multiply(0, ROWS, together.data());
    for (long at_once : {1L, 3L, 16L, 19L}) {
        for (long row = 0; row < ROWS; row += at_once)
            multiply(row, std::min(at_once, ROWS - row), apart.data() + row * PANEL);
        if (memcmp(together.data(), apart.data(), together.size() * sizeof(float))) return false;
    }
    return true;
}

// Whether each sum is that of `term(row, output, input)`.
template <class Term>
bool are_near(const std::vector<float>& sums, Term term) {
    for (long at = 0; at < ROWS * PANEL; at++) {
        double exact = 0, size = 0;
        for (long input = 0; input < INPUTS; input++) {
            const double one = term(at / PANEL, at % PANEL, input);
            exact += one;
            size += std::fabs(one);
        }
        if (!(std::fabs(double(sums[at]) - exact) <= TOLERANCE * size)) return false;
    }
    return true;
}

template <class T>
const char* numbers_error() {
    std::vector<T> x(ROWS * INPUTS), matrix(PANEL * INPUTS);
    const std::vector<float> from = numbers(x.size() + matrix.size());
    for (size_t i = 0; i < x.size(); i++) narrow(from[i], x[i]);
    for (size_t i = 0; i < matrix.size(); i++) narrow(from[x.size() + i], matrix[i]);
    const long words = words_of<T>(INPUTS);
    std::vector<uint32_t> panel(words * PANEL);
    pack_panel(matrix.data(), PANEL, INPUTS, false, 0, panel.data());
    auto multiply = [&](long row, long rows, float* out) {
        multiply_panel(x.data() + row * INPUTS, INPUTS, rows, panel.data(), words, out, true);
    };
    if (!rows_agree(multiply)) return "a row of numbers has other bits in company than alone";
    std::vector<float> whole(ROWS * PANEL), other(ROWS * PANEL);
    multiply(0, ROWS, whole.data());
    auto term = [&](long row, long output, long input) {
        return double(widen(x[row * INPUTS + input])) * widen(matrix[output * INPUTS + input]);
    };
    if (!are_near(whole, term)) return "a product of numbers is wrong";
    const long first = words_of<T>(64);
    multiply_panel(x.data(), INPUTS, ROWS, panel.data(), first, other.data(), true);
    multiply_panel(x.data() + 64, INPUTS, ROWS, panel.data() + first * PANEL, words - first, other.data(), false);
    if (whole != other) return "a product of numbers has other bits in pieces than whole";
    // Zeros behind a row's inputs, as attention has them.
    const long kept = 74;
    for (long row = 0; row < ROWS; row++) std::fill_n(x.data() + row * INPUTS + kept, INPUTS - kept, T{});
    multiply(0, ROWS, whole.data());
    multiply_panel(x.data(), INPUTS, ROWS, panel.data(), words_of<T>(kept), other.data(), true);
    return whole == other ? nullptr : "a product of numbers has other bits with zeros behind them";
}

inline const char* bytes_error(long format, long group) {
    const std::vector<float> x = numbers(ROWS * INPUTS), matrix = numbers(PANEL * INPUTS);
    const Layout layout(format, group, INPUTS);
    std::vector<uint32_t> panel(layout.groups(INPUTS) * layout.group_size());
    pack_rounded(matrix.data(), layout, PANEL, INPUTS, false, 0, panel.data());
    const long stride = rounded_up(INPUTS, MAX_GROUP), groups = stride / MIN_GROUP;
    std::vector<int8_t> bytes(ROWS * stride);
    std::vector<float> scales(ROWS * groups);
    std::vector<int32_t> sums(ROWS * groups);
    const ByteRows rows{bytes.data(), scales.data(), sums.data(), stride, groups};
    for (long row = 0; row < ROWS; row++) quantize_row(x.data() + row * INPUTS, INPUTS, layout.group, rows.from(row));
    auto multiply = [&](long row, long count, float* out) {
        multiply_byte_rows(rows.from(row), count, panel.data(), panel.data(), layout, INPUTS, out);
    };
    if (!rows_agree(multiply)) return "a row of bytes has other bits in company than alone";
    std::vector<float> whole(ROWS * PANEL);
    multiply(0, ROWS, whole.data());
    // Numbers, one a word, to multiply with.
    std::vector<uint32_t> wide(layout.groups(INPUTS) * layout.group * PANEL);
    for (long index = 0; index < layout.groups(INPUTS); index++)
        widen_group<float>(panel.data() + index * layout.group_size(), layout, wide.data() + index * layout.group * PANEL);
    auto term = [&](long row, long output, long input) {
        float weight;
        memcpy(&weight, &wide[input * PANEL + output], sizeof weight);
        return double(bytes[row * stride + input]) * scales[row * groups + input / layout.group] * weight;
    };
    return are_near(whole, term) ? nullptr : "a product of bytes is wrong";
}

}  // namespace self_check

// What is wrong with the products of this build on this processor, or null.
inline const char* products_error() {
    const char* error = self_check::numbers_error<float>();
    if (!error) error = self_check::numbers_error<bf16>();
    for (long group : {32, 64, 128, 0})
        for (long format : {GROUP8, GROUP4})
            if (!error && (group || format == GROUP8)) error = self_check::bytes_error(format, group);
    return error;
}

}  // namespace triode
