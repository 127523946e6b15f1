// Attention of a block of queries over a paged cache, one KV head at a time.
//
// Keys and values are walked in tiles of 64 positions counted from position 0, with the running maximum and sum of
// "online softmax" (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). A tile becomes two
// packed panels, so that scores and outputs are the same products as those of the weights. What a query sees
// of a tile depends on its own position alone; a tile that it does not see leaves its state as it was, bit for bit. So it
// does not matter which queries are computed together.
#pragma once

#include "panel.h"

namespace triode {

constexpr long TILE = PANEL;
constexpr long MAX_QUERY_ROWS = 64;

struct HeadShape {
    long group;     // query heads of one KV head
    long head_dim;
    long panels() const { return (head_dim + PANEL - 1) / PANEL; }
    long queries() const { return std::max(1L, MAX_QUERY_ROWS / group); }
    long rows() const { return queries() * group; }
};

// Where the keys and values of one row are, for one layer and KV head.
template <class T>
struct CachedHead {
    const T* keys;
    const T* values;
    const int64_t* blocks;
    long block_size;
    long token_stride;  // numbers from one position of a block to the next

    // Where `count` consecutive positions are, counted in numbers from the first block.
    void locate(long first, long count, long* offsets) const {
        long column = first / block_size, in_block = first % block_size;
        for (long i = 0; i < count; i++) {
            offsets[i] = (blocks[column] * block_size + in_block) * token_stride;
            if (++in_block == block_size) in_block = 0, column++;
        }
    }

    // The rows of a head lie apart, in blocks that lie anywhere: no hardware sees the next one coming.
    static void prefetch(const T* heads, const long* offsets, long count, long head_dim) {
        for (long i = 0; i < count; i++)
            for (long d = 0; d < head_dim; d += 64 / long(sizeof(T))) __builtin_prefetch(heads + offsets[i] + d);
    }
};

template <class T>
struct AttentionScratch {
    T* queries;         // [rows][head_dim]
    uint32_t* keys;     // one panel of head_dim inputs
    float* values;      // a panel of 64 inputs for every 64 of head_dim
    float* scores;      // [rows][64]
    float* out;         // [panels][rows][64]
    float* highest;     // [rows]
    float* total;       // [rows][LANES]
    const T* nothing;   // head_dim zeros

