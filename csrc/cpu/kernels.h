// Building blocks of the CPU backend, once per instruction set: what they compute and in which layout.
//
// Everything is written in *units* of 32 bits: one float, or a pair of neighbouring bf16 values along the contraction. Both
// have the same geometry, so one GEMM serves both; only packing and the multiply-accumulate instruction differ.
//
//   panel         [units][columns]  columns of the right operand, unit by unit
//   strip         at most `max_rows` rows of the left operand, in the engine's own layout
//   coefficients  the left operand of an outer product, in the engine's own layout
//
// An engine may pad units and rows (`unit_step`, `row_step`): padding is zero in panels, strips and coefficients.
// Kernels see pointers, sizes and strides, never torch.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace hlk {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

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

// Rows of a left operand: a strip, or the matrix itself where its rows are units as they lie.
struct Left {
    const uint32_t* data = nullptr;
    int64_t row_bytes = 0;   // between rows of the matrix; 0: a strip
};

// One product of the accumulator: rows a of the tile times panel b.
struct Segment {
    Left a;
    const uint32_t* b;
    int64_t b_stride;
    int64_t units;
    // What is read next, fetched into the second cache while the units pass by: where, and bytes per unit.
    const char* next = nullptr;
    int64_t next_step = 0;

    // Bytes shared out among `tiles` that read this panel.
    void fetch(const void* from, int64_t bytes, int64_t tiles) {
        next = static_cast<const char*>(from);
        next_step = bytes / (tiles * (units > 0 ? units : 1));
    }
    void fetch_next_panel(int64_t tiles) { fetch(b + b_stride * units, 4 * b_stride * units, tiles); }
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

// out[count, columns] = sum over rows m of coef[m][j] * keep(u)[m][c]; coef holds `lanes` coefficients of each row, of which the
// first `count` are used.
struct Outer {
    int count = 0;
    int columns = 0;
    int64_t rows = 0;
    const uint32_t* coef = nullptr;
    int64_t lanes = 0;
    Matrix u;
    Keep keep;
    float* out = nullptr;
    int64_t out_ld = 0;
    bool accumulate = false;   // add to what stands in out
};

// out[rows, columns] = sum_k keep(x)[row][k] w[column][k], both row-major as they lie: for few rows, or few columns. Each sum depends on
// its row and its column alone.
struct Dot {
    int64_t rows = 0, columns = 0, depth = 0;
    Matrix x, w;                         // w in x's dtype or in the units' own
    Keep keep;                           // of x, where w has the units' dtype
    const uint32_t* x_panel = nullptr;   // x as a panel of whole vectors of rows, at most 16; nullptr: there is none
    float* out = nullptr;
    int64_t out_ld = 0;
};

// out[rows, columns] = from * factor, in another dtype. A factor of 0 gives 0, whatever it multiplies.
struct Convert {
    int64_t rows = 0, columns = 0;
    Matrix from;
    const float* factor = nullptr;       // [columns]; nullptr: the values as they are
    void* out = nullptr;
    DType out_dtype = DType::f32;
    int64_t out_ld = 0;
};

// Adds the sums over rows of h^2 and of q h, column by column.
struct Moments {
    int64_t rows = 0, columns = 0;
    Matrix h;
    const float* q = nullptr;
    int64_t q_ld = 0;
    float *h_sq = nullptr, *qh = nullptr;   // [columns]
};

// One row of a gradient from its sums, with its statistics.
struct Merge {
    const float* sums = nullptr;       // [size]
    int64_t size = 0;
    float scale = 1.0f, gate = 1.0f;
    Matrix parameter;                  // one row
    void* grad = nullptr;              // the parameter's dtype; nullptr: not wanted
    bool statistics = false;
    float squares = 0, abs_products = 0, products_sq = 0;
};

// Columns of a gradient [size, count] from sums that lie the other way round, with their statistics; as many as a vector has lanes at
// most.
struct MergeColumns {
    const float* sums = nullptr;       // [count][size]
    int64_t size = 0;
    int count = 0;
    float scale = 1.0f;
    const float* gate = nullptr;       // [count]
    Matrix parameter;                  // [size, count]
    void* grad = nullptr;              // the parameter's dtype; nullptr: not wanted
    int64_t grad_ld = 0;
    bool statistics = false;
    float *squares = nullptr, *abs_products = nullptr, *products_sq = nullptr;   // [count]
};

// Up to this many rows a weight is read where it lies: packing it would cost more than the product.
constexpr int64_t few_rows = 16;
// With more rows than this they are worth being the lanes of a vector.
constexpr int64_t rows_worth_lanes = 4;

// No instruction set has more columns in a vector.
constexpr int max_lanes = 16;

// The kernels of one instruction set for one kind of unit.
struct Engine {
    const char* name;
    int unit;        // elements of the contraction in a unit: 1 (float) or 2 (pair of bf16)
    int lanes;       // columns of a vector
    int max_rows;    // of a strip
    int tile_rows;   // of a tile: those of a strip, or of several strips that follow each other
    int block_rows;  // of a block whose strips stay in the second cache of a core
    int row_step;    // rows of a strip and lanes of coefficients are padded to a multiple of this
    int unit_step;   // units of a contraction are padded to a multiple of this
    bool row_tiles;  // left operands may be rows of a matrix
    bool row_dots;   // products with few lanes are dots of rows; else tiles of strips
    // a strip of `rows` rows, padding included; rows whose contraction runs along the row
    void (*pack_strip)(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out);
    // columns of a panel from rows whose contraction runs along the row: out[u * stride + row]
    void (*pack_rows)(Matrix source, int64_t rows, int64_t depth, uint32_t* out, int64_t stride);
    // columns of a panel from rows along which the contraction does not run: out[u * stride + column], u counts rows
    void (*pack_columns)(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride);
    // columns of a matrix as rows along which the contraction runs: out[column * stride + u], u counts rows
    void (*pack_transposed)(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride);
    // coefficients first ... first + count - 1 of `lanes` from the columns of a matrix
    void (*pack_coefficients)(Matrix source, int64_t rows, int64_t first, int64_t count, uint32_t* out, int64_t lanes);
    void (*tile)(const Tile& tile);
    void (*outer)(const Outer& outer);
    void (*dot)(const Dot& dot);
    void (*convert)(const Convert& convert);
    void (*moments)(const Moments& moments);
    // to += from; `count` is a multiple of max_lanes
    void (*add)(float* to, const float* from, int64_t count);
    void (*merge)(Merge& merge);
    void (*merge_columns)(const MergeColumns& merge);
    // bits of `columns` draws of row `row`, 8 columns a byte
    void (*keep_bits)(uint64_t key, uint32_t row, uint32_t source, int64_t columns, uint32_t threshold, uint8_t* out);
    // around all calls of `tile` and `outer` by one thread; nullptr: nothing to do
    void (*begin)();
    void (*end)();

