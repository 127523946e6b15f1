// x [M, K] times a weight, in one pass on a Hopper GPU: [N, K] gives [M, N], and may be added to a residual stream; a gate-up
// weight [2F, K] gives silu(gate) * up of the product, [M, F].
//
// The idea. One thread has the copy engine fill a ring of stages in shared memory; a stage holds 64 in features of this
// program's tokens and of its weight rows. Groups of four warps multiply 64 (or twice 64) tokens each with all those rows.
// Programs come in clusters that read either the same weight rows or the same tokens. Each has its share of those
// fetched, for all. A program takes one tile after the other, and the next one's stages are fetched while it still stores.
//
// Of a gate-up weight a stage holds eight gates and their eight ups by turns. Since up j comes eight columns behind gate j,
// one thread holds both sums, and SwiGLU takes place in registers: what would be written and read again, twice as wide as
// the result, never leaves them.
//
// Sums run over K in order, 16 in features an instruction, so that any tile gives the same bits. A sum is rounded before
// anything becomes of it, as it would be between two kernels.
//
// What the compiler is told (tiles.py and source.py say what it means): GATED, ADDS, CLUSTER, CONSUMERS, SUBTILES, PARTS,
// COLUMNS, STAGES, SHARES_WEIGHT, BOX_GROUPS, FLOAT16. "multiply.h" has the one instruction whose text depends on COLUMNS.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using Descriptor = u64;
using Address = u32;  // in shared memory

#include "multiply.h"

constexpr int WARP = 32;
constexpr int WARP_GROUP = 4 * WARP;
constexpr int NUM_THREADS = WARP_GROUP * (1 + CONSUMERS);
constexpr int TOKENS_AT_ONCE = 64;  // of an instruction
constexpr int TOKENS = TOKENS_AT_ONCE * SUBTILES * CONSUMERS;
constexpr int ROWS = PARTS * COLUMNS;
constexpr int GROUP = 8;  // features side by side
constexpr int ROWS_OF_FEATURE = GATED ? 2 : 1;
constexpr int FEATURES = ROWS / ROWS_OF_FEATURE;
constexpr int STEP = 64;  // in features of a stage
constexpr int STEP_BYTES = STEP * 2;
constexpr int K_AT_ONCE = 16;  // of an instruction
constexpr int TOKENS_BYTES = TOKENS * STEP_BYTES;
constexpr int WEIGHT_BYTES = ROWS * STEP_BYTES;
constexpr int STAGE_BYTES = TOKENS_BYTES + WEIGHT_BYTES;
constexpr int ATOM_BYTES = 8 * STEP_BYTES;  // within which the copy engine swaps parts of 16 bytes
constexpr int NUM_RELEASES = CLUSTER * CONSUMERS * (WARP_GROUP / WARP);
constexpr u16 EVERY_PROGRAM = (1 << CLUSTER) - 1;
// What programs of a cluster have in common, and what is their own.
constexpr int WEIGHT_SHARES = SHARES_WEIGHT ? CLUSTER : 1;
constexpr int TOKEN_SHARES = SHARES_WEIGHT ? 1 : CLUSTER;
// A multiprocessor's registers, first divided evenly among threads, go to those that hold sums. Of one group each may have
// as many as there can be.
constexpr bool MOVES_REGISTERS = CONSUMERS > 1;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;

static_assert(CONSUMERS <= 3, "registers are divided for three");
static_assert(FEATURES % (GROUP * BOX_GROUPS) == 0, "rows are fetched by whole boxes");
static_assert(TOKENS % (8 * TOKEN_SHARES) == 0, "tokens are fetched by whole atoms");

// An address on the device that tensor maps are read from, as the driver lays them out.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// ---- Barriers of a stage: full once all its bytes are there, empty once all warps of the cluster are done with it.

