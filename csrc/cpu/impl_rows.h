// Rows of few columns: in another dtype, and sums over them. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

template <class I>
void convert(const Convert& c) {
    using F = typename I::F;
    constexpr int W = I::W;
    for (int64_t column = 0; column < c.columns; column += W) {
        const int64_t count = c.columns - column < W ? c.columns - column : W;
        F factor = I::zero();
        uint64_t kept = 0;
        if (c.factor != nullptr) {
            factor = load_up_to<I>({c.factor, DType::f32, 0}, 0, column, count);
            for (int64_t j = 0; j < count; ++j) kept |= static_cast<uint64_t>(c.factor[column + j] != 0.0f) << j;
        }
        for (int64_t row = 0; row < c.rows; ++row) {
            F value = load_up_to<I>(c.from, row, column, count);
            if (c.factor != nullptr) value = I::keep(I::mul(value, factor), kept);
            store_up_to<I>(c.out, c.out_dtype, row * c.out_ld + column, count, value);
        }
    }
}

template <class I>
void moments(const Moments& m) {
    using F = typename I::F;
    constexpr int W = I::W;
    for (int64_t column = 0; column < m.columns; column += W) {
        const int64_t count = m.columns - column < W ? m.columns - column : W;
        F h_sq = load_up_to<I>({m.h_sq, DType::f32, 0}, 0, column, count), qh = load_up_to<I>({m.qh, DType::f32, 0}, 0, column, count);
        for (int64_t row = 0; row < m.rows; ++row) {
            const F h = load_up_to<I>(m.h, row, column, count), q = load_up_to<I>({m.q, DType::f32, m.q_ld}, row, column, count);
            h_sq = I::fma(h, h, h_sq);
            qh = I::fma(q, h, qh);
        }
        store_some<I>(m.h_sq, DType::f32, column, count, h_sq);
        store_some<I>(m.qh, DType::f32, column, count, qh);
    }
}

}  // namespace
}  // namespace hlk
