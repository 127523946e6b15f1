// Attention of a block of queries over a paged cache, one KV head at a time.
//
// Keys and values are walked in tiles of 64 positions counted from position 0, with the running maximum and sum of
// "online softmax" (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). A tile lies in the cache
// as words that products read (`kv.h`), so that scores and outputs are the same products as those of the weights. What a
// query sees of a tile depends on its own position alone; a tile that it does not see leaves its state as it was, bit for
// bit. So it does not matter which queries are computed together.
//
// Every 512 positions, a segment, begin anew, and are then added to the segments before them, in order. Hence segments
// may be computed by different threads, or one after the other, with the same result.
#pragma once

#include "kv.h"
#include "panel.h"

namespace triode {

constexpr long TILE = PANEL;
constexpr long SEGMENT = 8 * TILE;
constexpr long MAX_QUERY_ROWS = 64;
// Segments of decoding rows that are computed apart, so that threads share a long context: so many a thread at most.
constexpr long PIECES_A_THREAD = 64;

struct HeadShape {
    long group;     // query heads of one KV head
    long head_dim;
    long panels() const { return (head_dim + PANEL - 1) / PANEL; }
    long queries() const { return std::max(1L, MAX_QUERY_ROWS / group); }
    long rows() const { return queries() * group; }
};

constexpr long TILE_UNITS = TILE / UNIT;

// Where the keys and values of one row are, for one layer and KV head (`kv.h`).
struct CachedHead {
    const char* keys;
    const char* values;
    const int64_t* blocks;
    long block_size;
    long unit_bytes;  // of all heads
    long head_bytes;  // of this one, in a unit

    static long units(long positions) { return (positions + UNIT - 1) / UNIT; }

    // Where the units of `count` positions from `first`, a multiple of UNIT, are, counted in bytes from the first block's.
    void locate(long first, long count, long* offsets) const {
        long column = first / block_size, in_block = first % block_size;
        for (long i = 0; i < units(count); i++) {
            offsets[i] = (blocks[column] * block_size + in_block) / UNIT * unit_bytes;
            if ((in_block += UNIT) == block_size) in_block = 0, column++;
        }
    }

    // Units lie in blocks that lie anywhere: no hardware sees the next one coming.
    void prefetch(const char* heads, const long* offsets, long count) const {
        for (long i = 0; i < units(count); i++)
            for (long at = 0; at < head_bytes; at += 64) __builtin_prefetch(heads + offsets[i] + at);
    }
};

// Keys and values that will be read after these, all heads of a row: they are fetched line by line, between the products of
// those before them.
struct Upcoming {
    CachedHead first_head;
    long next;
    long end;
    long at_once;

    static long unit_lines(const CachedHead& head) { return (head.unit_bytes + 63) / 64; }

    void fetch() {
        const long lines = unit_lines(first_head), stop = std::min(end, next + at_once);
        while (next < stop) {
            long offset;
            first_head.locate(next / lines * UNIT, 1, &offset);
            for (const long last = std::min(stop, (next / lines + 1) * lines); next < last; next++) {
                const long at = offset + next % lines * 64;
                __builtin_prefetch(first_head.keys + at, 0, 2);
                __builtin_prefetch(first_head.values + at, 0, 2);
            }
        }
    }
};

// Softmax so far of some queries over some positions, and the values that it has weighed.
struct Softmax {
    float* out;      // [panels][rows][64]
    float* total;    // [rows][LANES]
    float* highest;  // [rows]

    static long floats(long rows, long panels) { return rows * (panels * PANEL + LANES) + rounded_up(rows, 16); }

    static Softmax at(float* memory, long rows, long panels) {
        float* total = memory + panels * rows * PANEL;
        return {memory, total, total + rows * LANES};
    }

    void clear(long rows, long panels) const {
        for (long r = 0; r < rows; r++) highest[r] = -INFINITY;
        memset(total, 0, rows * LANES * sizeof(float));
        memset(out, 0, panels * rows * PANEL * sizeof(float));
    }
};

template <class T>
struct AttentionScratch {
    T* queries;           // [rows][head_dim]
    uint32_t* keys;       // one panel of head_dim inputs
    float* value_scales;  // [64]
    uint32_t* values;     // a panel of 64 inputs
    float* scores;        // [rows][64]
    T* weights;           // [rows][64]
    float* part;          // `Softmax` of a segment
    float* whole;         // `Softmax` of the segments up to it

