// The exported functions, in plain C. One shared object is built of this file per instruction set.
#include "check.h"
#include "head.h"
#include "packing.h"
#include "pipeline.h"
#include "self_check.h"
#include "step.h"

#include <cerrno>

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace triode;

namespace {

template <class T>
void forward(const TriodeModel& model, const TriodeBatch& batch, void* scratch, Team& team) {
    const int num_threads = team.size();
    Buffers<T> buffers;
    buffers.take(scratch, model, batch.num_tokens, num_threads);
    for (int i = 0; i < num_threads; i++) {
        const AttentionScratch<T>& mine = buffers.threads[i].attention;
        // The columns past head_dim are multiplied and never read; they must not be slow to compute with.
        memset(mine.values, 0, words_of<T>(TILE) * PANEL * 4);
    }
    // Padding of the attention's output meets weights of zero: anything but NaN.
    for (long token = 0; token < batch.num_tokens; token++) {
        T* row = buffers.attended + token * buffers.attended_stride;
        std::fill(row + model.num_heads * model.head_dim, row + buffers.attended_stride, T{});
    }
    const Step<T> step(model, batch, buffers);
    team.run(buffers.phases, Buffers<T>::num_phases(model), [&](Worker& worker) { step.run(worker); });
}

template <class T>
void pack(const T* source, long rows, long columns, bool halves, uint32_t* to) {
    const long panels = packed_rows(rows, halves) / PANEL, words = words_of<T>(columns);
#pragma omp parallel for
    for (long panel = 0; panel < panels; panel++)
        pack_panel(source, rows, columns, halves, panel, to + panel * words * PANEL);
}

int32_t forward(const TriodeModel& model, const TriodeBatch& batch, void* scratch, Team& team) {
    if (!rows_fit(batch) || !tokens_fit(model, batch)) return 0;
    if (model.is_bf16)
        forward<bf16>(model, batch, scratch, team);
    else
        forward<float>(model, batch, scratch, team);
    return 1;
}

void likeliest(const TriodeModel& model, const void* hidden, long rows, int64_t* tokens, void* scratch, Team& team) {
    if (model.is_bf16)
        likeliest(model, static_cast<const bf16*>(hidden), rows, tokens, scratch, team);
    else
        likeliest(model, static_cast<const float*>(hidden), rows, tokens, scratch, team);
}

// Each decoding row goes on by one token. Its table may lack a block, and is refused then.
bool advance(const TriodeOrder& order) {
    const TriodeBatch& batch = order.batch;
    for (long row = 0; row < batch.num_rows; row++) {
        const int64_t at = ++order.start[row], column = at / batch.block_size_tokens;
        order.positions[row]++;
        if (column >= batch.table_columns) return false;
        const int64_t block = batch.block_table[row * batch.table_columns + column];
        order.slots[row] = block * batch.block_size_tokens + at % batch.block_size_tokens;
    }
    return true;
}

void compute(const TriodeOrder& order) {
    const TriodeModel& model = *order.model;
    Team& team = *static_cast<Team*>(order.team);
    *order.is_computed = 0;
    if (order.positions && !advance(order)) return;
    for (long i = 0; i < order.num_pending; i++)
        // A row without a token has failed, and any token takes its place.
        order.token_ids[order.pending[i]] = std::max<int64_t>(order.previous_tokens[order.sources[i]], 0);
    *order.is_computed = forward(model, order.batch, order.scratch, team);
    const long num_wanted = order.batch.wanted_start[order.batch.num_rows];
    if (*order.is_computed && num_wanted)
        likeliest(model, order.batch.hidden, num_wanted, order.tokens, order.scratch, team);
}

// Reads everything once, and returns what a compiler cannot leave out.
uint32_t read_all(const char* memory, long bytes, Team& team) {
    constexpr long ITEM_BYTES = 1 << 20;
    Phase phase;
    std::atomic<uint32_t> found{0};
    team.run(&phase, 1, [&](Worker& worker) {
        worker.share(bytes / ITEM_BYTES, [&](long item) {
            WordVec sums[8] = {};
            for (long at = 0; at < ITEM_BYTES; at += 8 * LANES * 4)
                for (int i = 0; i < 8; i++) sums[i] |= (WordVec)load(memory + item * ITEM_BYTES + at + i * LANES * 4);
            for (const WordVec& sum : sums) found.fetch_or(sum[0]);
        });
    });
    return found;
}

}  // namespace

