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
constexpr long FEW_ROWS = 4;

// Rows of a phase that threads share row by row, which one item has.
constexpr long item_rows(long rows) { return rows < 64 ? 2 : 8; }

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
        widen_words<T>(StreamedWords{bytes + first * PANEL}, count, mine.wide);
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

// Words of one panel, whose outputs are 64.
template <class T>
long panel_size(const TriodeMatrix& matrix) {
    if (matrix.format == PLAIN) return words_of<T>(matrix.in_features) * PANEL;
    if (matrix.format == CHANNEL8) return words_of<uint8_t>(matrix.in_features) * PANEL;
    const Layout layout(matrix.format, matrix.group, matrix.in_features);
    return layout.groups(matrix.in_features) * layout.group_size();
}

// Rows `first` to `end` of x times one panel, to `mine.product`; what is at `next` is multiplied after it.
template <class T>
void multiply(const LinearScratch& mine, const TriodeMatrix& matrix, const T* x, long stride, long first, long end,
              long panel, const uint32_t* next) {
    const long words = words_of<T>(matrix.in_features);
    if (matrix.format == PLAIN) {
        const uint32_t* numbers = matrix.panels + panel * words * PANEL;
        multiply_panel(x + first * stride, stride, end - first, numbers, words, mine.product, true, next);
    } else if (matrix.format == CHANNEL8) {
        multiply_bytes(mine, matrix, x + first * stride, stride, end - first, panel);
    } else {
        const Layout layout(matrix.format, matrix.group, matrix.in_features);
        const uint32_t* groups = matrix.panels + panel * layout.groups(matrix.in_features) * layout.group_size();
        multiply_widened(mine, layout, matrix.in_features, x + first * stride, stride, end - first, groups);
    }
}

// Rows of a product that are in memory already.
template <class T>
struct GivenRows {
    static constexpr bool ARE_THERE = true;

    const T* rows;
    long stride;

    const T* of(bool) const { return rows; }
    void prepare(bool, long) const {}
};

// x W^T, given to `write(row, first output, 64 sums)` panel by panel. The first panels of `following`, the matrix that comes
// next, are fetched towards the end.
//
// `Inputs` is how x comes about: `of(alone)` is where its rows are, and `prepare(alone, row)` makes one, either for all
// threads or, if `alone`, for this one. Takes up to two phases.
template <class T, class Inputs, class Write>
void linear(Worker& worker, const LinearScratch& mine, const TriodeMatrix& matrix, const TriodeMatrix& following,
            const Inputs& inputs, long rows, Write write) {
    const long panels = (matrix.out_features + PANEL - 1) / PANEL, parts = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
    const Layout layout(matrix.format, matrix.group, matrix.in_features);
    const bool alone = rows <= FEW_ROWS;
    const T* x = inputs.of(alone);
    const ByteRows& bytes = alone ? mine.few : mine.shared;
    auto prepare = [&](long row) {
        inputs.prepare(alone, row);
        if (matrix.byte_inputs) quantize_row(x + row * inputs.stride, matrix.in_features, layout.group, bytes.from(row));
    };
    const bool needs_work = matrix.byte_inputs || !Inputs::ARE_THERE;
    if (needs_work && !alone)
        worker.share((rows + item_rows(rows) - 1) / item_rows(rows), [&](long item) {
            const long end = std::min((item + 1) * item_rows(rows), rows);
            for (long row = item * item_rows(rows); row < end; row++) prepare(row);
        });
    bool is_prepared = !needs_work || !alone;
    const long size = panel_size<T>(matrix);
    // Whoever comes first takes the first one: a thread can only guess.
    const uint32_t* first_after = following.panels + worker.index * panel_size<T>(following);
    worker.share_ahead(panels * parts, [&](long item, long next_item) {
        for (long row = 0; !is_prepared && row < rows; row++) prepare(row);
        is_prepared = true;
        const long panel = item % panels, part = item / panels;
        const uint32_t* next = next_item < panels * parts ? matrix.panels + next_item % panels * size : first_after;
        const long first = rows * part / parts, end = rows * (part + 1) / parts;
        if (matrix.byte_inputs)
            multiply_byte_rows(bytes.from(first), end - first, matrix.panels + panel * size, next, layout, matrix.in_features,
                               mine.product);
        else
            multiply(mine, matrix, x, inputs.stride, first, end, panel, next);
        for (long row = first; row < end; row++) write(row, panel * PANEL, mine.product + (row - first) * PANEL);
    });
}

inline Vec with_bias(const TriodeMatrix& matrix, long output, const float* sums) {
    Vec y = load(sums);
    return matrix.bias ? y + load(matrix.bias + output) : y;
}

}  // namespace triode