    template <class Arena>
    void take(Arena& arena, const HeadShape& shape) {
        queries = arena.template take<T>(shape.rows() * shape.head_dim);
        keys = arena.template take<uint32_t>(words_of<T>(rounded_up(shape.head_dim, 4)) * PANEL);
        value_scales = arena.template take<float>(TILE);
        values = arena.template take<uint32_t>(words_of<T>(TILE) * PANEL);
        scores = arena.template take<float>(shape.rows() * TILE);
        weights = arena.template take<T>(shape.rows() * TILE);
        part = arena.template take<float>(Softmax::floats(shape.rows(), shape.panels()));
        whole = arena.template take<float>(Softmax::floats(shape.rows(), shape.panels()));
    }
};

// Words of a tile that lie in its units. Units that it lacks are read as its first one, and not seen.
class TileKeys {
  public:
    TileKeys(const char* keys, const long* offsets, long count) {
        for (long i = 0; i < TILE_UNITS; i++)
            units_[i] = reinterpret_cast<const uint32_t*>(keys + offsets[i < CachedHead::units(count) ? i : 0]);
    }

    const uint32_t* at(long word, long lane) const { return units_[lane / UNIT] + word * UNIT + lane % UNIT; }

  private:
    const uint32_t* units_[TILE_UNITS];
};

// The first `head_dim` numbers of a tile's values from `column` on, a row of words for each position or pair of positions.
template <class T>
class TileValues {
  public:
    static constexpr long POSITIONS = 4 / sizeof(T);

    TileValues(const char* values, const long* offsets, long count, long head_dim, long column) {
        for (long i = 0; i < words_of<T>(count); i++) {
            const long position = i * POSITIONS;
            const uint32_t* unit = reinterpret_cast<const uint32_t*>(values + offsets[position / UNIT]);
            rows_[i] = unit + position % UNIT / POSITIONS * head_dim + column;
        }
    }

    const uint32_t* at(long word, long lane) const { return rows_[word] + lane; }