    int64_t units(int64_t depth) const { return padded((depth + unit - 1) / unit, unit_step); }
    int64_t strip_rows(int64_t rows) const { return padded(rows, row_step); }
    int64_t coefficient_units(int64_t rows, int64_t lanes) const { return units(rows) * padded(lanes, row_step); }
    int panel() const { return 2 * lanes; }
    DType dtype() const { return unit == 2 ? DType::bf16 : DType::f32; }

    // Whether rows of a matrix can be read where they lie: packing them costs 2 to 4 % of a product. Not where rows lie whole pages
    // apart: they would push each other out of the first cache.
    bool reads_in_place(Matrix source, int64_t depth) const {
        const int64_t apart = source.ld * size_of(source.dtype) % 4096;
        return row_tiles && source.dtype == dtype() && depth % unit == 0 && apart >= 64 &&
               apart <= 4032;
    }

private:
    static int64_t padded(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
};

// What an engine needs of the thread that runs it, for the length of a scope. Scopes of a thread nest: the outermost begins and ends.
class EngineScope {
public:
    explicit EngineScope(const Engine& engine) : engine_(engine) {
        if (depth()++ == 0 && engine_.begin != nullptr) engine_.begin();
    }
    ~EngineScope() {
        if (--depth() == 0 && engine_.end != nullptr) engine_.end();
    }
    EngineScope(const EngineScope&) = delete;
    EngineScope& operator=(const EngineScope&) = delete;

private:
    static int& depth() {
        thread_local int depth = 0;
        return depth;
    }

    const Engine& engine_;
};

// The instruction sets from the plainest to the most capable; the last computes what amx_bf16 computes without its tiles.
enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4, amx_bf16_emulated = 5 };
constexpr int num_isas = 6;

const char* isa_name(Isa isa);
// nullptr where this machine and this build have it, else the reason.
const char* isa_missing(Isa isa);
// The most capable that this machine and this build have; never the emulated one.
Isa best_isa();
// The engine of an instruction set for inputs of a dtype and a number of rows.
const Engine& engine_for(Isa isa, DType dtype, int64_t rows);

}  // namespace hlk
