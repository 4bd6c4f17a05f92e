// Products for few rows, from the weight as it lies. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// ---- lanes along the contraction: a row or a few, where reading the weight is all there is to do ----

template <class I, class Unit, bool WHOLE>
inline typename I::U units_along(const Dot& d, const Matrix& m, int64_t row, int64_t k) {
    if constexpr (WHOLE) return I::load_units(static_cast<const char*>(m.data) + (row * m.ld + k) * (4 / Unit::unit));
    return Unit::along(m, row, k, d.depth - k, Keep{});
}

template <class I, class Unit, bool WHOLE, int ROWS, int COLUMNS>
inline void dot_step(const Dot& d, int64_t row, int64_t column, int64_t k, typename I::F (&acc)[ROWS][COLUMNS]) {
    using U = typename I::U;
    U right[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) right[j] = units_along<I, Unit, WHOLE>(d, d.w, column + j, k);
    for (int i = 0; i < ROWS; ++i) {
        const U left = units_along<I, Unit, WHOLE>(d, d.x, row + i, k);
        for (int j = 0; j < COLUMNS; ++j) acc[i][j] = Unit::mac(acc[i][j], left, right[j]);
    }
}

template <class I, class Unit, bool NATIVE, int ROWS, int COLUMNS>
void dot_of(const Dot& d, int64_t row, int64_t column) {
    using F = typename I::F;
    constexpr int STEP = I::W * Unit::unit;
    F acc[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) acc[i][j] = I::zero();
    }
    int64_t k = 0;
    if constexpr (NATIVE) {
        for (; k + STEP <= d.depth; k += STEP) dot_step<I, Unit, true>(d, row, column, k, acc);
    }
    for (; k < d.depth; k += STEP) dot_step<I, Unit, false>(d, row, column, k, acc);
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) d.out[(row + i) * d.out_ld + column + j] = I::sum(acc[i][j]);
    }
}

template <class I, class Unit, bool NATIVE>
void dot_all(const Dot& d) {
    // Four rows of w at a time stay in the first cache while all rows of x pass by.
    for (int64_t column = 0; column < d.columns; column += 4) {
        const bool four = d.columns - column >= 4;
        int64_t row = 0;
        for (; four && row + 4 <= d.rows; row += 4) dot_of<I, Unit, NATIVE, 4, 4>(d, row, column);
        for (; row < d.rows; ++row) {
            if (four) {
                dot_of<I, Unit, NATIVE, 1, 4>(d, row, column);
            } else {
                for (int64_t c = column; c < d.columns; ++c) dot_of<I, Unit, NATIVE, 1, 1>(d, row, c);
            }
        }
    }
}

// ---- lanes along the rows of x: no sums over lanes at the end, and each unit of w is read once for all of them ----

// One unit of COLUMNS rows of w times the rows of x; SIZE bytes of it are there.
template <class I, class Unit, int SIZE, int COLUMNS, int VECTORS>
inline void rows_in_lanes_step(const uint32_t* left, const char* const (&w)[COLUMNS], int64_t at,
                               typename I::F (&acc)[COLUMNS][VECTORS]) {
    using U = typename I::U;
    U rows[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) rows[v] = I::load_units(left + v * I::W);
#pragma GCC unroll 16
    for (int j = 0; j < COLUMNS; ++j) {
        uint32_t unit = 0;
        __builtin_memcpy(&unit, w[j] + at, SIZE);
        const U right = I::broadcast(&unit);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[j][v] = Unit::mac(acc[j][v], right, rows[v]);
    }
}

template <int COLUMNS, int VECTORS, class I>
inline void add_to(typename I::F (&sums)[COLUMNS][VECTORS], const typename I::F (&more)[COLUMNS][VECTORS]) {
    for (int j = 0; j < COLUMNS; ++j) {
        for (int v = 0; v < VECTORS; ++v) sums[j][v] = I::add(sums[j][v], more[j][v]);
    }
}

template <class I, class Unit, int COLUMNS, int VECTORS>
void rows_in_lanes_of(const Dot& d, int64_t column) {
    using F = typename I::F;
    constexpr int W = I::W;
    constexpr int SIZE = 4 / Unit::unit;
    F acc[COLUMNS][VECTORS];
    const char* w[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) {
        for (int v = 0; v < VECTORS; ++v) acc[j][v] = I::zero();
        w[j] = static_cast<const char*>(d.w.data) + (column + j) * d.w.ld * SIZE;
    }
    const int64_t whole = d.depth / Unit::unit;
    const uint32_t* left = d.x_panel;
    F ended[COLUMNS][VECTORS];
    for (int64_t first = 0; first < whole; first += float_chain) {
        const int64_t end = Unit::unit == 2 || whole - first < float_chain ? whole : first + float_chain;
        for (int64_t u = first; u < end; ++u, left += VECTORS * W) rows_in_lanes_step<I, Unit, 4>(left, w, 4 * u, acc);
        if (end == whole) {
            if (first > 0) add_to<COLUMNS, VECTORS, I>(acc, ended);
            break;
        }
        if (first > 0) add_to<COLUMNS, VECTORS, I>(ended, acc);
        for (int j = 0; j < COLUMNS; ++j) {
            for (int v = 0; v < VECTORS; ++v) {
                if (first == 0) ended[j][v] = acc[j][v];
                acc[j][v] = I::zero();
            }
        }
    }
    // Half a pair: what lies behind the row is not read.
    if (whole * Unit::unit < d.depth) rows_in_lanes_step<I, Unit, SIZE>(left, w, 4 * whole, acc);
    for (int j = 0; j < COLUMNS; ++j) {
        alignas(64) float sums[VECTORS * W];
        for (int v = 0; v < VECTORS; ++v) I::store(sums + v * W, acc[j][v]);
        for (int64_t i = 0; i < d.rows; ++i) d.out[i * d.out_ld + column + j] = sums[i];
    }
}

template <class I, class Unit, int VECTORS, int COLUMNS>
void rows_in_lanes(const Dot& d, int64_t column) {
    if constexpr (COLUMNS > 1) {
        if (d.columns - column < COLUMNS) return rows_in_lanes<I, Unit, VECTORS, COLUMNS - 1>(d, column);
    }
    rows_in_lanes_of<I, Unit, COLUMNS, VECTORS>(d, column);
}

template <class I, class Unit>
void dot(const Dot& d) {
    const bool native = has_units<Unit>(d.w.dtype);
    if (d.x_panel != nullptr && native) {
        for (int64_t column = 0; column < d.columns; column += I::MAX_ROWS) {
            d.rows <= I::W ? rows_in_lanes<I, Unit, 1, I::MAX_ROWS>(d, column) : rows_in_lanes<I, Unit, 2, I::MAX_ROWS>(d, column);
        }
    } else if (native && has_units<Unit>(d.x.dtype)) {
        dot_all<I, Unit, true>(d);
    } else {
        dot_all<I, Unit, false>(d);
    }
}

}  // namespace
}  // namespace hlk