  private:
    const uint32_t* rows_[TILE];
};

// Whether products read the words of a tile where they lie. Otherwise they become a panel first.
template <class T>
constexpr bool READS_IN_PLACE = !HAS_SQUARES<T> && !HAS_TILES<T>;

template <class Words>
const uint32_t* as_panel(const Words& words, long count, long lanes, uint32_t* panel) {
    for (long word = 0; word < count; word++)
        for (long lane = 0; lane < lanes; lane += UNIT)
            memcpy(panel + word * PANEL + lane, words.at(word, lane), std::min(UNIT, lanes - lane) * 4);
    return panel;
}

// Scores of a tile: queries times keys as they are stored.
template <class T>
void score(T, const CachedHead& head, const long* offsets, long count, const HeadShape& shape, long rows,
           const AttentionScratch<T>& scratch) {
    const TileKeys keys(head.keys, offsets, count);
    const long words = words_of<T>(shape.head_dim);
    if constexpr (READS_IN_PLACE<T>)
        multiply_words(scratch.queries, shape.head_dim, rows, keys, words, scratch.scores, true);
    else
        multiply_panel(scratch.queries, shape.head_dim, rows, as_panel(keys, words, TILE, scratch.keys), words,
                       scratch.scores, true);
}

// Every byte is exact as a T, and the scale of a position multiplies its scores.
template <class T>
void score(int8_t, const CachedHead& head, const long* offsets, long count, const HeadShape& shape, long rows,
           const AttentionScratch<T>& scratch) {
    const TileKeys keys(head.keys, offsets, count);
    widen_words<T>(keys, words_of<int8_t>(shape.head_dim), scratch.keys);
    multiply_panel(scratch.queries, shape.head_dim, rows, scratch.keys, words_of<T>(shape.head_dim), scratch.scores, true);
    for (long i = 0; i < TILE; i += LANES) {
        const Vec scales = load(keys.at(words_of<int8_t>(shape.head_dim), i));
        for (long r = 0; r < rows; r++)
            store(scratch.scores + r * TILE + i, load(scratch.scores + r * TILE + i) * scales);
    }
}

// The scales of bytes are multiplied with the weights, so that every byte is exact as a T.
inline const float* take_value_scales(int8_t, const CachedHead& head, const long* offsets, long count, long head_dim,
                                      float* scales) {
    for (long i = 0; i < TILE; i++)
        scales[i] = i < count ? kv_scales(head.values + offsets[i / UNIT], head_dim)[i % UNIT] : 0.f;
    return scales;
}

template <class T>
const float* take_value_scales(T, const CachedHead&, const long*, long, long, float*) {
    return nullptr;
}

// out[rows][64] += weights times the values of a tile, 64 of head_dim from `column` on.
template <class T>
void add_values(T, const CachedHead& head, const long* offsets, long count, const HeadShape& shape, long rows,
                long column, const AttentionScratch<T>& scratch, float* out) {
    const TileValues<T> values(head.values, offsets, count, shape.head_dim, column);
    const long lanes = std::min(long(PANEL), shape.head_dim - column), words = words_of<T>(count);
    if (READS_IN_PLACE<T> && lanes == PANEL)
        multiply_words(scratch.weights, TILE, rows, values, words, out, false);
    else
        multiply_panel(scratch.weights, TILE, rows, as_panel(values, words, lanes, scratch.values), words, out, false);
}

template <class T>
void add_values(int8_t, const CachedHead& head, const long* offsets, long count, const HeadShape& shape, long rows,
                long column, const AttentionScratch<T>& scratch, float* out) {
    constexpr long IN_A_WORD = 4 / sizeof(T);
    const long padded = kv_padded(shape.head_dim);
    auto read = [&](long position, long d) {
        if (position >= count) return Vec{};
        return widen_bytes(reinterpret_cast<const int8_t*>(head.values + offsets[position / UNIT]) + position % UNIT * padded,
                           padded, d);
    };
    for (long i = 0; i < count; i += IN_A_WORD)
        for (long lane = 0; lane < PANEL && column + lane < padded; lane += LANES) {
            Vec numbers = read(i, column + lane);
            if (IN_A_WORD == 2) numbers = joined(numbers, read(i + 1, column + lane));
            store(scratch.values + i / IN_A_WORD * PANEL + lane, numbers);
        }
    multiply_panel(scratch.weights, TILE, rows, scratch.values, words_of<T>(count), out, false);
}

// Turns the scores of one query into weights, of which positions `from` to `to` of the tile are seen.
// `value_scales`: what multiplies a position's value, or null. Returns what multiplies the earlier output.
template <class T>
float soften(float* scores, long from, long to, float scale, const float* value_scales, float& highest, float* total,
             T* weights) {
    constexpr int VECS = TILE / LANES;
    const float hidden = -INFINITY;
    Vec v[VECS];
    if (from > 0 || to < TILE)
        for (int i = 0; i < TILE; i++) scores[i] = i >= int(from) && i < int(to) ? scores[i] : hidden;
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
        narrow(value_scales ? v[i] * load(value_scales + i * LANES) : v[i], weights + i * LANES);
    }
    const float rescale = before == highest ? 1.f : exponential(splat(before - base))[0];
    store(total, multiply_add(load(total), splat(rescale), sum));
    return rescale;
}

// Turns the scores of one tile into weights, and rescales the output so far to them.
template <class T>
void weigh(const HeadShape& shape, long position, long first, long rows, long window, float scale,
           const AttentionScratch<T>& scratch, const float* value_scales, const Softmax& part) {
    for (long r = 0; r < rows; r++) {
        const long own = position + r / shape.group - first;
        const long from = window ? std::clamp(own - window + 1, 0L, TILE) : 0;
        const long to = std::clamp(own + 1, 0L, TILE);
        const float rescale = soften(scratch.scores + r * TILE, from, to, scale, value_scales, part.highest[r],
                                     part.total + r * LANES, scratch.weights + r * TILE);
        if (rescale == 1.f) continue;
        for (long p = 0; p < shape.panels(); p++) {
            float* earlier = part.out + (p * rows + r) * PANEL;
            for (int i = 0; i < PANEL; i++) earlier[i] *= rescale;
        }
    }
}

// Queries at consecutive positions, `shape.group` heads each, and what they see.
struct Queries {
    long position;  // of the first
    long count;
    long window;  // 0: all positions up to its own

    long last() const { return position + count - 1; }
    long lowest(long query) const { return window ? std::max(0L, position + query - window + 1) : 0; }
    long first_segment() const { return lowest(0) / SEGMENT; }
    long num_segments() const { return last() / SEGMENT + 1 - first_segment(); }
};

