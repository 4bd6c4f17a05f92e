// Strips and panels from matrices of any dtype. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// Vectors of a row between its read and its prefetch.
constexpr int64_t pack_ahead = 4;

template <class I, class Unit>
void pack_rows(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out, int64_t stride) {
    using U = typename I::U;
    constexpr int W = I::W;
    const int64_t units = (depth + Unit::unit - 1) / Unit::unit;
    // Where units follow each other without a gap, whole vectors are stored: what is too much the next unit overwrites. Stores of
    // a part of a vector cost several times as much. The last vectors must not touch what lies behind.
    const int64_t spilling = rows == stride && rows < W ? units - (W + stride - 1) / stride : 0;
    for (int64_t row = 0; row < rows; row += W) {
        const int64_t here = rows - row < W ? rows - row : W;
        for (int64_t u = 0; u < units; u += W) {
            U block[W];
            for (int64_t i = 0; i < here; ++i) {
                block[i] = Unit::along(source, row + i, u * Unit::unit, depth - u * Unit::unit, keep);
                __builtin_prefetch(source.at(row + i, (u + pack_ahead * W) * Unit::unit).data);
            }
            for (int64_t i = here; i < W; ++i) block[i] = I::zero_units();
            I::transpose(block);
            const int64_t count = units - u < W ? units - u : W;
            uint32_t* to = out + u * stride + row;
            const int64_t whole = here == W ? count : spilling - u < 0 ? 0 : spilling - u < count ? spilling - u : count;
            for (int64_t i = 0; i < whole; ++i) I::store_units(to + i * stride, block[i]);
            for (int64_t i = whole; i < count; ++i) I::store_units(to + i * stride, block[i], here);
        }
    }
}

// A unit of W columns, of which `count` are wanted; contraction `depth`, of which unit u counts rows. A vector may reach into the rows
// behind its own, not behind the last of `columns` in all.
template <class I, class Unit>
inline typename I::U unit_of_columns(Matrix source, int64_t depth, int64_t columns, int64_t u, int64_t column) {
    using F = typename I::F;
    const int64_t count = columns - column < I::W ? columns - column : I::W, end = (depth - 1) * source.ld + columns;
    auto load = [&](int64_t row) -> F {
        if (row >= depth) return I::zero();
        const int64_t first = row * source.ld + column;
        return first + I::W <= end ? load_floats<I>(source.data, source.dtype, first)
                                   : load_some<I>(source.data, source.dtype, first, count);
    };
    if constexpr (Unit::unit == 2) return I::pairs(load(2 * u), load(2 * u + 1));
    if constexpr (Unit::unit == 1) return I::as_units(load(u));
}

template <class I, class Unit>
void pack_columns(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride) {
    using U = typename I::U;
    constexpr int W = I::W;
    const int64_t units = (depth + Unit::unit - 1) / Unit::unit;
    for (int64_t u = 0; u < units; ++u) {
        uint32_t* to = out + u * stride;
        int64_t column = 0;
        if constexpr (Unit::unit == 2) {
            if (source.dtype == DType::bf16 && 2 * u + 1 < depth) {
                auto* even = static_cast<const uint16_t*>(source.data) + 2 * u * source.ld;
                for (; column + 2 * W <= columns; column += 2 * W) {
                    U low, high;
                    I::interleave(even + column, even + source.ld + column, low, high);
                    I::store_units(to + column, low);
                    I::store_units(to + column + W, high);
                }
            }
        }
        for (; column < columns; column += W) {
            const int64_t count = columns - column < W ? columns - column : W;
            const U value = unit_of_columns<I, Unit>(source, depth, columns, u, column);
            if (count == W) {
                I::store_units(to + column, value);
            } else {
                I::store_units(to + column, value, count);
            }
        }
    }
}

template <class I, class Unit>
void pack_transposed(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride) {
    using U = typename I::U;
    constexpr int W = I::W;
    const int64_t units = (depth + Unit::unit - 1) / Unit::unit;
    for (int64_t column = 0; column < columns; column += W) {
        const int64_t here = columns - column < W ? columns - column : W;
        for (int64_t u = 0; u < units; u += W) {
            const int64_t count = units - u < W ? units - u : W;
            U block[W];
            for (int64_t i = 0; i < W; ++i) {
                block[i] = i < count ? unit_of_columns<I, Unit>(source, depth, columns, u + i, column) : I::zero_units();
            }
            I::transpose(block);
            for (int64_t i = 0; i < here; ++i) {
                uint32_t* to = out + (column + i) * stride + u;
                if (count == W) {
                    I::store_units(to, block[i]);
                } else {
                    I::store_units(to, block[i], count);
                }
            }
        }
    }
}

// Strips are [units][rows].
template <class I, class Unit>
void pack_strip(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out) {
    pack_rows<I, Unit>(source, keep, rows, depth, out, rows);
}

template <class I, class Unit>
void pack_panel_rows(Matrix source, int64_t rows, int64_t depth, uint32_t* out, int64_t stride) {
    pack_rows<I, Unit>(source, Keep{}, rows, depth, out, stride);
}

// Coefficients are [units of rows][lanes]: a strip is also the coefficients of its rows.
template <class I, class Unit>
void pack_coefficients(Matrix source, int64_t rows, int64_t first, int64_t count, uint32_t* out, int64_t lanes) {
    pack_columns<I, Unit>(source, rows, count, out + first, lanes);
}

}  // namespace
}  // namespace hlk
