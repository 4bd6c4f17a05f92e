// Building blocks of the CPU backend, once per instruction set: what they compute and in which layout.
//
// Everything is written in *units* of 32 bits: one float, or a pair of neighbouring bf16 values along the contraction. Both
// have the same geometry, so one GEMM serves both; only packing and the multiply-accumulate instruction differ.
//
//   strip  [units][rows]     at most `max_rows` rows of the left operand, unit by unit
//   panel  [units][columns]  columns of the right operand, unit by unit
//
// Kernels see pointers, sizes and strides, never torch.
#pragma once

#include <cstdint>

namespace hlk {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A row-major matrix of any of the dtypes: element (i, j) lies at i * ld + j.
struct Matrix {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t ld = 0;

    Matrix at(int64_t row, int64_t column) const {
        return {static_cast<const char*>(data) + (row * ld + column) * size_of(dtype), dtype, ld};
    }
};

// Which elements of a matrix are kept: bit c % 8 of byte c / 8 of each row. No bits: all of them.
struct Keep {
    const uint8_t* bits = nullptr;
    int64_t ld = 0;

    Keep at(int64_t row, int64_t column) const {
        return bits == nullptr ? Keep{} : Keep{bits + row * ld + column / 8, ld};
    }
};

// One product of the accumulator: sum over units of a[u][row] * b[u][column].
struct Segment {
    const uint32_t* a;
    int64_t a_stride;
    const uint32_t* b;
    int64_t b_stride;
    int64_t units;
};

// out[rows, columns] = init + sum of the segments, accumulated in float32 and converted at the store.
struct Tile {
    int rows = 0;
    int vectors = 2;     // width of the tile in vectors: 1 or 2
    int columns = 0;     // how many of them are stored
    const Segment* segments = nullptr;
    int num_segments = 0;
    Keep keep;           // zeroes the sum of the first segment where a bit is 0
    Matrix bias;         // one row, or no data
    Matrix base;         // [rows, columns], or no data
    void* out = nullptr;
    DType out_dtype = DType::f32;
    int64_t out_ld = 0;
};

// out[count, columns] = sum over rows m of coef[m][j] * keep(u)[m][c]; coef as units [ceil(rows / unit)][coef_stride].
struct Outer {
    int count = 0;
    int columns = 0;
    int64_t rows = 0;
    const uint32_t* coef = nullptr;
    int64_t coef_stride = 0;
    Matrix u;
    Keep keep;
    float* out = nullptr;
    int64_t out_ld = 0;
};

// out[rows, columns] = init + sum_k x[row][k] w[column][k], both row-major and not packed: for few rows.
struct Dot {
    int64_t rows = 0, columns = 0, depth = 0;
    Matrix x, w;
    float* out = nullptr;
    int64_t out_ld = 0;
};

// One row (or column) of a gradient from its partial sums, with its statistics.
struct Merge {
    const float* partials = nullptr;   // [blocks][size], at block_stride
    int64_t blocks = 0, block_stride = 0, size = 0;
    float scale = 1.0f, gate = 1.0f;
    Matrix parameter;                  // element i at i * parameter.ld
    void* grad = nullptr;              // the parameter's dtype, element i at i * grad_ld; nullptr: not wanted
    int64_t grad_ld = 0;
    bool statistics = false;
    float squares = 0, abs_products = 0, products_sq = 0;
};

// The kernels of one instruction set for one kind of unit.
struct Engine {
    const char* name;
    int unit;        // elements of the contraction in a unit: 1 (float) or 2 (pair of bf16)
    int lanes;       // columns of a vector
    int max_rows;    // of a strip and of a tile
    // strip or panel from rows whose contraction runs along the row: out[u * stride + row]
    void (*pack_rows)(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out, int64_t stride);
    // panel from rows along which the contraction does not run: out[u * stride + column], u counts rows
    void (*pack_columns)(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride);
    void (*tile)(const Tile& tile);
    void (*outer)(const Outer& outer);
    void (*dot)(const Dot& dot);
    void (*merge)(Merge& merge);
    // bits of `columns` draws of row `row`, 8 columns a byte
    void (*keep_bits)(uint64_t key, uint32_t row, uint32_t source, int64_t columns, uint32_t threshold, uint8_t* out);

    int64_t units(int64_t depth) const { return (depth + unit - 1) / unit; }
    int panel() const { return 2 * lanes; }
};

// The instruction sets from the plainest to the most capable.
enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int num_isas = 4;

const char* isa_name(Isa isa);
// nullptr where this machine and this build have it, else the reason.
const char* isa_missing(Isa isa);
// The engine of an instruction set for inputs of a dtype.
const Engine& engine_for(Isa isa, DType dtype);

}  // namespace hlk