__device__ __forceinline__ Address shared_address(const void *pointer) { return __cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void begin_barrier(Address barrier, u32 num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(Address barrier, u32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void wait(Address barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

// Without `.release.cluster`, which waits for all of a thread's writes to device memory at every step: what was read is
// all that matters here, and by the tensor cores' own wait it has been.
__device__ __forceinline__ void arrive_at(Address barrier, u32 program) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(program) : "memory");
}

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// ---- The copy engine. A shared box goes to the same place of every program of the cluster, and tells its barrier.

template <bool SHARED>
__device__ __forceinline__ void fetch_tokens(Address to, const TensorMap &map, Address barrier, int feature, int token) {
    if (SHARED)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
            "l"(&map), "r"(barrier), "r"(feature), "r"(token), "h"(EVERY_PROGRAM)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
            "l"(&map), "r"(barrier), "r"(feature), "r"(token)
            : "memory");
}

// Weights go by once (or once for each group of tokens): they are the first that L2 may forget.
template <bool SHARED>
__device__ __forceinline__ void fetch_weight(Address to, const TensorMap &map, Address barrier, int feature, int group) {
    u64 forget_first;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(forget_first));
    if (SHARED)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
            " [%0], [%1, {%3, %4, %4, %5}], [%2], %6, %7;" ::"r"(to),
            "l"(&map), "r"(barrier), "r"(feature), "r"(0), "r"(group), "h"(EVERY_PROGRAM), "l"(forget_first)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;" ::"r"(to),
            "l"(&map), "r"(barrier), "r"(feature), "r"(0), "r"(group), "l"(forget_first)
            : "memory");
}

// ---- The tensor cores.

// Rows of 128 bytes in atoms of eight, as the copy engine has swizzled them.
__device__ __forceinline__ Descriptor describe(Address rows) {
    constexpr u64 SWIZZLED_128_BYTES = 1ull << 62, UNUSED_STRIDE = 1ull << 16;
    return SWIZZLED_128_BYTES | u64(ATOM_BYTES >> 4) << 32 | UNUSED_STRIDE | (rows & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most so many steps' products are under way.
template <int STEPS>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(STEPS) : "memory");
}

using Sums = float[SUBTILES][PARTS][COLUMNS / 2];

// The compiler does not know that products are written behind its back: no use of sums may cross this line.
__device__ __forceinline__ void hold(Sums &sums) {
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(sums[s][p][i])::"memory");
}

// One stage's products of a consumer, whose tokens begin at `tokens`.
__device__ __forceinline__ void multiply_stage(Sums &sums, Address tokens, Address weight, bool begin) {
    begin_products();
#pragma unroll
    for (int k = 0; k < STEP / K_AT_ONCE; ++k)
#pragma unroll
        for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                // 16 in features are 32 bytes further in each row; addresses count 16 bytes.
                Descriptor a = describe(tokens + s * TOKENS_AT_ONCE * STEP_BYTES) + 2 * k;
                Descriptor b = describe(weight + p * COLUMNS * STEP_BYTES) + 2 * k;
                multiply(sums[s][p], a, b, !begin || k > 0);
            }
    end_products();
}

// ---- SwiGLU, by the instructions of the Triton kernels (device_code.py).

__device__ __forceinline__ u32 round_pair(float low, float high) {
    u32 pair;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ float widen(u16 number) {
    float wide;
#if FLOAT16
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(number));
#else
    asm("cvt.f32.bf16 %0, %1;" : "=f"(wide) : "h"(number));
#endif
    return wide;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    constexpr float LOG2_E = 1.4426950408889634f;
    float exponential, silu;
    // What `.ftz` flushes to zero is too small to change the sum.
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(__fmul_rn(-gate, LOG2_E)));
    asm("div.full.f32 %0, %1, %2;" : "=f"(silu) : "f"(gate), "f"(__fadd_rn(1.0f, exponential)));
    return __fmul_rn(silu, up);
}

