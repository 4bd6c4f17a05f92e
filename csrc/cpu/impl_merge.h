// Gradients and statistics from the partial sums of the blocks. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// Sums over blocks in block order and over elements in vectors of W, so the result depends on the sizes alone.
template <class I>
void merge(Merge& m) {
    using F = typename I::F;
    constexpr int W = I::W;
    F squares = I::zero(), abs_products = I::zero(), products_sq = I::zero();
    const F scale = I::set1(m.scale), gate = I::set1(m.gate);
    const bool dense_parameter = m.parameter.ld == 1, dense_grad = m.grad_ld == 1;
    for (int64_t i = 0; i < m.size; i += W) {
        const int64_t count = m.size - i < W ? m.size - i : W;
        F sum = I::zero();
        for (int64_t b = 0; b < m.blocks; ++b) {
            const float* from = m.partials + b * m.block_stride + i;
            sum = I::add(sum, count == W ? I::load(from) : load_some<I>(from, DType::f32, 0, count));
        }
        sum = I::mul(sum, scale);
        if (m.statistics) {
            F parameter;
            if (dense_parameter) {
                parameter = count == W ? load_floats<I>(m.parameter.data, m.parameter.dtype, i)
                                       : load_some<I>(m.parameter.data, m.parameter.dtype, i, count);
            } else {
                alignas(64) char gathered[4 * W] = {};
                const int64_t size = size_of(m.parameter.dtype);
                for (int64_t c = 0; c < count; ++c) {
                    __builtin_memcpy(gathered + c * size,
                                     static_cast<const char*>(m.parameter.data) + (i + c) * m.parameter.ld * size, size);
                }
                parameter = load_floats<I>(gathered, m.parameter.dtype, 0);
            }
            const F product = I::mul(parameter, sum);
            squares = I::fma(sum, sum, squares);
            abs_products = I::add(abs_products, I::abs(product));
            products_sq = I::fma(product, product, products_sq);
        }
        if (m.grad != nullptr) {
            const F value = m.gate == 0.0f ? I::zero() : I::mul(sum, gate);
            if (dense_grad) {
                if (count == W) {
                    store_floats<I>(m.grad, m.parameter.dtype, i, value);
                } else {
                    store_some<I>(m.grad, m.parameter.dtype, i, count, value);
                }
            } else {
                alignas(64) char scattered[4 * W];
                const int64_t size = size_of(m.parameter.dtype);
                store_floats<I>(scattered, m.parameter.dtype, 0, value);
                for (int64_t c = 0; c < count; ++c) {
                    __builtin_memcpy(static_cast<char*>(m.grad) + (i + c) * m.grad_ld * size, scattered + c * size, size);
                }
            }
        }
    }
    if (m.statistics) {
        m.squares = I::sum(squares);
        m.abs_products = I::sum(abs_products);
        m.products_sq = I::sum(products_sq);
    }
}

}  // namespace
}  // namespace hlk
