// The memory that a step works in, laid out over what the caller gives.
#pragma once

#include "attention.h"
#include "linear.h"

namespace triode {

constexpr long PHASES_A_LAYER = 17;
constexpr long PHASES_BESIDE = 4;

// What one thread has to itself.
template <class T>
struct Private {
    T* normed;  // [FEW_ROWS][padded hidden]
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
    float* pieces;  // [PIECES_A_THREAD * num_threads] `Softmax` of one query's group
    Private<T>* threads;
    long num_threads;

    // Lays out the buffers of a step over `base`; returns how many bytes they take.
    long take(void* base, const TriodeModel& model, long tokens, int thread_count) {
        num_threads = thread_count;
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
        const long most_inputs = std::max({hidden_stride, attended_stride, inner_stride});
        ByteRows byte_rows;
        byte_rows.take(arena, tokens, most_inputs);
        for (int i = 0; i < num_threads; i++) {
            Private<T> mine;
            mine.linear.take(arena, most_inputs, byte_rows);
            mine.normed = arena.take<T>(FEW_ROWS * hidden_stride);
            mine.attention.take(arena, {model.num_heads / model.num_kv_heads, model.head_dim});
            if (base) threads[i] = mine;
        }
        const HeadShape shape{model.num_heads / model.num_kv_heads, model.head_dim};
        pieces = arena.take<float>(max_pieces() * Softmax::floats(shape.group, shape.panels()));
        return arena.used();
    }

    long max_pieces() const { return num_threads > 1 ? PIECES_A_THREAD * num_threads : 0; }

    static long num_phases(const TriodeModel& model) { return model.num_layers * PHASES_A_LAYER + PHASES_BESIDE; }
};

}  // namespace triode
