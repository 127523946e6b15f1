// What Python hands over: plain structs of pointers and sizes, mirrored field by field in `library.py`.
//
// A model is data: a table of layers. All memory belongs to the caller. Matrices are packed (`panel.h`); norms, biases
// and rope tables are floats. Biases and norms over hidden or intermediate features are padded with zeros to a multiple
// of 64, those of gate and up interleaved like their rows.
#pragma once

#include <cstdint>

extern "C" {

struct TriodeMatrix {
    const uint32_t* panels;
    const float* bias;    // or null
    const float* scales;  // one an output, padded like a bias, if the format is CHANNEL8; or null
    int64_t out_features;
    int64_t in_features;
    int64_t format;       // a `FormatName` of `grouped.h`
    int64_t group;        // inputs that share a scale, if the format has groups; 0: all
    int64_t byte_inputs;  // whether rows are rounded to bytes, group by group, before they are multiplied
};

struct TriodeLayer {
    const float* input_norm;
    const float* post_norm;
    const float* q_norm;  // of one head, or null
    const float* k_norm;
    TriodeMatrix qkv;
    TriodeMatrix o;
    TriodeMatrix gate_up;
    TriodeMatrix down;
    int64_t window_tokens;  // 0: a query sees all positions
};

// The processes that share a model, and their shared memory (`ranks.h`).
struct TriodeRanks {
    int64_t rank;
    int64_t num_ranks;
    int64_t max_tokens;  // of a step
    void* arrivals;      // [num_ranks][64 bytes], zero at first
    void* sums;          // [2][num_ranks][max_tokens][padded hidden] floats
};

struct TriodeModel {
    int64_t is_bf16;  // weights, cache and hidden states; otherwise float32
    int64_t vocab_size;
    int64_t hidden_size;
    int64_t intermediate_size;
    int64_t num_layers;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t num_positions;  // rows of `cos` and `sin`, each head_dim / 2 floats
    double norm_eps;
    TriodeMatrix embedding;  // what it is multiplied with counts for nothing
    const float* final_norm;
    const float* cos;
    const float* sin;
    const TriodeLayer* layers;
    TriodeMatrix head;
    int64_t num_outputs;       // of the head: the vocabulary, or this rank's part of it
    const TriodeRanks* ranks;  // null if nobody shares the model, whose heads and inner features are all here then
};

// T query tokens packed row after row, R rows, C blocks in the longest table. Hidden states are wanted of W tokens,
// which are the last ones of their rows.
struct TriodeBatch {
    int64_t num_tokens;
    int64_t num_rows;
    int64_t table_columns;
    int64_t block_size_tokens;
    int64_t num_blocks;
    int64_t kv_is_int8;           // the cache holds signed bytes with scales (`kv.h`); otherwise numbers like the weights
    const int64_t* token_ids;     // [T]
    const int64_t* positions;     // [T]: what the rotary embedding rotates by
    const int64_t* slots;         // [T]: block * block size + offset, where key and value are stored
    const int64_t* query_start;   // [R + 1]
    const int64_t* start;         // [R]: the position in the cache of a row's first query token
    const int64_t* block_table;   // [R, C]
    void* const* keys;            // each layer's [blocks, block size, kv heads, head bytes]
    void* const* values;
    const int64_t* wanted_start;  // [R + 1]: where those that are wanted of a row begin among all W
    void* hidden;                 // out: [W, hidden_size]; worked with by an order
};

// A step to be computed in its turn, down to the likeliest tokens behind those that are wanted.
struct TriodeOrder {
    const TriodeModel* model;
    TriodeBatch batch;
    void* scratch;
    void* team;
    int64_t* positions;            // null; or the batch's, which are those of the order before this one, to be moved on by one,
    int64_t* start;                // as are the batch's starts, one for each token;
    int64_t* slots;                // the batch's, which follow from its block tables
    int64_t num_pending;           // query tokens that the order before this one finds
    int64_t* token_ids;            // those of the batch
    const int64_t* pending;        // [num_pending]: which of the batch's tokens
    const int64_t* sources;        // [num_pending]: which of `previous_tokens`
    const int64_t* previous_tokens;
    int64_t* tokens;               // out: [W], -1 where no token is possible
    int64_t* is_computed;          // out: 0 if an index of the batch is out of bounds
    double* seconds;               // out
};
}
