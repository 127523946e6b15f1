// One step of a decoder: from token ids to hidden states after the final norm.
//
// The residual stream and the queries, keys and values before rotation are floats; what enters a product, and the cache,
// is T. Each phase of a layer is a loop over items that any thread may take; no result depends on who took it.
#pragma once

#include "attention.h"
#include "linear.h"

namespace triode {

// Up to so many tokens each thread normalises all of them for itself, which is quicker than meeting once more.
constexpr long FEW_TOKENS = 16;
constexpr long ITEM_TOKENS = 8;
constexpr long PHASES_A_LAYER = 8;
constexpr long PHASES_BESIDE = 4;

// What one thread has to itself.
template <class T>
struct Private {
    T* normed;  // [FEW_TOKENS][padded hidden]
    LinearScratch linear;
    AttentionScratch<T> attention;
};

template <class T>
struct Buffers {
    long hidden_stride, qkv_stride, attended_stride, inner_stride;
    Phase* phases;
    float* residual;
    T* normed;
    float* qkv;
    T* attended;
    T* inner;
    Private<T>* threads;

    // Lays out the buffers of a step over `base`; returns how many bytes they take.
    long take(void* base, const TriodeModel& model, long tokens, int num_threads) {
        hidden_stride = rounded_up(model.hidden_size, PANEL);
        qkv_stride = rounded_up((model.num_heads + 2 * model.num_kv_heads) * model.head_dim, PANEL);
        attended_stride = rounded_up(model.num_heads * model.head_dim, PANEL);
        inner_stride = rounded_up(model.intermediate_size, PANEL);
        Arena arena(base);
        phases = arena.take<Phase>(num_phases(model));
        threads = arena.take<Private<T>>(num_threads);
        residual = arena.take<float>(tokens * hidden_stride);
        normed = arena.take<T>(tokens * hidden_stride);
        qkv = arena.take<float>(tokens * qkv_stride);
        attended = arena.take<T>(tokens * attended_stride);
        inner = arena.take<T>(tokens * inner_stride);
        for (int i = 0; i < num_threads; i++) {
            Private<T> mine;
            mine.linear.take(arena);
            mine.normed = arena.take<T>(FEW_TOKENS * hidden_stride);
            mine.attention.take(arena, {model.num_heads / model.num_kv_heads, model.head_dim});
            if (base) threads[i] = mine;
        }
        return arena.used();
    }

    static long num_phases(const TriodeModel& model) { return model.num_layers * PHASES_A_LAYER + PHASES_BESIDE; }
};

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
          shape_{model.num_heads / model.num_kv_heads, model.head_dim},
          scale_(1.f / std::sqrt(float(model.head_dim))),
          is_decode_(batch.num_rows == batch.num_tokens) {}

    void run(Worker& worker) const {
        const Private<T>& mine = buffers_.threads[worker.index];
        embed(worker);
        for (long i = 0; i < model_.num_layers; i++) {
            attention(worker, mine, i);
            feed_forward(worker, mine, model_.layers[i]);
        }
        share_tokens(worker, [&](long token) {
            T* out = static_cast<T*>(batch_.hidden) + token * model_.hidden_size;
            norm(token, model_.final_norm, out);
        });
    }

  private:
    float* residual(long token) const { return buffers_.residual + token * buffers_.hidden_stride; }

    template <class Work>
    void share_tokens(Worker& worker, Work work) const {
        worker.share((batch_.num_tokens + ITEM_TOKENS - 1) / ITEM_TOKENS, [&](long item) {
            const long end = std::min((item + 1) * ITEM_TOKENS, long(batch_.num_tokens));
            for (long token = item * ITEM_TOKENS; token < end; token++) work(token);
        });
    }

