// Panels of weights and of paths, and the products of which forward and backward are made.
#pragma once

#include "workspace.h"

namespace hlk {

// The packed weights of a call, one per output: the caller's, or made now; nullptr where none is needed.
std::vector<const uint32_t*> weight_panels(const Group& g, bool for_forward, Slots& slots, const Parallel& parallel);

// Writes the lanes of a path into the panels [panel][units(lanes)][columns] of its output (lora_B, whose lanes run along a row)
// or its source (lora_A, whose lanes are its rows). Closed rows (gate 0) become zero: their numbers may be anything.
void pack_path(const Engine& engine, const Path& path, Matrix parameter, bool along_rows, int64_t columns, int64_t first_lane,
               int64_t lanes, uint32_t* panels);

// The base product for few rows, from the weight as it lies, in float32.
// out[row][c] = sum_k strip[k][row] w[k][c]; the engine's strips are coefficients.
void few_along_columns(const Engine& engine, const uint32_t* strip, int64_t rows, Matrix w, int64_t columns, int64_t depth,
                       float* out, int64_t out_ld, bool accumulate = false);

// The rows of a matrix that can be read in place.
inline Left in_place(Matrix source) {
    return {static_cast<const uint32_t*>(source.data), source.ld * size_of(source.dtype)};
}

// Rows of strips times a narrow panel [units][width], width a multiple of a vector, into float32 [rows][width].
void strip_product(const Engine& engine, Left left, int64_t rows, const uint32_t* panel, int64_t width, int64_t units, float* out);

}  // namespace hlk