// Two neighbouring features of a token.
__device__ __forceinline__ u32 swiglu_pair(const float *gates, const float *ups) {
    u32 gate = round_pair(gates[0], gates[1]), up = round_pair(ups[0], ups[1]);
    return round_pair(silu_times(widen(gate), widen(up)), silu_times(widen(gate >> 16), widen(up >> 16)));
}

// ---- What becomes of sums. A thread has two columns of each group, in two rows that lie eight apart.

// Among four neighbouring lanes, lane j gets what all have at place j, in order.
__device__ __forceinline__ void transpose_four(u32 (&pairs)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 theirs = __shfl_xor_sync(~0u, odd ? pairs[i] : pairs[i + 1], 1);
        (odd ? pairs[i] : pairs[i + 1]) = theirs;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 theirs = __shfl_xor_sync(~0u, upper ? pairs[i] : pairs[i + 2], 2);
        (upper ? pairs[i] : pairs[i + 2]) = theirs;
    }
}

// A thread's two neighbouring features of a group whose first sum is given.
__device__ __forceinline__ u32 finish_pair(const float *sums) {
#if GATED
    constexpr int TO_UPS = 4;
    return swiglu_pair(sums, sums + TO_UPS);
#else
    return round_pair(sums[0], sums[1]);
#endif
}

__device__ __forceinline__ u32 add_pair(u32 pair, u32 residual) {
    return round_pair(__fadd_rn(widen(pair), widen(residual)), __fadd_rn(widen(pair >> 16), widen(residual >> 16)));
}

// One row of a part; four groups at a time are stored by 16 bytes a lane. Features from the end on are not stored.
__device__ __forceinline__ void store_row(const float *sums, u16 *out, const u16 *residual, int feature, int num_features) {
    constexpr int NUM_GROUPS = COLUMNS / (ROWS_OF_FEATURE * GROUP), SUMS_OF_GROUP = 4 * ROWS_OF_FEATURE;
    constexpr int NUM_FOURS = NUM_GROUPS / 4, NUM_LEFT = NUM_GROUPS % 4;
    int quarter = threadIdx.x % 4, four = feature + quarter * GROUP, left = feature + NUM_FOURS * 4 * GROUP + quarter * 2;
#if ADDS
    // All of it is on its way before any is waited for.
    uint4 to_fours[NUM_FOURS + 1];
    u32 to_left[NUM_LEFT + 1];
#pragma unroll
    for (int i = 0; i < NUM_FOURS; ++i, four += 4 * GROUP)
        if (four < num_features) to_fours[i] = *reinterpret_cast<const uint4 *>(residual + four);
#pragma unroll
    for (int i = 0; i < NUM_LEFT; ++i, left += GROUP)
        if (left < num_features) to_left[i] = *reinterpret_cast<const u32 *>(residual + left);
    four -= NUM_FOURS * 4 * GROUP, left -= NUM_LEFT * GROUP;
#endif
#pragma unroll
    for (int i = 0; i < NUM_FOURS; ++i, four += 4 * GROUP) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = finish_pair(sums + (i * 4 + j) * SUMS_OF_GROUP);
        transpose_four(pairs);
#if ADDS
        pairs[0] = add_pair(pairs[0], to_fours[i].x), pairs[1] = add_pair(pairs[1], to_fours[i].y);
        pairs[2] = add_pair(pairs[2], to_fours[i].z), pairs[3] = add_pair(pairs[3], to_fours[i].w);
#endif
        if (four < num_features) *reinterpret_cast<uint4 *>(out + four) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
#pragma unroll
    for (int i = 0; i < NUM_LEFT; ++i, left += GROUP) {
        u32 pair = finish_pair(sums + (NUM_FOURS * 4 + i) * SUMS_OF_GROUP);
#if ADDS
        pair = add_pair(pair, to_left[i]);
#endif
        if (left < num_features) *reinterpret_cast<u32 *>(out + left) = pair;
    }
}

// ---- Who computes what.

struct Place {
    int token, feature;
};