// One segment's softmax, from nothing. Tiles are fetched one ahead, also into the next segment: keys while the scores
// become weights, and values while the output is computed.
template <class T, class Stored>
void attend_segment(const CachedHead& head, const HeadShape& shape, const Queries& queries, long segment, float scale,
                    const AttentionScratch<T>& scratch, const Softmax& part, Upcoming* upcoming = nullptr) {
    const long rows = queries.count * shape.group;
    const long begin = std::max(segment * SEGMENT, queries.lowest(0) / TILE * TILE);
    const long end = std::min((segment + 1) * SEGMENT, queries.last() + 1);
    part.clear(rows, shape.panels());
    long offsets[TILE_UNITS], next_offsets[TILE_UNITS];
    head.locate(begin, std::min(TILE, end - begin), offsets);
    head.prefetch(head.values, offsets, std::min(TILE, end - begin));
    for (long first = begin; first < end; first += TILE) {
        const long count = std::min(TILE, end - first);
        const long next = std::clamp(queries.last() + 1 - (first + TILE), 0L, TILE);
        head.locate(first + TILE, next, next_offsets);
        score(Stored{}, head, offsets, count, shape, rows, scratch);
        head.prefetch(head.keys, next_offsets, next);
        if (upcoming) upcoming->fetch();
        const float* value_scales = take_value_scales(Stored{}, head, offsets, count, shape.head_dim, scratch.value_scales);
        weigh(shape, queries.position, first, rows, queries.window, scale, scratch, value_scales, part);
        head.prefetch(head.values, next_offsets, next);
        if (upcoming) upcoming->fetch();
        for (long p = 0; p < shape.panels(); p++)
            add_values(Stored{}, head, offsets, count, shape, rows, p * PANEL, scratch, part.out + p * rows * PANEL);
        std::copy_n(next_offsets, CachedHead::units(next), offsets);
    }
}

// Adds a segment to those before it, for the queries that see it. The first one that a query sees it takes as it is.
inline void merge(const HeadShape& shape, const Queries& queries, long segment, const Softmax& part,
                  const Softmax& whole) {
    const long rows = queries.count * shape.group, panels = shape.panels();
    const long first = segment * SEGMENT, end = first + SEGMENT;
    for (long r = 0; r < rows; r++) {
        const long query = r / shape.group, lowest = queries.lowest(query);
        if (queries.position + query < first || lowest >= end) continue;
        const bool is_first = lowest >= first;
        const float before = whole.highest[r], highest = is_first ? part.highest[r] : std::max(before, part.highest[r]);
        const float base = highest == -INFINITY ? 0.f : highest;
        const Vec keep = exponential(splat(before - base)), add = exponential(splat(part.highest[r] - base));
        auto join = [&](const float* from, float* to) {
            store(to, is_first ? load(from) : multiply_add(load(from), add, load(to) * keep));
        };
        whole.highest[r] = highest;
        join(part.total + r * LANES, whole.total + r * LANES);
        for (long p = 0; p < panels; p++)
            for (long i = (p * rows + r) * PANEL, lane = 0; lane < PANEL; lane += LANES)
                join(part.out + i + lane, whole.out + i + lane);
    }
}

// Divides by the sums of weights: query i, head g goes to out + i * out_stride + g * head_dim.
template <class T>
void finish(const HeadShape& shape, long rows, const Softmax& whole, T* out, long out_stride) {
    for (long r = 0; r < rows; r++) {
        const float inverse = 1.f / sum(load(whole.total + r * LANES));
        T* to = out + r / shape.group * out_stride + r % shape.group * shape.head_dim;
        auto from = [&](long d) { return whole.out + (d / PANEL * rows + r) * PANEL + d % PANEL; };
        long d = 0;
        for (; d + LANES <= shape.head_dim; d += LANES) narrow(load(from(d)) * splat(inverse), to + d);
        for (; d < shape.head_dim; d++) narrow(*from(d) * inverse, to[d]);
    }
}

// All that the queries see, segment after segment; they are in `scratch.queries` already.
template <class T, class Stored>
void attend(const CachedHead& head, const HeadShape& shape, const Queries& queries, float scale,
            const AttentionScratch<T>& scratch, T* out, long out_stride, Upcoming* upcoming = nullptr) {
    const long rows = queries.count * shape.group, first = queries.first_segment(), segments = queries.num_segments();
    const Softmax part = Softmax::at(scratch.part, rows, shape.panels());
    const Softmax whole = Softmax::at(scratch.whole, rows, shape.panels());
    for (long segment = first; segment < first + segments; segment++) {
        attend_segment<T, Stored>(head, shape, queries, segment, scale, scratch, part, upcoming);
        if (segments > 1) merge(shape, queries, segment, part, whole);
    }
    finish(shape, rows, segments > 1 ? whole : part, out, out_stride);
}

}  // namespace triode