extern "C" {

// The sizes of the structs, for whoever mirrors them.
void triode_sizes(int64_t sizes[6]) {
    sizes[0] = sizeof(TriodeMatrix);
    sizes[1] = sizeof(TriodeLayer);
    sizes[2] = sizeof(TriodeModel);
    sizes[3] = sizeof(TriodeBatch);
    sizes[4] = sizeof(TriodeRanks);
    sizes[5] = sizeof(TriodeOrder);
}

// `number_bytes` is 2 for bfloat16, 4 for float: what the format PLAIN keeps. `group` is for formats that have groups;
// 0 is all inputs.
int64_t triode_packed_bytes(int32_t format, int64_t group, int32_t number_bytes, int64_t rows, int64_t columns,
                            int32_t halves) {
    if (format == PLAIN || format == CHANNEL8)
        return packed_rows(rows, halves) * rounded_up(columns * (format == PLAIN ? number_bytes : 1), 4);
    const Layout layout(format, group, columns);
    return packed_rows(rows, halves) / PANEL * layout.groups(columns) * layout.group_size() * 4;
}

// Asks for huge pages; to be called before the memory is first written to.
void triode_prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    const int64_t page = 2 << 20, at = reinterpret_cast<int64_t>(memory);
    const int64_t first = rounded_up(at, page), end = (at + bytes) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Lays a row-major matrix out as it is: numbers of 4 or 2 bytes, or signed bytes.
void triode_pack(int32_t number_bytes, const void* source, int64_t rows, int64_t columns, int32_t halves, void* to) {
    uint32_t* panels = static_cast<uint32_t*>(to);
    switch (number_bytes) {
        case 1: pack(static_cast<const uint8_t*>(source), rows, columns, halves, panels); break;
        case 2: pack(static_cast<const bf16*>(source), rows, columns, halves, panels); break;
        case 4: pack(static_cast<const float*>(source), rows, columns, halves, panels); break;
    }
}

// Lays a matrix out in groups: of numbers of 4 or 2 bytes, or of a GGUF file's blocks in the same format.
void triode_pack_groups(int32_t format, int64_t group, int32_t number_bytes, const void* source, int64_t rows,
                        int64_t columns, int32_t halves, void* to) {
    const Layout layout(format, group, columns);
    const long panels = packed_rows(rows, halves) / PANEL, size = layout.groups(columns) * layout.group_size();
#pragma omp parallel for
    for (long panel = 0; panel < panels; panel++) {
        uint32_t* at = static_cast<uint32_t*>(to) + panel * size;
        if (format != GROUP8 && format != GROUP4)
            pack_gguf(static_cast<const uint8_t*>(source), format, layout, rows, columns, halves, panel, at);
        else if (number_bytes == 2)
            pack_rounded(static_cast<const bf16*>(source), layout, rows, columns, halves, panel, at);
        else
            pack_rounded(static_cast<const float*>(source), layout, rows, columns, halves, panel, at);
    }
}

int64_t triode_scratch_bytes(const TriodeModel* model, int64_t num_tokens, int32_t num_threads) {
    if (model->is_bf16) {
        const long step = Buffers<bf16>{}.take(nullptr, *model, num_tokens, num_threads);
        return std::max(step, HeadBuffers<bf16>{}.take(nullptr, *model, num_tokens, num_threads));
    }
    const long step = Buffers<float>{}.take(nullptr, *model, num_tokens, num_threads);
    return std::max(step, HeadBuffers<float>{}.take(nullptr, *model, num_tokens, num_threads));
}

// What is wrong with a table of layers, or null. Lengths of memory are the caller's word.
const char* triode_model_error(const TriodeModel* model) { return model_error(*model); }

// What this build computes wrongly on this processor, or null.
const char* triode_products_error() { return products_error(); }

// Threads for `triode_forward` and `triode_logits`, one call at a time. `cpus`: where each helper stays, or null.
// Null if the system does not start them all; then none is left, and `error`, which may be null, holds its number.
void* triode_open_team(int32_t num_helpers, const int32_t* cpus, int32_t* error) {
    int32_t code = ENOMEM;
    try {
        return new Team(num_helpers, cpus);
    } catch (const std::system_error& failure) {
        code = failure.code().value();
    } catch (const std::bad_alloc&) {
    }
    if (error) *error = code;
    return nullptr;
}

// Reads whole MiB of memory once, to be timed.
uint32_t triode_read(const void* memory, int64_t bytes, void* team) {
    return read_all(static_cast<const char*>(memory), bytes, *static_cast<Team*>(team));
}

void triode_close_team(void* team) { delete static_cast<Team*>(team); }

// Computes a step. Returns false, having touched nothing, if some index of the batch is out of bounds.
int32_t triode_forward(const TriodeModel* model, const TriodeBatch* batch, void* scratch, void* team) {
    return forward(*model, *batch, scratch, *static_cast<Team*>(team));
}

// out[rows][outputs of the head rounded up to 64] from contiguous hidden states.
void triode_logits(const TriodeModel* model, const void* hidden, int64_t rows, float* out, void* scratch,
                   void* team) {
    if (model->is_bf16)
        logits(*model, static_cast<const bf16*>(hidden), rows, out, scratch, *static_cast<Team*>(team));
    else
        logits(*model, static_cast<const float*>(hidden), rows, out, scratch, *static_cast<Team*>(team));
}

// tokens[rows]: what has the largest logit, the lowest id among equals; -1 where a logit is NaN or the largest not finite.
void triode_likeliest(const TriodeModel* model, const void* hidden, int64_t rows, int64_t* tokens, void* scratch,
                      void* team) {
    likeliest(*model, hidden, rows, tokens, scratch, *static_cast<Team*>(team));
}

// A thread that computes orders, or null if the system starts no more.
void* triode_open_pipeline() {
    try {
        return new Pipeline(compute);
    } catch (const std::exception&) {
        return nullptr;
    }
}

// Computes what has been ordered, and ends the thread.
void triode_close_pipeline(void* pipeline) { delete static_cast<Pipeline*>(pipeline); }

// Returns the order's number. All that it points to must be left alone until it is done.
int64_t triode_submit(void* pipeline, const TriodeOrder* order) { return static_cast<Pipeline*>(pipeline)->submit(*order); }

// Whether the order of this number is done, after at most so long; less than 0: wait for it.
int32_t triode_wait(void* pipeline, int64_t number, int64_t microseconds) {
    return static_cast<Pipeline*>(pipeline)->wait(number, microseconds);
}
}
