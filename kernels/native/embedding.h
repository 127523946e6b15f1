// Looks single rows up in a packed matrix, as an embedding does: for each of a row's words a cache line, which is little
// beside what the row is multiplied with afterwards. So a tied head needs no second copy of the embedding.
#pragma once

#include "grouped.h"
#include "model.h"

namespace triode {

// Rows of numbers as they are.
template <class T>
void look_up_numbers(const uint32_t* panel, long lane, long inputs, float* to) {
    constexpr long IN_A_WORD = 4 / sizeof(T);
    for (long i = 0; i < inputs; i += IN_A_WORD) {
        T numbers[IN_A_WORD];
        memcpy(numbers, panel + i / IN_A_WORD * PANEL + lane, 4);
        for (long j = 0; j < std::min(IN_A_WORD, inputs - i); j++) to[i + j] = widen(numbers[j]);
    }
}

// Rows of signed bytes with one scale.
inline void look_up_bytes(const uint32_t* panel, long lane, long inputs, float scale, float* to) {
    for (long i = 0; i < inputs; i++) {
        int8_t bytes[4];
        memcpy(bytes, panel + i / 4 * PANEL + lane, 4);
        to[i] = scale * float(bytes[i % 4]);
    }
}

// Rows of groups.
inline void look_up_groups(const uint32_t* panel, const Layout& layout, long lane, long inputs, float* to) {
    const long at_once = layout.format.bits == 8 ? 4 : 8, first_lane = lane / LANES * LANES;
    for (long index = 0; index < layout.groups(inputs); index++, to += layout.group) {
        const uint32_t* at = panel + index * layout.group_size();
        const float scale = layout.widened(layout.scales(at) + first_lane)[lane % LANES];
        const float minimum = layout.format.has_minimum
                                  ? layout.widened(layout.minimums(at) + first_lane)[lane % LANES]
                                  : -float(layout.format.zero) * scale;
        for (long i = 0; i < std::min(layout.group, inputs - index * layout.group); i++) {
            uint8_t bytes[4];
            memcpy(bytes, at + i / at_once * PANEL + lane, 4);
            const int stored = at_once == 4 ? bytes[i % 4] : bytes[i % 4] >> i % 8 / 4 * 4 & 0xf;
            to[i] = scale * float(stored) + minimum;
        }
    }
}

// The weights of output `row`, as floats.
template <class T>
void look_up(const TriodeMatrix& matrix, long row, float* to) {
    const long panel = row / PANEL, lane = row % PANEL, inputs = matrix.in_features;
    if (matrix.format == PLAIN)
        return look_up_numbers<T>(matrix.panels + panel * words_of<T>(inputs) * PANEL, lane, inputs, to);
    if (matrix.format == CHANNEL8)
        return look_up_bytes(matrix.panels + panel * words_of<int8_t>(inputs) * PANEL, lane, inputs, matrix.scales[row], to);
    const Layout layout(matrix.format, matrix.group, inputs);
    look_up_groups(matrix.panels + panel * layout.groups(inputs) * layout.group_size(), layout, lane, inputs, to);
}

}  // namespace triode
