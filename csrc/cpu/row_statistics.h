// The ledger's rows of accumulated gradients: per rank j sums over row j of A and column j of B.
#pragma once

#include "lora_linear.h"

namespace hlk {

// One path's parameters and gradients, contiguous: A [rank, in], B [out, rank]; all of one dtype.
struct PathGradients {
    const void *lora_A, *lora_B, *grad_A, *grad_B;
    DType dtype;
    int64_t rank, in, out;
    float* stats;   // [rank, num_stats_columns]
};

// Accumulates in float64 in a fixed order: the result does not depend on the number of threads.
void row_statistics(const PathGradients& path);

}  // namespace hlk
