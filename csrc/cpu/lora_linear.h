// Forward and backward of a group of linears with low-rank paths, from the kernels of one engine.
//
//   out_i = x W_i^T + bias_i + sum over paths p of i:  s_p ((drop(u_p) A_p^T) * gate_p) B_p^T
//
// M rows, K columns of x, N_i columns of output i. A path's source u_p is x (key -1) or sources[key]. Paths are described by
// the caller, which checks them and owns all memory; sizes are trusted here.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace hlk {

// Runs task(0) ... task(count - 1), in any order and on any threads, and returns when all are done.
struct Parallel {
    int threads;
    std::function<void(int64_t count, const std::function<void(int64_t)>& task)> run;
};

struct Weight {
    Matrix values;             // [N, K], or [K, N] where transposed
    bool transposed = false;
    const uint32_t* forward_pack = nullptr;
    const uint32_t* backward_pack = nullptr;
};

struct Output {
    int64_t columns = 0;       // N
    bool has_weight = false;   // lora_linear; without one: lora_delta, which adds to `base`
    Weight weight;
    Matrix bias;               // no data: none
    Matrix base;               // [M, N] of lora_delta
    void* out = nullptr;       // [M, N], forward
    Matrix grad_out;           // [M, N], backward; no data: nobody asked, zero
};

struct Source {
    Matrix values;             // [M, columns]
    int64_t columns = 0;
    Keep keep;                 // dropout's mask
    uint8_t* keep_out = nullptr;   // where the forward writes that mask
    void* grad = nullptr;      // [M, columns], backward; nullptr: not wanted
};

struct Path {
    int output = 0, source = 0;    // index into sources
    int64_t rank = 0, rows = 0;    // rows that are computed: none in a backward whose output has no grad_out
    Matrix lora_A, lora_B;         // [rank, columns of the source], [N, rank]
    float scaling = 0;
    const float* gate = nullptr;   // [rank]
    int64_t hidden_column = 0;
    void* grad_A = nullptr;        // the parameter's dtype, contiguous; nullptr: not wanted
    void* grad_B = nullptr;
    float* stats = nullptr;        // [rank, num_columns]; nullptr: not wanted
};

// The columns of stats, and their names in this order.
enum StatsColumn { hidden_sq, grad_A_sq, grad_B_sq, abs_A_grad_A, abs_B_grad_B, gate_grad, taylor_sq, num_stats_columns };
extern const char* const stats_columns[num_stats_columns];

struct Group {
    const Engine* engine = nullptr;
    DType dtype = DType::f32;
    int64_t rows = 0;              // M
    std::vector<Source> sources;   // sources[0] is x
    std::vector<Output> outputs;
    std::vector<Path> paths;
    void* hidden = nullptr;        // [M, hidden_ld], zeroed by the caller; nullptr: not wanted
    int64_t hidden_ld = 0;
    bool dropout = false;
    uint64_t dropout_key = 0;
    uint32_t dropout_threshold = 0;
    float dropout_scale = 1.0f;
    bool has_weights() const { return !outputs.empty() && outputs[0].has_weight; }
};

void forward(Group& group, const Parallel& parallel);
void backward(Group& group, const Parallel& parallel);

// Units of a packed weight: panels of `columns` over a contraction of `depth`.
int64_t packed_units(const Engine& engine, int64_t columns, int64_t depth);
// columns of the panels: N for the forward, K for the backward.
void pack_weight(const Engine& engine, const Weight& weight, int64_t out_features, int64_t in_features, bool for_forward,
                 uint32_t* out, const Parallel& parallel);

}  // namespace hlk