// The cluster's tiles in the order in which they are taken: of so many tiles of tokens, whose inputs stay in L2, all that
// multiply with the same weight rows, then those of the next rows.
struct Tiles {
    int of_tokens, of_features, group, last_token;

    __device__ __forceinline__ int count() const { return of_tokens * of_features; }

    // Where the tile of one program of the cluster begins. The last tokens' begins so early that it is full, if there are
    // enough: the copy engine is slow outside of a tensor. What is computed twice has the same bits.
    __device__ __forceinline__ Place operator()(int index, int rank) const {
        int in_group = group * of_features, first = index / in_group * group, within = index % in_group;
        int width = min(group, of_tokens - first);
        int token = first + within % width, feature = within / width;
        return SHARES_WEIGHT ? Place{min((token * CLUSTER + rank) * TOKENS, last_token), feature * FEATURES}
                             : Place{min(token * TOKENS, last_token), (feature * CLUSTER + rank) * FEATURES};
    }
};

struct Ring {
    Address stages, full, empty;
    int at = 0;
    u32 phase = 0;

    __device__ __forceinline__ Address tokens() const { return stages + at * STAGE_BYTES; }
    __device__ __forceinline__ Address weight() const { return tokens() + TOKENS_BYTES; }
    __device__ __forceinline__ Address is_full() const { return full + at * sizeof(u64); }
    __device__ __forceinline__ Address is_empty() const { return empty + at * sizeof(u64); }
    __device__ __forceinline__ void advance() {
        if (++at == STAGES) at = 0, phase ^= 1;
    }
};

struct Producer {
    const TensorMap &x_map, &weight_map;
    int rank, num_tokens;

    // By boxes, which the programs that share them take by turns.
    __device__ __forceinline__ void begin_with_weight(const Ring &ring, Place place, int step) const {
        constexpr int NUM_BOXES = FEATURES / (GROUP * BOX_GROUPS), BOX_BYTES = WEIGHT_BYTES / NUM_BOXES;
        arrive_and_expect(ring.is_full(), STAGE_BYTES);
#pragma unroll
        for (int first = 0; first < NUM_BOXES; first += WEIGHT_SHARES) {
            int box = first + (SHARES_WEIGHT ? rank : 0);
            if (NUM_BOXES % WEIGHT_SHARES == 0 || box < NUM_BOXES)
                fetch_weight<(WEIGHT_SHARES > 1)>(ring.weight() + box * BOX_BYTES, weight_map, ring.is_full(), step * STEP,
                                                  place.feature / GROUP + box * BOX_GROUPS);
        }
    }

    __device__ __forceinline__ void end_with_tokens(const Ring &ring, Place place, int step) const {
        int share = SHARES_WEIGHT ? 0 : rank;
        int token = place.token + share * (TOKENS / TOKEN_SHARES);
        // Where no token is, any will do.
        fetch_tokens<(TOKEN_SHARES > 1)>(ring.tokens() + share * (TOKENS_BYTES / TOKEN_SHARES), x_map, ring.is_full(),
                                         step * STEP, token < num_tokens ? token : 0);
    }
};

// One thread fetches all stages of all tiles.
__device__ __forceinline__ void produce(Ring ring, Producer producer, Tiles tiles, int first, int stride, int num_steps) {
    // Weights do not depend on the kernels before.
    Ring ahead = ring;
    int num_ahead = first < tiles.count() ? min(STAGES, num_steps) : 0;
    for (int step = 0; step < num_ahead; ++step, ahead.advance())
        producer.begin_with_weight(ahead, tiles(first, producer.rank), step);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int index = first; index < tiles.count(); index += stride) {
        Place place = tiles(index, producer.rank);
        for (int step = 0; step < num_steps; ++step, ring.advance()) {
            if (index > first || step >= num_ahead) {
                // A stage that was never taken counts as taken.
                wait(ring.is_empty(), ring.phase ^ 1);
                producer.begin_with_weight(ring, place, step);
            }
            producer.end_with_tokens(ring, place, step);
        }
    }
}