    void embed(Worker& worker) const {
        share_tokens(worker, [&](long token) {
            const T* from = static_cast<const T*>(model_.embedding) + batch_.token_ids[token] * model_.hidden_size;
            float* to = residual(token);
            for (long i = 0; i < model_.hidden_size; i++) to[i] = widen(from[i]);
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

    // The product of a matrix with the normalised residual stream.
    //
    // Few tokens are normalised by each thread for itself, which is quicker than another phase.
    template <class Write>
    void linear_of_norm(Worker& worker, const Private<T>& mine, const float* weight, const TriodeMatrix& matrix,
                        Write write) const {
        const long tokens = batch_.num_tokens;
        if (tokens > FEW_TOKENS) {
            share_tokens(worker, [&](long token) { norm_padded(token, weight, buffers_.normed); });
            linear<T>(worker, mine.linear, matrix, [&] { return buffers_.normed; }, buffers_.hidden_stride, tokens, write);
            return;
        }
        bool is_normed = false;
        auto inputs = [&] {
            for (long token = 0; !is_normed && token < tokens; token++) norm_padded(token, weight, mine.normed);
            is_normed = true;
            return mine.normed;
        };
        linear<T>(worker, mine.linear, matrix, inputs, buffers_.hidden_stride, tokens, write);
    }

    void attention(Worker& worker, const Private<T>& mine, long index) const {
        const TriodeLayer& layer = model_.layers[index];
        auto write_qkv = [&](long token, long output, const float* sums) {
            float* to = buffers_.qkv + token * buffers_.qkv_stride + output;
            for (int i = 0; i < PANEL; i += LANES) store(to + i, with_bias(layer.qkv, output + i, sums + i));
        };
        linear_of_norm(worker, mine, layer.input_norm, layer.qkv, write_qkv);
        // A row of one query reads no other token's new key: whoever attends for it stores its key as well.
        if (!is_decode_)
            share_tokens(worker, [&](long token) {
                for (long head = 0; head < model_.num_kv_heads; head++) rotate_and_store(index, token, head);
            });
        share_attention(worker, mine, index);
        add_product(worker, mine, layer.o, buffers_.attended, buffers_.attended_stride);
    }

    void feed_forward(Worker& worker, const Private<T>& mine, const TriodeLayer& layer) const {
        auto write_inner = [&](long token, long output, const float* sums) {
            T* to = buffers_.inner + token * buffers_.inner_stride + output / 2;
            for (int i = 0; i < PANEL; i += 32) gate(layer.gate_up, output + i, sums + i, to + i / 2);
        };
        linear_of_norm(worker, mine, layer.post_norm, layer.gate_up, write_inner);
        add_product(worker, mine, layer.down, buffers_.inner, buffers_.inner_stride);
    }

    // 16 outputs silu(gate) * up, from 16 sums of the gate and the 16 of up that follow them.
    static void gate(const TriodeMatrix& matrix, long output, const float* sums, T* to) {
        for (int i = 0; i < 16; i += LANES) {
            Vec g = with_bias(matrix, output + i, sums + i);
            Vec up = with_bias(matrix, output + 16 + i, sums + 16 + i);
            Vec y = g / (splat(1.f) + exponential(-g)) * up;
            for (int lane = 0; lane < LANES; lane++) narrow(y[lane], to[i + lane]);
        }
    }

    // residual += x W^T + bias
    void add_product(Worker& worker, const Private<T>& mine, const TriodeMatrix& matrix, const T* x, long stride) const {
        auto add = [&](long token, long output, const float* sums) {
            float* to = residual(token) + output;
            for (int i = 0; i < PANEL; i += LANES)
                store(to + i, load(to + i) + with_bias(matrix, output + i, sums + i));
        };
        linear<T>(worker, mine.linear, matrix, [x] { return x; }, stride, batch_.num_tokens, add);
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
        const long slot = (batch_.slots[token] * K + kv_head) * H;
        T* key_to = static_cast<T*>(batch_.keys[layer_index]) + slot;
        T* value_to = static_cast<T*>(batch_.values[layer_index]) + slot;
        for (long d = 0; d < H; d++) narrow(key[d], key_to[d]);
        for (long d = 0; d < H; d++) narrow(value[d], value_to[d]);
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
    void share_attention(Worker& worker, const Private<T>& mine, long index) const {
        const long queries = shape_.queries(), heads = model_.num_kv_heads;
        long items = 0;
        for (long row = 0; row < batch_.num_rows; row++) items += (num_queries(row) + queries - 1) / queries * heads;
        long row = 0, before = 0;
        worker.share(items, [&](long item) {
            for (long blocks; before + (blocks = (num_queries(row) + queries - 1) / queries * heads) <= item; row++)
                before += blocks;
            const long blocks = (num_queries(row) + queries - 1) / queries;
            const long first = (blocks - 1 - (item - before) / heads) * queries;
            attend_block(mine, index, row, first, std::min(queries, num_queries(row) - first), (item - before) % heads);
        });
    }

    long num_queries(long row) const { return batch_.query_start[row + 1] - batch_.query_start[row]; }

    void attend_block(const Private<T>& mine, long index, long row, long first, long count, long kv_head) const {
        const long H = model_.head_dim, K = model_.num_kv_heads, group = shape_.group;
        const long token = batch_.query_start[row] + first;
        if (is_decode_) rotate_and_store(index, token, kv_head);
        for (long i = 0; i < count; i++) {
            const float* from = buffers_.qkv + (token + i) * buffers_.qkv_stride + kv_head * group * H;
            T* to = mine.attention.queries + i * group * H;
            for (long d = 0; d < group * H; d++) narrow(from[d], to[d]);
        }
        const CachedHead<T> head{
            static_cast<const T*>(batch_.keys[index]) + kv_head * H,
            static_cast<const T*>(batch_.values[index]) + kv_head * H,
            batch_.block_table + row * batch_.table_columns,
            long(batch_.block_size_tokens),
            K * H,
        };
        T* out = buffers_.attended + token * buffers_.attended_stride + kv_head * group * H;
        attend(head, shape_, batch_.start[row] + first, count, long(model_.layers[index].window_tokens), scale_,
               mine.attention, out, buffers_.attended_stride);
    }

    const TriodeModel& model_;
    const TriodeBatch& batch_;
    const Buffers<T>& buffers_;
    const HeadShape shape_;
    const float scale_;
    const bool is_decode_;
};

}  // namespace triode
