// Gradients and statistics from the partial sums of the blocks. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

template <class T>
inline void copy_column(const void* from, int64_t from_ld, void* to, int64_t to_ld, int64_t count) {
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i * to_ld] = static_cast<const T*>(from)[i * from_ld];
}

inline void copy_column(int64_t size, const void* from, int64_t from_ld, void* to, int64_t to_ld, int64_t count) {
    size == 4 ? copy_column<uint32_t>(from, from_ld, to, to_ld, count) : copy_column<uint16_t>(from, from_ld, to, to_ld, count);
}

// Sums over blocks in block order and over elements in vectors of W, so the result depends on the sizes alone.
template <class I>
void merge(Merge& m) {
    using F = typename I::F;
    constexpr int W = I::W;
    // Columns of a matrix pass through a dense piece of many vectors: one alone would be read before its stores have arrived.
    constexpr int64_t piece = 16 * W;
    alignas(64) char parameters[4 * piece], gradients[4 * piece];
    F squares = I::zero(), abs_products = I::zero(), products_sq = I::zero();
    const F scale = I::set1(m.scale), gate = I::set1(m.gate);
    const DType dtype = m.parameter.dtype;
    const int64_t size = size_of(dtype);
    const bool gathers = m.statistics && m.parameter.ld != 1, scatters = m.grad != nullptr && m.grad_ld != 1;
    for (int64_t first = 0; first < m.size; first += piece) {
        const int64_t end = m.size - first < piece ? m.size : first + piece;
        const void* parameter_at = static_cast<const char*>(m.parameter.data) + first * m.parameter.ld * size;
        void* grad_at = static_cast<char*>(m.grad) + first * m.grad_ld * size;
        if (gathers) copy_column(size, parameter_at, m.parameter.ld, parameters, 1, end - first);
        for (int64_t i = first; i < end; i += W) {
            const int64_t count = end - i < W ? end - i : W;
            F sum = I::zero();
            for (int64_t b = 0; b < m.blocks; ++b) {
                const float* from = m.partials + b * m.block_stride + i;
                sum = I::add(sum, count == W ? I::load(from) : load_some<I>(from, DType::f32, 0, count));
            }
            sum = I::mul(sum, scale);
            if (m.statistics) {
                const void* from = gathers ? parameters : parameter_at;
                const F parameter = count == W ? load_floats<I>(from, dtype, i - first) : load_some<I>(from, dtype, i - first, count);
                const F product = I::mul(parameter, sum);
                squares = I::fma(sum, sum, squares);
                abs_products = I::add(abs_products, I::abs(product));
                products_sq = I::fma(product, product, products_sq);
            }
            if (m.grad == nullptr) continue;
            const F value = m.gate == 0.0f ? I::zero() : I::mul(sum, gate);
            void* to = scatters ? gradients : grad_at;
            if (count == W) {
                store_floats<I>(to, dtype, i - first, value);
            } else {
                store_some<I>(to, dtype, i - first, count, value);
            }
        }
        if (scatters) copy_column(size, gradients, 1, grad_at, m.grad_ld, end - first);
    }
    if (m.statistics) {
        m.squares = I::sum(squares);
        m.abs_products = I::sum(abs_products);
        m.products_sq = I::sum(products_sq);
    }
}

}  // namespace
}  // namespace hlk