// Tell all programs that this warp is done with a stage.
__device__ __forceinline__ void release(Address is_empty) {
    u32 lane = threadIdx.x % WARP;
    if (lane < CLUSTER) arrive_at(is_empty, lane);
}

// A group of warps multiplies its tokens of all tiles, and stores what becomes of them.
__device__ __forceinline__ void consume(Ring ring, Tiles tiles, u16 *out, const u16 *residual, int num_tokens,
                                        int num_features, int consumer, int rank, int first, int stride, int num_steps) {
    Sums sums;
    int first_token = consumer * SUBTILES * TOKENS_AT_ONCE;
    int row = threadIdx.x % WARP_GROUP / WARP * 16 + threadIdx.x % WARP / 4;
    // What the kernels before may still read is written behind them.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int index = first; index < tiles.count(); index += stride) {
        Address previous = 0;
        hold(sums);
        for (int step = 0; step < num_steps; ++step, ring.advance()) {
            wait(ring.is_full(), ring.phase);
            multiply_stage(sums, ring.tokens() + first_token * STEP_BYTES, ring.weight(), step == 0);
            wait_for_products<1>();
            if (step > 0) release(previous);
            previous = ring.is_empty();
        }
        wait_for_products<0>();
        hold(sums);
        release(previous);
        Place place = tiles(index, rank);
#pragma unroll
        for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int token = place.token + first_token + s * TOKENS_AT_ONCE + row + half * 8;
                    // Neighbours store together: all lanes come along, and those past the end store nothing.
                    int end = token < num_tokens ? num_features : 0;
                    u64 row_at = u64(token) * num_features;
                    int feature = place.feature + p * (COLUMNS / ROWS_OF_FEATURE);
                    store_row(sums[s][p] + half * 2, out + row_at, residual + row_at, feature, end);
                }
    }
}

// `out` and `residual`, which is read only where it is added to, are [num_tokens, num_features]. The maps are of x and of the
// weight as [K, 8, gates or ups, F / 8], or [K, 8, 1, N / 8], innermost first.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map, u16 *out,
        const u16 *residual, int num_tokens, int num_features, int in_features, int tiles_in_l2) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[STAGES], empty[STAGES];
    Ring ring = {(shared_address(memory) + ATOM_BYTES - 1) & ~(ATOM_BYTES - 1), shared_address(full), shared_address(empty)};
    constexpr int TOKENS_OF_CLUSTER = TOKENS * WEIGHT_SHARES, FEATURES_OF_CLUSTER = FEATURES * TOKEN_SHARES;
    Tiles tiles = {(num_tokens + TOKENS_OF_CLUSTER - 1) / TOKENS_OF_CLUSTER,
                   (num_features + FEATURES_OF_CLUSTER - 1) / FEATURES_OF_CLUSTER, tiles_in_l2,
                   max(0, num_tokens - TOKENS)};
    int num_steps = (in_features + STEP - 1) / STEP;
    int first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int rank = rank_in_cluster();
    int warp_group = __shfl_sync(~0u, threadIdx.x / WARP_GROUP, 0);

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            begin_barrier(ring.full + stage * sizeof(u64), 1);
            begin_barrier(ring.empty + stage * sizeof(u64), NUM_RELEASES);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    wait_for_cluster();
    if (warp_group == 0) {
        if (MOVES_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(ring, Producer{x_map, weight_map, rank, num_tokens}, tiles, first, stride, num_steps);
    } else {
        if (MOVES_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(ring, tiles, out, residual, num_tokens, num_features, warp_group - 1, rank, first, stride, num_steps);
    }
    // One thread of a warp has fetched, and the barrier takes whole warps.
    __syncwarp();
    // Neighbours may still arrive at this program's barriers.
    wait_for_cluster();
}
