// One step of a decoder: from token ids to hidden states after the final norm.
//
// The residual stream and the queries, keys and values before rotation are floats; what enters a product, and the cache,
// is T. Each phase of a layer is a loop over items that any thread may take; no result depends on who took it.
//
// Behind the last layer's keys and values only those query tokens go on whose hidden states are wanted. Each phase
// gives a row of a product the bits that it has in any company, so the others are not missed.
#pragma once

#include "buffers.h"
#include "embedding.h"
#include "ranks.h"

namespace triode {

// Decoding rows that are attended to whole, if there are so many for each thread; otherwise head by head.
constexpr long ROWS_A_THREAD = 4;

// weight * x / sqrt(mean(x^2) + eps). `out` may be `x`.
template <class T>
void rms_norm(const float* x, const float* weight, long size, float eps, T* out) {
    Vec squares = Vec{};
    long i = 0;
    for (; i + LANES <= size; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    for (; i < size; i++) squares[0] += x[i] * x[i];
    const float inverse = 1.f / std::sqrt(sum(squares) / float(size) + eps);
    for (i = 0; i < size; i++) narrow(x[i] * inverse * weight[i], out[i]);
}

template <class T>
class Step {
  public:
    Step(const TriodeModel& model, const TriodeBatch& batch, const Buffers<T>& buffers)
        : model_(model),
          batch_(batch),
          buffers_(buffers),
          ranks_(model),
          shape_{model.num_heads / model.num_kv_heads, model.head_dim},
          scale_(1.f / std::sqrt(float(model.head_dim))),
          head_bytes_(kv_head_bytes(model.head_dim, batch.kv_is_int8 ? 1 : long(sizeof(T)))) {}

    void run(Worker& worker) const {
        const Private<T>& mine = buffers_.threads[worker.index];
        embed(worker);
        for (long i = 0; i < model_.num_layers; i++) {
            const Pass pass(batch_, i, i + 1 == model_.num_layers);
            attention(worker, mine, pass);
            if (pass.num_tokens) feed_forward(worker, mine, pass);
        }
        share_tokens(worker, num_wanted(), [&](long token) {
            T* out = static_cast<T*>(batch_.hidden) + token * model_.hidden_size;
            norm(token, model_.final_norm, out);
        });
    }

  private:
    // A layer, and the query tokens that go on behind its keys and values: the last ones of their rows, if not all.
    struct Pass {
        Pass(const TriodeBatch& batch, long layer, bool is_last)
            : layer(layer),
              start(is_last ? batch.wanted_start : batch.query_start),
              num_tokens(start[batch.num_rows]),
              are_all(num_tokens == batch.num_tokens),
              is_decode(are_all && num_tokens == batch.num_rows) {}

        const long layer;
        const int64_t* const start;  // [R + 1]: their places among each other
        const long num_tokens;
        const bool are_all;
        const bool is_decode;  // one of each row
    };

    long num_wanted() const { return batch_.wanted_start[batch_.num_rows]; }

    float* residual(long token) const { return buffers_.residual + token * buffers_.hidden_stride; }

    template <class Work>
    void share_tokens(Worker& worker, long tokens, Work work) const {
        const long at_once = item_rows(tokens);
        worker.share((tokens + at_once - 1) / at_once, [&](long item) {
            for (long token = item * at_once; token < std::min((item + 1) * at_once, tokens); token++) work(token);
        });
    }

    void embed(Worker& worker) const {
        share_tokens(worker, batch_.num_tokens, [&](long token) {
            float* to = residual(token);
            look_up<T>(model_.embedding, batch_.token_ids[token], to);
            std::fill(to + model_.hidden_size, to + buffers_.hidden_stride, 0.f);
        });
    }

    void norm(long token, const float* weight, T* out) const {
        rms_norm(residual(token), weight, model_.hidden_size, float(model_.norm_eps), out);
    }

    void norm_padded(long token, const float* weight, T* rows) const {
        T* to = rows + token * buffers_.hidden_stride;
        norm(token, weight, to);
        std::fill(to + model_.hidden_size, to + buffers_.hidden_stride, T{});
    }

    // The normalised residual stream.
    struct NormedRows {
        static constexpr bool ARE_THERE = false;

        const Step& step;
        const float* weight;
        T* own;
        long stride;

        T* of(bool alone) const { return alone ? own : step.buffers_.normed; }
        void prepare(bool alone, long token) const { step.norm_padded(token, weight, of(alone)); }
    };

    NormedRows normed(const Private<T>& mine, const float* weight) const {
        return {*this, weight, mine.normed, buffers_.hidden_stride};
    }

    void attention(Worker& worker, const Private<T>& mine, const Pass& pass) const {
        const TriodeLayer& layer = model_.layers[pass.layer];
        auto write_qkv = [&](long token, long output, const float* sums) {
            float* to = buffers_.qkv + token * buffers_.qkv_stride + output;
            for (int i = 0; i < PANEL; i += LANES) store(to + i, with_bias(layer.qkv, output + i, sums + i));
        };
        linear<T>(worker, mine.linear, layer.qkv, layer.o, normed(mine, layer.input_norm), batch_.num_tokens, write_qkv);
        // A row of one query reads no other token's new key: whoever attends for it stores its key as well.
        const bool is_split = splits(pass);
        if (!pass.is_decode || is_split)
            share_tokens(worker, batch_.num_tokens, [&](long token) {
                for (long head = 0; head < model_.num_kv_heads; head++) rotate_and_store(pass.layer, token, head);
            });
        if (!pass.num_tokens) return;
        if (!pass.are_all) move_up(worker, pass);
        if (is_split)
            share_segments(worker, mine, pass);
        else
            share_attention(worker, mine, pass);
        add_product(worker, mine, pass, layer.o, layer.gate_up, buffers_.attended, buffers_.attended_stride,
                    Ranks::ATTENTION);
    }

    // The residual stream of tokens that go on moves to their places among each other, of which none is behind its own.
    // Others are to go where it lies, so that tokens move in turn; a thread moves some of the features of them all.
    void move_up(Worker& worker, const Pass& pass) const {
        const long stride = buffers_.hidden_stride, threads = buffers_.num_threads;
        const long width = rounded_up((stride + threads - 1) / threads, LANES);
        worker.share((stride + width - 1) / width, [&](long item) {
            const long first = item * width, count = std::min(width, stride - first);
            for (long row = 0; row < batch_.num_rows; row++)
                for (long place = pass.start[row]; place < pass.start[row + 1]; place++) {
                    const long token = batch_.query_start[row + 1] - pass.start[row + 1] + place;
                    if (token > place) std::copy_n(residual(token) + first, count, residual(place) + first);
                }
        });
    }

    void feed_forward(Worker& worker, const Private<T>& mine, const Pass& pass) const {
        const TriodeLayer& layer = model_.layers[pass.layer];
        auto write_inner = [&](long token, long output, const float* sums) {
            T* to = buffers_.inner + token * buffers_.inner_stride + output / 2;
            for (int i = 0; i < PANEL; i += 32) gate(layer.gate_up, output + i, sums + i, to + i / 2);
        };
        linear<T>(worker, mine.linear, layer.gate_up, layer.down, normed(mine, layer.post_norm), pass.num_tokens,
                  write_inner);
        const bool is_last = pass.layer + 1 == model_.num_layers;
        const TriodeMatrix& following = is_last ? model_.head : model_.layers[pass.layer + 1].qkv;
        add_product(worker, mine, pass, layer.down, following, buffers_.inner, buffers_.inner_stride, Ranks::FEED_FORWARD);
    }

    // 16 outputs silu(gate) * up, from 16 sums of the gate and the 16 of up that follow them.
    static void gate(const TriodeMatrix& matrix, long output, const float* sums, T* to) {
        for (int i = 0; i < 16; i += LANES) {
            Vec g = with_bias(matrix, output + i, sums + i);
            Vec up = with_bias(matrix, output + 16 + i, sums + 16 + i);
            Vec y = g / (splat(1.f) + exponential(-g)) * up;
            narrow(y, to + i);
        }
    }

    // residual += x W^T + bias, where x may be one of several ranks' parts of the inputs.
    void add_product(Worker& worker, const Private<T>& mine, const Pass& pass, const TriodeMatrix& matrix,
                     const TriodeMatrix& following, const T* x, long stride, Ranks::Place place) const {
        auto add = [&](long token, long output, const float* sums) {
            float* to = residual(token) + output;
            for (int i = 0; i < PANEL; i += LANES)
                store(to + i, load(to + i) + with_bias(matrix, output + i, sums + i));
        };
        auto contribute = [&](long token, long output, const float* sums) {
            memcpy(ranks_.mine(place, token) + output, sums, PANEL * sizeof(float));
        };
        const GivenRows<T> inputs{x, stride};
        if (!ranks_.are_many()) {
            linear<T>(worker, mine.linear, matrix, following, inputs, pass.num_tokens, add);
            return;
        }
        linear<T>(worker, mine.linear, matrix, following, inputs, pass.num_tokens, contribute);
        worker.share(1, [&](long) { ranks_.meet(); });
        share_tokens(worker, pass.num_tokens, [&](long token) { ranks_.add(place, token, matrix, residual(token)); });
    }

    // Normalises and rotates, in place, the queries of a KV head's group and its key; stores key and value.
    void rotate_and_store(long layer_index, long token, long kv_head) const {
        const TriodeLayer& layer = model_.layers[layer_index];
        const long H = model_.head_dim, N = model_.num_heads, K = model_.num_kv_heads;
        float* qkv = buffers_.qkv + token * buffers_.qkv_stride;
        for (long g = 0; g < shape_.group; g++) rotate(qkv + (kv_head * shape_.group + g) * H, layer.q_norm, token);
        float* key = qkv + (N + kv_head) * H;
        rotate(key, layer.k_norm, token);
        const float* value = qkv + (N + K + kv_head) * H;
        const long slot = batch_.slots[token], at = (slot / UNIT * K + kv_head) * UNIT * head_bytes_;
        const bool is_last = token + 1 == batch_.num_tokens || batch_.slots[token + 1] != slot + 1;
        char* key_unit = static_cast<char*>(batch_.keys[layer_index]) + at;
        char* value_unit = static_cast<char*>(batch_.values[layer_index]) + at;
        auto write = [&](auto stored) {
            write_key(stored, key, H, key_unit, slot % UNIT);
            write_value(stored, value, H, value_unit, slot % UNIT, is_last);
        };
        if (batch_.kv_is_int8)
            write(int8_t{});
        else
            write(T{});
    }

    // Pairs (i, i + H / 2), as in arXiv 2104.09864's other layout.
    void rotate(float* head, const float* norm, long token) const {
        const long H = model_.head_dim, U = H / 2;
        if (norm) rms_norm(head, norm, H, float(model_.norm_eps), head);
        const float* cos = model_.cos + batch_.positions[token] * U;
        const float* sin = model_.sin + batch_.positions[token] * U;
        for (long u = 0; u < U; u++) {
            const float first = head[u], second = head[u + U];
            head[u] = first * cos[u] - second * sin[u];
            head[u + U] = second * cos[u] + first * sin[u];
        }
    }

    // An item is a block of queries of one row and one KV head; the last blocks, which see most, come first.
    void share_attention(Worker& worker, const Private<T>& mine, const Pass& pass) const {
        const long queries = shape_.queries(), heads = model_.num_kv_heads;
        if (pass.is_decode && batch_.num_rows >= ROWS_A_THREAD * buffers_.num_threads) {
            worker.share_ahead(batch_.num_rows, [&](long row, long next) { attend_row(mine, pass, row, next); });
            return;
        }
        auto num_queries = [&](long row) { return pass.start[row + 1] - pass.start[row]; };
        auto num_blocks = [&](long row) { return (num_queries(row) + queries - 1) / queries; };
        long items = 0;
        for (long row = 0; row < batch_.num_rows; row++) items += num_blocks(row) * heads;
        long row = 0, before = 0;
        worker.share(items, [&](long item) {
            for (; before + num_blocks(row) * heads <= item; row++) before += num_blocks(row) * heads;
            const long first = (num_blocks(row) - 1 - (item - before) / heads) * queries;
            const long count = std::min(queries, num_queries(row) - first);
            attend_block(mine, pass, row, first, count, (item - before) % heads);
        });
    }

    // All heads of one query, which lie side by side in the cache; those of the next row come meanwhile.
    void attend_row(const Private<T>& mine, const Pass& pass, long row, long next) const {
        const long heads = model_.num_kv_heads;
        Upcoming upcoming{};
        if (next < batch_.num_rows) {
            const Queries own = decoding(pass, row), others = decoding(pass, next);
            const long first = others.lowest(0) / TILE * TILE;
            const long tiles = own.last() / TILE + 1 - own.lowest(0) / TILE, fetches = 2 * heads * tiles;
            upcoming.first_head = cached_head(pass, next, 0);
            const long lines = Upcoming::unit_lines(upcoming.first_head);
            upcoming.next = first / UNIT * lines;
            upcoming.end = (others.last() / UNIT + 1) * lines;
            upcoming.at_once = std::min((upcoming.end - upcoming.next + fetches - 1) / fetches, lines);
        }
        Upcoming* meanwhile = next < batch_.num_rows ? &upcoming : nullptr;
        for (long head = 0; head < heads; head++) attend_block(mine, pass, row, 0, 1, head, meanwhile);
    }

    // Of those of a row's queries that go on, `count` from `first` on.
    void attend_block(const Private<T>& mine, const Pass& pass, long row, long first, long count, long kv_head,
                      Upcoming* upcoming = nullptr) const {
        const long place = pass.start[row] + first, token = batch_.query_start[row + 1] - pass.start[row + 1] + place;
        if (pass.is_decode) rotate_and_store(pass.layer, token, kv_head);
        take_queries(mine, token, count, kv_head);
        const long position = batch_.start[row] + token - batch_.query_start[row];
        const Queries queries{position, count, window(pass)};
        const CachedHead head = cached_head(pass, row, kv_head);
        T* out = attended(place, kv_head);
        if (batch_.kv_is_int8)
            attend<T, int8_t>(head, shape_, queries, scale_, mine.attention, out, attended_stride(), upcoming);
        else
            attend<T, T>(head, shape_, queries, scale_, mine.attention, out, attended_stride(), upcoming);
    }

    void take_queries(const Private<T>& mine, long token, long count, long kv_head) const {
        const long size = shape_.group * model_.head_dim;
        for (long i = 0; i < count; i++) {
            const float* from = buffers_.qkv + (token + i) * buffers_.qkv_stride + kv_head * size;
            T* to = mine.attention.queries + i * size;
            for (long d = 0; d < size; d++) narrow(from[d], to[d]);
        }
    }

    CachedHead cached_head(const Pass& pass, long row, long kv_head) const {
        const long at = kv_head * UNIT * head_bytes_;
        return {
            static_cast<const char*>(batch_.keys[pass.layer]) + at,
            static_cast<const char*>(batch_.values[pass.layer]) + at,
            batch_.block_table + row * batch_.table_columns,
            long(batch_.block_size_tokens),
            long(model_.num_kv_heads) * UNIT * head_bytes_,
            UNIT * head_bytes_,
        };
    }

    long attended_stride() const { return buffers_.attended_stride; }

    T* attended(long place, long kv_head) const {
        return buffers_.attended + place * attended_stride() + kv_head * shape_.group * model_.head_dim;
    }

    long window(const Pass& pass) const { return model_.layers[pass.layer].window_tokens; }

    Queries decoding(const Pass& pass, long row) const { return {batch_.start[row], 1, window(pass)}; }

    // Whether the segments of decoding rows are computed apart: if they are few, and some row has several.
    bool splits(const Pass& pass) const {
        if (!pass.is_decode || batch_.num_rows * model_.num_kv_heads > buffers_.max_pieces()) return false;
        const long segments = num_segments(pass);
        return segments > batch_.num_rows && segments * model_.num_kv_heads <= buffers_.max_pieces();
    }

    long num_segments(const Pass& pass) const {
        long segments = 0;
        for (long row = 0; row < batch_.num_rows; row++) segments += decoding(pass, row).num_segments();
        return segments;
    }

    // An item is a segment of one row and KV head; once all are there, an item is such a row and head.
    void share_segments(Worker& worker, const Private<T>& mine, const Pass& pass) const {
        const long heads = model_.num_kv_heads;
        long row = 0, before = 0;
        worker.share(num_segments(pass) * heads, [&](long item) {
            for (long items; before + (items = decoding(pass, row).num_segments() * heads) <= item; row++) before += items;
            attend_piece(mine, pass, row, (item - before) / heads, (item - before) % heads, piece(item));
        });
        long joined_row = 0, first = 0;
        worker.share(batch_.num_rows * heads, [&](long item) {
            for (; joined_row < item / heads; joined_row++) first += decoding(pass, joined_row).num_segments() * heads;
            join_pieces(mine, decoding(pass, joined_row), joined_row, item % heads, first);
        });
    }

    Softmax piece(long item) const {
        const long size = Softmax::floats(shape_.group, shape_.panels());
        return Softmax::at(buffers_.pieces + item * size, shape_.group, shape_.panels());
    }

    void attend_piece(const Private<T>& mine, const Pass& pass, long row, long number, long kv_head, const Softmax& to) const {
        const Queries queries = decoding(pass, row);
        const CachedHead head = cached_head(pass, row, kv_head);
        const long segment = queries.first_segment() + number;
        take_queries(mine, row, 1, kv_head);
        if (batch_.kv_is_int8)
            attend_segment<T, int8_t>(head, shape_, queries, segment, scale_, mine.attention, to);
        else
            attend_segment<T, T>(head, shape_, queries, segment, scale_, mine.attention, to);
    }

    void join_pieces(const Private<T>& mine, const Queries& queries, long row, long kv_head, long first_item) const {
        const Softmax whole = Softmax::at(mine.attention.whole, shape_.group, shape_.panels());
        for (long i = 0; i < queries.num_segments(); i++)
            merge(shape_, queries, queries.first_segment() + i, piece(first_item + i * model_.num_kv_heads + kv_head), whole);
        finish(shape_, shape_.group, whole, attended(row, kv_head), attended_stride());
    }

    const TriodeModel& model_;
    const TriodeBatch& batch_;
    const Buffers<T>& buffers_;
    const Ranks ranks_;
    const HeadShape shape_;
    const float scale_;
    const long head_bytes_;  // of one position in the cache
};

}  // namespace triode
