// Vectors of an instruction set `I` from and to memory of any dtype, and the two kinds of unit. Part of kernels_impl.h.
#pragma once

#include "kernels.h"

namespace hlk {
namespace {

template <DType D> struct Storage { using type = uint16_t; };
template <> struct Storage<DType::f32> { using type = float; };

// W values of a row as floats.
template <class I, DType D>
inline typename I::F load_floats(const void* data, int64_t index) {
    auto* p = static_cast<const typename Storage<D>::type*>(data) + index;
    if constexpr (D == DType::f32) return I::load(p);
    if constexpr (D == DType::bf16) return I::load_bf16(p);
    if constexpr (D == DType::f16) return I::load_f16(p);
}

template <class I>
inline typename I::F load_floats(const void* data, DType dtype, int64_t index) {
    switch (dtype) {
        case DType::f32: return load_floats<I, DType::f32>(data, index);
        case DType::bf16: return load_floats<I, DType::bf16>(data, index);
        default: return load_floats<I, DType::f16>(data, index);
    }
}

template <class I>
inline void store_floats(void* data, DType dtype, int64_t index, typename I::F value) {
    switch (dtype) {
        case DType::f32: I::store(static_cast<float*>(data) + index, value); break;
        case DType::bf16: I::store_bf16(static_cast<uint16_t*>(data) + index, value); break;
        default: I::store_f16(static_cast<uint16_t*>(data) + index, value); break;
    }
}

template <class I, class = void> struct HasPartialVectors : std::false_type {};
template <class I> struct HasPartialVectors<I, std::void_t<decltype(sizeof(I::load_some_bf16(nullptr, 0)))>> : std::true_type {};

// The first `count` < W values, zeros behind them; reads nothing beyond.
template <class I>
inline typename I::F load_some(const void* data, DType dtype, int64_t index, int64_t count) {
    if constexpr (HasPartialVectors<I>::value) {
        const void* from = static_cast<const char*>(data) + index * size_of(dtype);
        switch (dtype) {
            case DType::f32: return I::as_floats(I::load_some_units(from, 4 * count));
            case DType::bf16: return I::load_some_bf16(from, count);
            default: return I::load_some_f16(from, count);
        }
    }
    alignas(64) char buffer[4 * I::W] = {};
    const int64_t size = size_of(dtype);
    __builtin_memcpy(buffer, static_cast<const char*>(data) + index * size, count * size);
    return load_floats<I>(buffer, dtype, 0);
}

// A vector of a matrix of which `count` values are there, W or fewer.
template <class I>
inline typename I::F load_up_to(Matrix from, int64_t row, int64_t column, int64_t count) {
    const int64_t first = row * from.ld + column;
    return count >= I::W ? load_floats<I>(from.data, from.dtype, first) : load_some<I>(from.data, from.dtype, first, count);
}

template <class I>
inline void store_some(void* data, DType dtype, int64_t index, int64_t count, typename I::F value) {
    if constexpr (HasPartialVectors<I>::value) {
        void* to = static_cast<char*>(data) + index * size_of(dtype);
        switch (dtype) {
            case DType::f32: return I::store_units(static_cast<uint32_t*>(to), I::as_units(value), count);
            case DType::bf16: return I::store_some_bf16(to, value, count);
            default: return I::store_some_f16(to, value, count);
        }
    }
    alignas(64) char buffer[4 * I::W];
    const int64_t size = size_of(dtype);
    store_floats<I>(buffer, dtype, 0, value);
    __builtin_memcpy(static_cast<char*>(data) + index * size, buffer, count * size);
}

// The first `count` values of a vector, or all W where there are more.
template <class I>
inline void store_up_to(void* data, DType dtype, int64_t index, int64_t count, typename I::F value) {
    count >= I::W ? store_floats<I>(data, dtype, index, value) : store_some<I>(data, dtype, index, count, value);
}

inline uint64_t bits_at(const uint8_t* bits, int64_t column, int64_t count) {
    uint64_t value = 0;
    __builtin_memcpy(&value, bits + column / 8, (count + 7) / 8);
    return value;
}

// Units after which a chain of float32 sums ends: what follows is summed from 0 and added. Every rounding is then relative to a
// part of the sum instead of all of it: the low-rank part, which comes first, would make each one as large as itself, and at a
// depth of 1100 the error was 6 times that of a plain matmul; with chains of 384 it was 1 % beyond twice that at a depth of 384. For
// products of bf16 one chain is far more exact than its operands.
constexpr int64_t float_chain = 256;

// Units that hold one float.
template <class I>
struct FloatUnit {
    static constexpr int unit = 1;
    using F = typename I::F;
    using U = typename I::U;
    static F mac(F acc, U a, U b) { return I::fma(I::as_floats(a), I::as_floats(b), acc); }

    // W units along a row, from element `index` on; `count` elements are there.
    static U along(Matrix source, int64_t row, int64_t index, int64_t count, Keep keep) {
        F value = load_up_to<I>(source, row, index, count);
        if (keep.bits != nullptr) {
            value = I::keep(value, bits_at(keep.bits + row * keep.ld, index, count < I::W ? count : I::W));
        }
        return I::as_units(value);
    }
};

// Units that hold a pair of bf16.
template <class I>
struct PairUnit {
    static constexpr int unit = 2;
    using F = typename I::F;
    using U = typename I::U;
    static F mac(F acc, U a, U b) { return I::dot(acc, a, b); }

    static U load_some_halves(const uint16_t* from, int64_t count) {
        if constexpr (HasPartialVectors<I>::value) {
            return I::load_some_units(from, 2 * count);
        } else {
            alignas(64) uint16_t buffer[2 * I::W] = {};
            __builtin_memcpy(buffer, from, 2 * count);
            return I::load_units(buffer);
        }
    }

    static U along(Matrix source, int64_t row, int64_t index, int64_t count, Keep keep) {
        const int64_t first = row * source.ld + index;
        U value;
        if (source.dtype == DType::bf16) {
            if (count >= 2 * I::W) {
                value = I::load_units(static_cast<const uint16_t*>(source.data) + first);
            } else {
                value = load_some_halves(static_cast<const uint16_t*>(source.data) + first, count);
            }
        } else {
            const F low = load_up_to<I>(source, row, index, count);
            const F high = count <= I::W ? I::zero() : load_up_to<I>(source, row, index + I::W, count - I::W);
            value = I::pairs_along(low, high);
        }
        if (keep.bits != nullptr) {
            value = I::keep_halves(value, bits_at(keep.bits + row * keep.ld, index, count < 2 * I::W ? count : 2 * I::W));
        }
        return value;
    }
};

// Whether a kernel can read units where they lie: floats for FloatUnit, bf16 for PairUnit.
template <class Unit>
inline bool has_units(DType dtype) {
    return dtype == (Unit::unit == 2 ? DType::bf16 : DType::f32);
}

}  // namespace
}  // namespace hlk
