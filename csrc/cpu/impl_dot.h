// Products for few rows or few columns, from matrices as they lie. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// ---- lanes along the contraction: what reads each row once ----

// W units of a row of dtype D from element k on; all of them are there.
template <class I, class Unit, DType D>
inline typename I::U whole_units(const void* row, int64_t k) {
    if constexpr (Unit::unit == 1) return I::as_units(load_floats<I, D>(row, k));
    if constexpr (Unit::unit == 2 && D == DType::bf16) return I::load_units(static_cast<const uint16_t*>(row) + k);
    if constexpr (Unit::unit == 2 && D != DType::bf16) {
        return I::pairs_along(load_floats<I, D>(row, k), load_floats<I, D>(row, k + I::W));
    }
}

template <class I, class Unit>
inline typename I::U keep_units(typename I::U units, const uint8_t* bits, int64_t k, int64_t count) {
    const uint64_t kept = bits_at(bits, k, count);
    if constexpr (Unit::unit == 2) return I::keep_halves(units, kept);
    if constexpr (Unit::unit == 1) return I::as_units(I::keep(I::as_floats(units), kept));
}

// ROWS x 4 sums. Rows and columns that are not there repeat the last one.
template <class I, class Unit, DType X, DType W, bool KEEP, int ROWS>
void dot_of(const Dot& d, int64_t row, int64_t column) {
    using U = typename I::U;
    constexpr int STEP = I::W * Unit::unit;
    const void *x[ROWS], *w[4];
    const uint8_t* bits[ROWS];
    typename I::F acc[ROWS][4];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
        const int64_t at = row + i < d.rows ? row + i : d.rows - 1;
        x[i] = d.x.at(at, 0).data;
        bits[i] = KEEP ? d.keep.bits + at * d.keep.ld : nullptr;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = d.w.at(column + j < d.columns ? column + j : d.columns - 1, 0).data;
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = I::zero();
    }
    const int64_t ahead = ROWS * d.x.ld * size_of(X);
    int64_t k = 0;
    for (; k + STEP <= d.depth; k += STEP) {
        U right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) right[j] = whole_units<I, Unit, W>(w[j], k);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            U left = whole_units<I, Unit, X>(x[i], k);
            // Rows are shorter than what the hardware needs to run ahead: the same place of the next rows.
            __builtin_prefetch(static_cast<const char*>(x[i]) + ahead + k * size_of(X));
            if constexpr (KEEP) left = keep_units<I, Unit>(left, bits[i], k, STEP);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) acc[i][j] = Unit::mac(acc[i][j], left, right[j]);
        }
    }
    if (k < d.depth) {
        const int64_t rest = d.depth - k;
        U right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) right[j] = Unit::along({w[j], W, 0}, 0, k, rest, Keep{});
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const U left = Unit::along({x[i], X, 0}, 0, k, rest, Keep{bits[i], 0});
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) acc[i][j] = Unit::mac(acc[i][j], left, right[j]);
        }
    }
    alignas(64) float sums[ROWS * 4];
    if constexpr (ROWS == 4) {
        I::store(sums, I::sums(acc));
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[4 * i + j] = I::sum(acc[i][j]);
        }
    }
    for (int i = 0; i < ROWS && row + i < d.rows; ++i) {
        float* out = d.out + (row + i) * d.out_ld + column;
        for (int j = 0; j < 4 && column + j < d.columns; ++j) out[j] = sums[4 * i + j];
    }
}

template <class I, class Unit, DType X, DType W, bool KEEP>
void dot_all(const Dot& d) {
    // Four rows of w at a time stay in the first cache while all rows of x pass by.
    for (int64_t column = 0; column < d.columns; column += 4) {
        int64_t row = 0;
        for (; d.rows - row > 1; row += I::DOT_ROWS) dot_of<I, Unit, X, W, KEEP, I::DOT_ROWS>(d, row, column);
        if (row < d.rows) dot_of<I, Unit, X, W, KEEP, 1>(d, row, column);
    }
}

template <class I, class Unit, DType X>
void dot_from(const Dot& d) {
    constexpr DType own = Unit::unit == 2 ? DType::bf16 : DType::f32;
    if (d.w.dtype != own) return dot_all<I, Unit, X, X, false>(d);
    d.keep.bits == nullptr ? dot_all<I, Unit, X, own, false>(d) : dot_all<I, Unit, X, own, true>(d);
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
    if (d.x_panel != nullptr && has_units<Unit>(d.w.dtype)) {
        for (int64_t column = 0; column < d.columns; column += I::MAX_ROWS) {
            d.rows <= I::W ? rows_in_lanes<I, Unit, 1, I::MAX_ROWS>(d, column) : rows_in_lanes<I, Unit, 2, I::MAX_ROWS>(d, column);
        }
        return;
    }
    switch (d.x.dtype) {
        case DType::f32: return dot_from<I, Unit, DType::f32>(d);
        case DType::bf16: return dot_from<I, Unit, DType::bf16>(d);
        default: return dot_from<I, Unit, DType::f16>(d);
    }
}

}  // namespace
}  // namespace hlk
