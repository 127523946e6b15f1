// Products of rows with packed matrices, whichever way a matrix keeps its numbers, shared among threads panel by panel.
#pragma once

#include "arena.h"
#include "model.h"
#include "team.h"

namespace triode {

// Rows of a product that one item computes: their inputs stay in the second-level cache.
constexpr long ITEM_ROWS = 96;

// What one thread needs for products.
struct LinearScratch {
    float* product;  // [ITEM_ROWS][64]
    uint32_t* wide;  // [BLOCK_WORDS][64], a block of weights that are kept as bytes

    void take(Arena& arena) {
        product = arena.take<float>(ITEM_ROWS * PANEL);
        wide = arena.take<uint32_t>(BLOCK_WORDS * PANEL);
    }
};

// Rows of x times one panel of bytes, which become numbers block by block, once for all rows.
template <class T>
void multiply_bytes(const LinearScratch& mine, const TriodeMatrix& matrix, const T* x, long stride, long rows, long panel) {
    constexpr long AT_ONCE = BLOCK_WORDS / long(sizeof(T));
    const long words = words_of<uint8_t>(matrix.in_features);
    const uint32_t* bytes = matrix.panels + panel * words * PANEL;
    for (long first = 0; first < words; first += AT_ONCE) {
        const long count = std::min(AT_ONCE, words - first);
        widen_panel<T>(bytes + first * PANEL, count, mine.wide);
        multiply_panel(x + first * 4, stride, rows, mine.wide, count * long(sizeof(T)), mine.product, first == 0);
    }
    const float* scales = matrix.scales + panel * PANEL;
    for (long i = 0; i < rows * PANEL; i += LANES) store(mine.product + i, load(mine.product + i) * load(scales + i % PANEL));
}

// x W^T, given to `write(row, first output, 64 sums)` panel by panel. `inputs()` is x, asked for once an item.
template <class T, class Inputs, class Write>
void linear(Worker& worker, const LinearScratch& mine, const TriodeMatrix& matrix, Inputs inputs, long stride, long rows,
            Write write) {
    const long words = words_of<T>(matrix.in_features), panels = (matrix.out_features + PANEL - 1) / PANEL;
    const long parts = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
    worker.share(panels * parts, [&](long item) {
        const long panel = item % panels, part = item / panels;
        const long first = rows * part / parts, end = rows * (part + 1) / parts;
        const T* x = inputs() + first * stride;
        if (matrix.scales)
            multiply_bytes<T>(mine, matrix, x, stride, end - first, panel);
        else
            multiply_panel(x, stride, end - first, matrix.panels + panel * words * PANEL, words, mine.product, true);
        for (long row = first; row < end; row++) write(row, panel * PANEL, mine.product + (row - first) * PANEL);
    });
}

inline Vec with_bias(const TriodeMatrix& matrix, long output, const float* sums) {
    Vec y = load(sums);
    return matrix.bias ? y + load(matrix.bias + output) : y;
}

}  // namespace triode
