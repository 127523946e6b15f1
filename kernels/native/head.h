// What follows the layers: logits of the rows that need them, or only the likeliest token of each.
#pragma once

#include "linear.h"

namespace triode {

// The largest logit of a row so far, and where it is: the first of equals.
struct Best {
    float logit;
    bool has_nan;
    int64_t output;

    static Best none() { return {-INFINITY, false, -1}; }

    void take(const Best& other) {
        has_nan |= other.has_nan;
        const bool is_first = other.logit == logit && uint64_t(other.output) < uint64_t(output);
        if (other.logit > logit || is_first) logit = other.logit, output = other.output;
    }

    // -1 if no token is possible.
    int64_t token() const { return has_nan || !std::isfinite(logit) ? -1 : output; }
};

// Of `count` logits, of which the first is that of `output`. 64 can be read.
inline Best best_of(const float* logits, long output, long count) {
    Vec most = splat(-INFINITY), nans = Vec{};
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vec some = load(logits + i);
        most = larger(some, most);
        nans = some == some ? nans : some;
    }
    Best best{maximum(most), std::isnan(sum(nans)), -1};
    for (; i < count; i++) {
        best.has_nan |= std::isnan(logits[i]);
        if (logits[i] > best.logit) best.logit = logits[i];
    }
    for (i = 0; i < count && best.output < 0; i++)
        if (logits[i] == best.logit) best.output = output + i;
    return best;
}

template <class T>
struct HeadBuffers {
    static constexpr long PHASES = 2;

    Phase* phases;
    LinearScratch* threads;
    T* x;
    Best* best;  // [threads][rows]
    long stride;

    long take(void* base, const TriodeModel& model, long rows, int num_threads) {
        stride = rounded_up(model.hidden_size, PANEL);
        Arena arena(base);
        phases = arena.take<Phase>(PHASES);
        x = arena.take<T>(rows * stride);
        best = arena.take<Best>(rows * num_threads);
        threads = arena.take<LinearScratch>(num_threads);
        ByteRows byte_rows;
        byte_rows.take(arena, rows, stride);
        for (int i = 0; i < num_threads; i++) {
            LinearScratch mine;
            mine.take(arena, stride, byte_rows);
            if (base) threads[i] = mine;
        }
        return arena.used();
    }
};

// Gives the logits of `hidden`, [rows][hidden size], to `write(thread, row, first output, 64 logits)`.
template <class T, class Write>
void share_head(const TriodeModel& model, const HeadBuffers<T>& buffers, const T* hidden, long rows, Team& team,
                Write write) {
    for (long row = 0; row < rows; row++) {
        T* to = buffers.x + row * buffers.stride;
        std::copy_n(hidden + row * model.hidden_size, model.hidden_size, to);
        std::fill(to + model.hidden_size, to + buffers.stride, T{});
    }
    team.run(buffers.phases, HeadBuffers<T>::PHASES, [&](Worker& worker) {
        auto write_panel = [&](long row, long output, const float* sums) { write(worker.index, row, output, sums); };
        const GivenRows<T> inputs{buffers.x, buffers.stride};
        linear<T>(worker, buffers.threads[worker.index], model.head, model.head, inputs, rows, write_panel);
    });
}

// out[rows][outputs of the head rounded up to 64]
template <class T>
void logits(const TriodeModel& model, const T* hidden, long rows, float* out, void* scratch, Team& team) {
    HeadBuffers<T> buffers;
    buffers.take(scratch, model, rows, team.size());
    const long out_stride = rounded_up(model.num_outputs, PANEL);
    share_head(model, buffers, hidden, rows, team, [&](int, long row, long output, const float* sums) {
        memcpy(out + row * out_stride + output, sums, PANEL * sizeof(float));
    });
}

// The token with the largest logit, of each row; logits are never written to memory.
template <class T>
void likeliest(const TriodeModel& model, const T* hidden, long rows, int64_t* tokens, void* scratch, Team& team) {
    HeadBuffers<T> buffers;
    buffers.take(scratch, model, rows, team.size());
    std::fill_n(buffers.best, rows * team.size(), Best::none());
    share_head(model, buffers, hidden, rows, team, [&](int thread, long row, long output, const float* sums) {
        const long count = std::min(long(PANEL), long(model.num_outputs) - output);
        buffers.best[thread * rows + row].take(best_of(sums, output, count));
    });
    for (long row = 0; row < rows; row++) {
        Best best = Best::none();
        for (int thread = 0; thread < team.size(); thread++) best.take(buffers.best[thread * rows + row]);
        tokens[row] = best.token();
    }
}

}  // namespace triode
