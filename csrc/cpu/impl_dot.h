// Products for few rows, from the weight as it lies. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

template <class I, class Unit, int ROWS, int COLUMNS>
void dot_of(const Dot& d, int64_t row, int64_t column) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int STEP = I::W * Unit::unit;
    F acc[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) acc[i][j] = I::zero();
    }
    for (int64_t k = 0; k < d.depth; k += STEP) {
        U right[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) right[j] = Unit::along(d.w, column + j, k, d.depth - k, Keep{});
        for (int i = 0; i < ROWS; ++i) {
            const U left = Unit::along(d.x, row + i, k, d.depth - k, Keep{});
            for (int j = 0; j < COLUMNS; ++j) acc[i][j] = Unit::mac(acc[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) d.out[(row + i) * d.out_ld + column + j] = I::sum(acc[i][j]);
    }
}

template <class I, class Unit, int ROWS>
void dot_rows(const Dot& d, int64_t row) {
    int64_t column = 0;
    for (; column + 4 <= d.columns; column += 4) dot_of<I, Unit, ROWS, 4>(d, row, column);
    for (; column < d.columns; ++column) dot_of<I, Unit, ROWS, 1>(d, row, column);
}

template <class I, class Unit>
void dot(const Dot& d) {
    // Four rows of w at a time stay in the first cache while all rows of x pass by.
    for (int64_t first = 0; first < d.columns; first += 4) {
        Dot part = d;
        part.columns = d.columns - first < 4 ? d.columns - first : 4;
        part.w = d.w.at(first, 0);
        part.out = d.out + first;
        int64_t row = 0;
        for (; row + 4 <= d.rows; row += 4) dot_rows<I, Unit, 4>(part, row);
        for (; row < d.rows; ++row) dot_rows<I, Unit, 1>(part, row);
    }
}

}  // namespace
}  // namespace hlk
