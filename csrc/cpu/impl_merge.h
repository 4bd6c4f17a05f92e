// Sums of two blocks, and gradients and statistics from those of all. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

template <class I>
struct MergeSums {
    using F = typename I::F;
    F squares, abs_products, products_sq;

    void clear() { squares = abs_products = products_sq = I::zero(); }
    void add(F parameter, F gradient) {
        const F product = I::mul(parameter, gradient);
        squares = I::fma(gradient, gradient, squares);
        abs_products = I::add(abs_products, I::abs(product));
        products_sq = I::fma(product, product, products_sq);
    }
};

template <class I>
void add(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += I::W) I::store(to + i, I::add(I::load(to + i), I::load(from + i)));
}

// Sums over elements go in vectors of W, so the result depends on the sizes alone.
template <class I>
void merge(Merge& m) {
    using F = typename I::F;
    constexpr int W = I::W;
    MergeSums<I> sums;
    sums.clear();
    const F scale = I::set1(m.scale), gate = I::set1(m.gate);
    for (int64_t i = 0; i < m.size; i += W) {
        const int64_t count = m.size - i;
        const F sum = I::mul(load_up_to<I>({m.sums, DType::f32, 0}, 0, i, count), scale);
        if (m.statistics) sums.add(load_up_to<I>(m.parameter, 0, i, count), sum);
        if (m.grad == nullptr) continue;
        const F value = m.gate == 0.0f ? I::zero() : I::mul(sum, gate);
        store_up_to<I>(m.grad, m.parameter.dtype, i, count, value);
    }
    if (!m.statistics) return;
    m.squares = I::sum(sums.squares);
    m.abs_products = I::sum(sums.abs_products);
    m.products_sq = I::sum(sums.products_sq);
}

// Blocks of W rows, whose columns are vectors between two transpositions.
template <class I>
void merge_columns(const MergeColumns& m) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    MergeSums<I> sums[W];
    for (int j = 0; j < m.count; ++j) sums[j].clear();
    const F scale = I::set1(m.scale);
    const DType dtype = m.parameter.dtype;
    // A vector that begins with a row may reach into the rows behind it, not behind the last one. In a gradient of as many columns
    // those are written later.
    const int64_t end = (m.size - 1) * m.parameter.ld + m.count, grad_end = m.grad_ld == m.count ? m.size * m.grad_ld : 0;
    for (int64_t i = 0; i < m.size; i += W) {
        const int64_t rows = m.size - i < W ? m.size - i : W;
        U parameter[W], grads[W];
        if (m.statistics) {
            for (int64_t c = 0; c < W; ++c) {
                const int64_t first = (i + c) * m.parameter.ld;
                parameter[c] = c >= rows         ? I::zero_units()
                               : first + W <= end ? I::as_units(load_floats<I>(m.parameter.data, dtype, first))
                                                  : I::as_units(load_some<I>(m.parameter.data, dtype, first, m.count));
            }
            I::transpose(parameter);
        }
        for (int j = 0; j < m.count; ++j) {
            const F sum = I::mul(load_up_to<I>({m.sums, DType::f32, m.size}, j, i, rows), scale);
            if (m.statistics) sums[j].add(I::as_floats(parameter[j]), sum);
            grads[j] = m.gate[j] == 0.0f ? I::zero_units() : I::as_units(I::mul(sum, I::set1(m.gate[j])));
        }
        if (m.grad == nullptr) continue;
        for (int j = m.count; j < W; ++j) grads[j] = I::zero_units();
        I::transpose(grads);
        for (int64_t c = 0; c < rows; ++c) {
            const int64_t first = (i + c) * m.grad_ld;
            if (first + W <= grad_end) {
                store_floats<I>(m.grad, dtype, first, I::as_floats(grads[c]));
            } else {
                store_some<I>(m.grad, dtype, first, m.count, I::as_floats(grads[c]));
            }
        }
    }
    for (int j = 0; m.statistics && j < m.count; ++j) {
        m.squares[j] = I::sum(sums[j].squares);
        m.abs_products[j] = I::sum(sums[j].abs_products);
        m.products_sq[j] = I::sum(sums[j].products_sq);
    }
}

}  // namespace
}  // namespace hlk
