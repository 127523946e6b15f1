// What is refused before anything is computed: tables whose numbers contradict each other or lie out of bounds.
#pragma once

#include "grouped.h"
#include "kv.h"
#include "model.h"
#include "panel.h"

namespace triode {

// Sizes are limited so that no product of three of them overflows.
constexpr int64_t MOST = 1 << 20;

inline bool is_size(int64_t n) { return n > 0 && n <= MOST; }

// Null if the matrix is what the layer's sizes ask for.
inline const char* matrix_error(const TriodeMatrix& matrix, int64_t out, int64_t in) {
    if (matrix.out_features != out || matrix.in_features != in) return "a matrix has other sizes than its model";
    if (!matrix.panels) return "a matrix is missing";
    if (matrix.format < PLAIN || matrix.format > GGUF_Q4_1) return "a matrix has an unknown format";
    if (matrix.format == CHANNEL8 && !matrix.scales) return "a matrix of bytes lacks its scales";
    const bool has_groups = matrix.format != PLAIN && matrix.format != CHANNEL8;
    if (has_groups && !matrix.group) {
        if (matrix.format != GROUP8 || !matrix.byte_inputs) return "a matrix has one group where it must have several";
        if (in > MAX_WHOLE_ROW) return "a matrix has one group of too many inputs";
    } else if (has_groups && matrix.group != 32 && matrix.group != 64 && matrix.group != 128) {
        return "a matrix has groups of another size than 32, 64 or 128";
    }
    return nullptr;
}

inline const char* layer_error(const TriodeModel& model, const TriodeLayer& layer) {
    const int64_t D = model.hidden_size, F = model.intermediate_size;
    const int64_t q = model.num_heads * model.head_dim, kv = model.num_kv_heads * model.head_dim;
    if (!layer.input_norm || !layer.post_norm) return "a norm is missing";
    if (!layer.q_norm != !layer.k_norm) return "a layer has one of two norms of heads";
    if (layer.window_tokens < 0) return "a window is negative";
    const char* errors[] = {
        matrix_error(layer.qkv, q + 2 * kv, D),
        matrix_error(layer.o, D, q),
        matrix_error(layer.gate_up, 2 * F, D),
        matrix_error(layer.down, D, F),
    };
    for (const char* error : errors)
        if (error) return error;
    return nullptr;
}

inline const char* ranks_error(const TriodeModel& model) {
    if (!model.ranks) return model.num_outputs == model.vocab_size ? nullptr : "the head has other sizes than its model";
    const TriodeRanks& ranks = *model.ranks;
    if (ranks.num_ranks < 1 || ranks.rank < 0 || ranks.rank >= ranks.num_ranks) return "there is no such rank";
    if (model.num_outputs < 1 || model.num_outputs > model.vocab_size) return "the head has more than the vocabulary";
    return ranks.max_tokens < 1 || !ranks.arrivals || !ranks.sums ? "ranks share no memory" : nullptr;
}

inline const char* model_error(const TriodeModel& model) {
    const int64_t sizes[] = {model.vocab_size, model.hidden_size,  model.intermediate_size, model.num_layers,
                             model.num_heads,  model.num_kv_heads, model.head_dim};
    for (int64_t size : sizes)
        if (!is_size(size)) return "a size is not between 1 and 2^20";
    if (model.num_positions < 1) return "there are no positions";
    if (model.num_heads % model.num_kv_heads) return "heads are not a multiple of KV heads";
    if (model.head_dim % 2) return "an odd head size cannot be rotated";
    if (!(model.norm_eps >= 0 && model.norm_eps < 1)) return "the norm's epsilon is not in [0, 1)";
    if (!model.final_norm || !model.cos || !model.sin || !model.layers) return "a tensor is missing";
    for (int64_t i = 0; i < model.num_layers; i++)
        if (const char* error = layer_error(model, model.layers[i])) return error;
    if (const char* error = ranks_error(model)) return error;
    if (const char* error = matrix_error(model.embedding, model.vocab_size, model.hidden_size)) return error;
    return matrix_error(model.head, model.num_outputs, model.hidden_size);
}

inline bool rows_fit(const TriodeBatch& batch) {
    if (batch.block_size_tokens < UNIT || batch.block_size_tokens % UNIT) return false;
    if (batch.query_start[0] != 0 || batch.query_start[batch.num_rows] != batch.num_tokens) return false;
    if (batch.wanted_start[0] != 0) return false;
    for (long row = 0; row < batch.num_rows; row++) {
        const int64_t first = batch.query_start[row], end = batch.query_start[row + 1];
        const int64_t room = batch.table_columns * batch.block_size_tokens;
        if (first >= end || end > batch.num_tokens || batch.start[row] < 0 || batch.start[row] > room - (end - first))
            return false;
        const int64_t wanted = batch.wanted_start[row], wanted_end = batch.wanted_start[row + 1];
        if (wanted_end < wanted || wanted_end > batch.num_tokens || wanted_end - wanted > end - first) return false;
        const int64_t used = (batch.start[row] + end - first - 1) / batch.block_size_tokens + 1;
        for (int64_t c = 0; c < used; c++) {
            const int64_t block = batch.block_table[row * batch.table_columns + c];
            if (block < 0 || block >= batch.num_blocks) return false;
        }
    }
    return true;
}

inline bool tokens_fit(const TriodeModel& model, const TriodeBatch& batch) {
    if (model.ranks && batch.num_tokens > model.ranks->max_tokens) return false;
    const int64_t num_slots = batch.num_blocks * batch.block_size_tokens;
    for (long t = 0; t < batch.num_tokens; t++) {
        if (batch.token_ids[t] < 0 || batch.token_ids[t] >= model.vocab_size) return false;
        if (batch.positions[t] < 0 || batch.positions[t] >= model.num_positions) return false;
        if (batch.slots[t] < 0 || batch.slots[t] >= num_slots) return false;
    }
    return true;
}

}  // namespace triode
