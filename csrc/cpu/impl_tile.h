// The register tile of the GEMM. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// The bias of a vector of columns; zeros where there is none.
template <class I>
inline typename I::F bias_of(const Tile& t, int64_t column) {
    if (t.bias.data == nullptr) return I::zero();
    const int64_t count = t.columns - column;
    return count >= I::W ? load_floats<I>(t.bias.data, t.bias.dtype, column)
                         : load_some<I>(t.bias.data, t.bias.dtype, column, count);
}

// Adds bias and base to a vector of sums, converts and stores it.
template <class I>
inline void finish_vector(const Tile& t, int64_t row, int64_t column, typename I::F sum, typename I::F bias) {
    const int64_t count = t.columns - column;
    const bool whole = count >= I::W;
    typename I::F value = I::add(sum, bias);
    if (t.base.data != nullptr) {
        const int64_t first = row * t.base.ld + column;
        value = I::add(value, whole ? load_floats<I>(t.base.data, t.base.dtype, first)
                                    : load_some<I>(t.base.data, t.base.dtype, first, count));
    }
    if (whole) {
        store_floats<I>(t.out, t.out_dtype, row * t.out_ld + column, value);
    } else {
        store_some<I>(t.out, t.out_dtype, row * t.out_ld + column, count, value);
    }
}

// Units after which a chain of float32 sums ends: what follows is summed from 0 and added. Every rounding is then relative to a
// part of the sum instead of all of it: the low-rank part, which comes first, would make each one as large as itself, and at a
// depth of 1100 the error was 6 times that of a plain matmul. Chains of 256 cost 2 % of the time. For products of bf16 one
// chain is far more exact than its operands.
constexpr int64_t float_chain = 384;

template <class I, class Unit, int ROWS, int VECTORS>
void tile_of(const Tile& t) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    constexpr bool CHAINS = Unit::unit == 1;
    F acc[ROWS][VECTORS], ended[ROWS][VECTORS];   // the sum is acc, plus the chains that ended
    bool any_ended = false;
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = I::zero();
    }
    for (int s = 0; s < t.num_segments; ++s) {
        const Segment segment = t.segments[s];
        const uint32_t* a = segment.a;
        const uint32_t* b = segment.b;
        for (int64_t left = segment.units; left > 0;) {
            const int64_t units = CHAINS && left > float_chain ? float_chain : left;
            for (int64_t u = 0; u < units; ++u) {
                U right[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) right[v] = I::load_units(b + v * W);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; ++i) {
                    const U left_unit = I::broadcast(a + i);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) acc[i][v] = Unit::mac(acc[i][v], left_unit, right[v]);
                }
                a += ROWS;
                b += segment.b_stride;
            }
            left -= units;
            if (CHAINS && (left > 0 || s + 1 < t.num_segments)) {
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) {
                        ended[i][v] = any_ended ? I::add(ended[i][v], acc[i][v]) : acc[i][v];
                        acc[i][v] = I::zero();
                    }
                }
                any_ended = true;
            }
        }
        if (s == 0 && t.keep.bits != nullptr) {
            for (int i = 0; i < ROWS; ++i) {
                const uint64_t bits = bits_at(t.keep.bits + i * t.keep.ld, 0, t.columns);
                for (int v = 0; v < VECTORS; ++v) {
                    acc[i][v] = I::keep(acc[i][v], bits >> (v * W));
                    if (any_ended) ended[i][v] = I::keep(ended[i][v], bits >> (v * W));
                }
            }
        }
    }
    for (int v = 0; v < VECTORS && v * W < t.columns; ++v) {
        const F bias = bias_of<I>(t, v * W);
        for (int i = 0; i < ROWS; ++i) {
            finish_vector<I>(t, i, v * W, any_ended ? I::add(ended[i][v], acc[i][v]) : acc[i][v], bias);
        }
    }
}

template <class I, class Unit, int ROWS>
void tile_rows(const Tile& t) {
    if constexpr (ROWS > 1) {
        if (t.rows < ROWS) return tile_rows<I, Unit, ROWS - 1>(t);
    }
    t.vectors == 1 ? tile_of<I, Unit, ROWS, 1>(t) : tile_of<I, Unit, ROWS, 2>(t);
}

template <class I, class Unit>
void tile(const Tile& t) {
    tile_rows<I, Unit, I::MAX_ROWS>(t);
}

}  // namespace
}  // namespace hlk