    template <class Arena>
    void take(Arena& arena, const HeadShape& shape) {
        queries = arena.template take<T>(shape.rows() * shape.head_dim);
        keys = arena.template take<uint32_t>(words_of<T>(shape.head_dim) * PANEL);
        values = arena.template take<float>(shape.panels() * TILE * PANEL);
        scores = arena.template take<float>(shape.rows() * TILE);
        out = arena.template take<float>(shape.panels() * shape.rows() * PANEL);
        highest = arena.template take<float>(shape.rows());
        total = arena.template take<float>(shape.rows() * LANES);
        nothing = arena.template take<T>(shape.head_dim);
    }
};

// The keys of `count` positions as a panel. The rest of the 64 are zeros: they may never have been written.
template <class T>
void pack_keys(const CachedHead<T>& head, const long* offsets, long count, long head_dim, const T* nothing,
               uint32_t* panel) {
    const uint32_t* key[TILE];
    for (long i = 0; i < TILE; i++) {
        const T* numbers = i < count ? head.keys + offsets[i] : nothing;
        key[i] = reinterpret_cast<const uint32_t*>(numbers);
    }
    const long words = words_of<T>(head_dim);
    long word = 0;
#if defined(__AVX512F__)
    for (; word + 16 <= words; word += 16) {
        for (long i = 0; i < TILE; i += 16) {
            const uint32_t* square[16];
            for (long j = 0; j < 16; j++) square[j] = key[i + j] + word;
            transpose_square(square, panel + word * PANEL + i, PANEL);
        }
    }
#endif
    for (; word < words; word++)
        for (long i = 0; i < TILE; i++) memcpy(panel + word * PANEL + i, key[i] + word, 4);
}

// The values of `count` positions as float panels [head_dim / 64][count][64]; what is past head_dim is not touched.
template <class T>
void pack_values(const CachedHead<T>& head, const long* offsets, long count, long head_dim, float* panels) {
    for (long i = 0; i < count; i++) {
        const T* value = head.values + offsets[i];
        for (long at = 0; at < head_dim; at += PANEL) {
            float* to = panels + at * TILE + i * PANEL;
            const long width = std::min<long>(PANEL, head_dim - at);
            for (long d = 0; d < width; d++) to[d] = widen(value[at + d]);
        }
    }
}

// Turns the scores of one query into weights, of which positions `from` to `to` of the tile are seen.
// Returns what multiplies its earlier output.
inline float soften(float* scores, long from, long to, float scale, float& highest, float* total) {
    constexpr int VECS = TILE / LANES;
    const float hidden = -INFINITY;
    Vec v[VECS];
    if (from > 0 || to < TILE)
        for (long i = 0; i < TILE; i++) scores[i] = i >= from && i < to ? scores[i] : hidden;
    Vec most = splat(hidden);
    for (int i = 0; i < VECS; i++) {
        v[i] = load(scores + i * LANES) * splat(scale);
        most = larger(most, v[i]);
    }
    const float before = highest;
    highest = std::max(before, maximum(most));
    // exp(-inf - -inf) is NaN: as long as nothing was seen any finite number does.
    const float base = highest == hidden ? 0.f : highest;
    Vec sum = Vec{};
    for (int i = 0; i < VECS; i++) {
        v[i] = exponential(v[i] - splat(base));
        sum = sum + v[i];
        store(scores + i * LANES, v[i]);
    }
    const float rescale = before == highest ? 1.f : exponential(splat(before - base))[0];
    store(total, multiply_add(load(total), splat(rescale), sum));
    return rescale;
}

// Turns the scores of one tile into weights, and rescales the output so far to them.
template <class T>
void weigh(const HeadShape& shape, long position, long first, long rows, long window, float scale,
           const AttentionScratch<T>& scratch) {
    for (long r = 0; r < rows; r++) {
        const long own = position + r / shape.group - first;
        const long from = window ? std::clamp(own - window + 1, 0L, TILE) : 0;
        const long to = std::clamp(own + 1, 0L, TILE);
        const float rescale =
            soften(scratch.scores + r * TILE, from, to, scale, scratch.highest[r], scratch.total + r * LANES);
        if (rescale == 1.f) continue;
        for (long p = 0; p < shape.panels(); p++) {
            float* earlier = scratch.out + (p * rows + r) * PANEL;
            for (int i = 0; i < PANEL; i++) earlier[i] *= rescale;
        }
    }
}

// Divides by the sums of weights: query i, head g goes to out + i * out_stride + g * head_dim.
template <class T>
void finish(const HeadShape& shape, long rows, const AttentionScratch<T>& scratch, T* out, long out_stride) {
    for (long r = 0; r < rows; r++) {
        const float inverse = 1.f / sum(load(scratch.total + r * LANES));
        T* to = out + r / shape.group * out_stride + r % shape.group * shape.head_dim;
        for (long d = 0; d < shape.head_dim; d++)
            narrow(scratch.out[(d / PANEL * rows + r) * PANEL + d % PANEL] * inverse, to[d]);
    }
}

// Queries of one row at consecutive positions: `num_queries` from `position`, `shape.group` heads each, already in
// `scratch.queries`. Tiles are fetched one ahead, keys while the scores are computed and values while the output is.
template <class T>
void attend(const CachedHead<T>& head, const HeadShape& shape, long position, long num_queries, long window, float scale,
            const AttentionScratch<T>& scratch, T* out, long out_stride) {
    const long head_dim = shape.head_dim, rows = num_queries * shape.group;
    const long words = words_of<T>(head_dim), last = position + num_queries - 1;
    for (long r = 0; r < rows; r++) scratch.highest[r] = -INFINITY;
    memset(scratch.total, 0, rows * LANES * sizeof(float));
    memset(scratch.out, 0, shape.panels() * rows * PANEL * sizeof(float));

    const long lowest = window ? std::max(0L, position - window + 1) : 0;
    const long begin = lowest / TILE * TILE;
    long offsets[TILE], next_offsets[TILE];
    head.locate(begin, std::min(TILE, last + 1 - begin), offsets);
    head.prefetch(head.values, offsets, std::min(TILE, last + 1 - begin), head_dim);
    for (long first = begin; first <= last; first += TILE) {
        const long count = std::min(TILE, last + 1 - first), next = std::clamp(last + 1 - (first + TILE), 0L, TILE);
        head.locate(first + TILE, next, next_offsets);
        pack_keys(head, offsets, count, head_dim, scratch.nothing, scratch.keys);
        head.prefetch(head.keys, next_offsets, next, head_dim);
        multiply_panel(scratch.queries, head_dim, rows, scratch.keys, words, scratch.scores, true);
        weigh(shape, position, first, rows, window, scale, scratch);
        pack_values(head, offsets, count, head_dim, scratch.values);
        head.prefetch(head.values, next_offsets, next, head_dim);
        std::copy_n(next_offsets, next, offsets);
        for (long p = 0; p < shape.panels(); p++) {
            const uint32_t* panel = reinterpret_cast<const uint32_t*>(scratch.values + p * TILE * PANEL);
            multiply_panel(scratch.scores, TILE, rows, panel, count, scratch.out + p * rows * PANEL, false);
        }
    }
    finish(shape, rows, scratch, out, out_stride);
}

}  // namespace triode
