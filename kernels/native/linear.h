// Products of rows with packed matrices, whichever way a matrix keeps its numbers, shared among threads panel by panel.
#pragma once

#include "arena.h"
#include "grouped_tiles.h"
#include "model.h"
#include "team.h"

namespace triode {

// Rows of a product that one item computes: their inputs stay in the second-level cache.
constexpr long ITEM_ROWS = 96;
// Up to so many rows each thread prepares all of them for itself, which is quicker than meeting once more.
constexpr long FEW_ROWS = 16;
constexpr long ITEM_TOKENS = 8;

// What one thread needs for products.
struct LinearScratch {
    float* product;   // [ITEM_ROWS][64]
    uint32_t* wide;   // [BLOCK_WORDS][64], a block of weights that are kept as bytes
    ByteRows few;     // up to FEW_ROWS rows
    ByteRows shared;  // the rows of a product of more, by all threads

    // `rows_of_all` is the same for all threads.
    void take(Arena& arena, long inputs, const ByteRows& rows_of_all) {
        product = arena.take<float>(ITEM_ROWS * PANEL);
        wide = arena.take<uint32_t>(BLOCK_WORDS * PANEL);
        few.take(arena, FEW_ROWS, inputs);
        shared = rows_of_all;
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

// The same of weights in groups.
template <class T>
void multiply_widened(const LinearScratch& mine, const Layout& layout, long inputs, const T* x, long stride, long rows,
                      const uint32_t* panel) {
    const long group_words = words_of<T>(layout.group), words = words_of<T>(inputs);
    const long at_once = BLOCK_WORDS / group_words;
    for (long index = 0; index < layout.groups(inputs); index += at_once) {
        const long count = std::min(at_once, layout.groups(inputs) - index), first = index * group_words;
        for (long i = 0; i < count; i++)
            widen_group<T>(panel + (index + i) * layout.group_size(), layout, mine.wide + i * group_words * PANEL);
        multiply_panel(x + index * layout.group, stride, rows, mine.wide, std::min(count * group_words, words - first),
                       mine.product, index == 0);
    }
}

// Rows `first` to `end` of x times one panel, to `mine.product`.
template <class T>
void multiply(const LinearScratch& mine, const TriodeMatrix& matrix, const T* x, long stride, long first, long end,
              long panel) {
    const long words = words_of<T>(matrix.in_features);
    if (matrix.format == PLAIN) {
        const uint32_t* numbers = matrix.panels + panel * words * PANEL;
        multiply_panel(x + first * stride, stride, end - first, numbers, words, mine.product, true);
    } else if (matrix.format == CHANNEL8) {
        multiply_bytes(mine, matrix, x + first * stride, stride, end - first, panel);
    } else {
        const Layout layout(matrix.format, matrix.group, matrix.in_features);
        const uint32_t* groups = matrix.panels + panel * layout.groups(matrix.in_features) * layout.group_size();
        multiply_widened(mine, layout, matrix.in_features, x + first * stride, stride, end - first, groups);
    }
}

// x W^T, given to `write(row, first output, 64 sums)` panel by panel. `inputs()` is x, asked for once an item.
//
// Takes up to two phases.
template <class T, class Inputs, class Write>
void linear(Worker& worker, const LinearScratch& mine, const TriodeMatrix& matrix, Inputs inputs, long stride, long rows,
            Write write) {
    const long panels = (matrix.out_features + PANEL - 1) / PANEL, parts = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
    const Layout layout(matrix.format, matrix.group, matrix.in_features);
    auto quantize = [&](const ByteRows& to, const T* x, long row) {
        quantize_row(x + row * stride, matrix.in_features, layout.group, to.from(row));
    };
    if (matrix.byte_inputs && rows > FEW_ROWS)
        worker.share((rows + ITEM_TOKENS - 1) / ITEM_TOKENS, [&](long item) {
            const T* x = inputs();
            for (long row = item * ITEM_TOKENS; row < std::min((item + 1) * ITEM_TOKENS, rows); row++)
                quantize(mine.shared, x, row);
        });
    bool is_quantized = rows > FEW_ROWS;
    worker.share(panels * parts, [&](long item) {
        const long panel = item % panels, part = item / panels;
        const long first = rows * part / parts, end = rows * (part + 1) / parts;
        if (matrix.byte_inputs) {
            for (long row = 0; !is_quantized && row < rows; row++) quantize(mine.few, inputs(), row);
            is_quantized = true;
            const ByteRows& x = rows > FEW_ROWS ? mine.shared : mine.few;
            multiply_byte_rows(x.from(first), end - first,
                               matrix.panels + panel * layout.groups(matrix.in_features) * layout.group_size(), layout,
                               matrix.in_features, mine.product);
        } else {
            multiply(mine, matrix, inputs(), stride, first, end, panel);
        }
        for (long row = first; row < end; row++) write(row, panel * PANEL, mine.product + (row - first) * PANEL);
    });
}

inline Vec with_bias(const TriodeMatrix& matrix, long output, const float* sums) {
    Vec y = load(sums);
    return matrix.bias ? y + load(matrix.bias + output) : y;
}

}  // namespace triode
