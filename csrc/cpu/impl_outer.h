// Outer products over the rows of a block: the gradients of lora_A and lora_B. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// Two vectors of columns of the rows of one unit, which has both of its rows, or (not WHOLE) may have one.
template <class I, class Unit, DType D, bool KEEP, bool WHOLE>
[[gnu::always_inline]] inline void outer_units(const Outer& o, int64_t row, typename I::U (&right)[2]) {
    using F = typename I::F;
    constexpr int W = I::W;
    using T = typename Storage<D>::type;
    auto* even = static_cast<const T*>(o.u.data) + row * o.u.ld;
    if constexpr (Unit::unit == 2) {
        alignas(64) static const uint16_t zeros[2 * W] = {};
        auto* odd = WHOLE || row + 1 < o.rows ? even + o.u.ld : zeros;
        I::interleave(even, odd, right[0], right[1]);
        if constexpr (KEEP) {
            const uint64_t low = bits_at(o.keep.bits + row * o.keep.ld, 0, 2 * W);
            const uint64_t high = WHOLE || row + 1 < o.rows ? bits_at(o.keep.bits + (row + 1) * o.keep.ld, 0, 2 * W) : 0;
            for (int v = 0; v < 2; ++v) right[v] = I::keep_pair(right[v], low >> (v * W), high >> (v * W));
        }
    } else {
        for (int v = 0; v < 2; ++v) {
            F value = load_floats<I, D>(even, v * W);
            if constexpr (KEEP) value = I::keep(value, bits_at(o.keep.bits + row * o.keep.ld, 0, 2 * W) >> (v * W));
            right[v] = I::as_units(value);
        }
    }
}

template <class I, class Unit, DType D, bool KEEP, bool WHOLE, int COUNT>
[[gnu::always_inline]] inline void outer_step(const Outer& o, int64_t row, const uint32_t* coef, typename I::F (&acc)[COUNT][2]) {
    using U = typename I::U;
    U right[2];
    outer_units<I, Unit, D, KEEP, WHOLE>(o, row, right);
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; ++j) {
        const U left = I::broadcast(coef + j);
        acc[j][0] = Unit::mac(acc[j][0], left, right[0]);
        acc[j][1] = Unit::mac(acc[j][1], left, right[1]);
    }
}

// Loops over the sums are unrolled, or they would lie in memory.
template <class I, class Unit, DType D, bool KEEP, int COUNT>
void outer_of(const Outer& o, float* out, int64_t out_ld) {
    constexpr int W = I::W;
    typename I::F acc[COUNT][2];
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; ++j) acc[j][0] = acc[j][1] = I::zero();
    const uint32_t* coef = o.coef;
    // Rows lie far apart, so that the hardware does not see what comes next: the same rows of the next columns.
    const char* ahead = static_cast<const char*>(o.u.data) + 2 * W * size_of(D);
    const int64_t apart = o.u.ld * size_of(D);
    int64_t row = 0;
    for (; row + Unit::unit <= o.rows; row += Unit::unit, coef += o.lanes) {
        for (int i = 0; i < Unit::unit; ++i, ahead += apart) {
            __builtin_prefetch(ahead);
            if constexpr (size_of(D) == 4) __builtin_prefetch(ahead + 64);
        }
        outer_step<I, Unit, D, KEEP, true>(o, row, coef, acc);
    }
    if (row < o.rows) outer_step<I, Unit, D, KEEP, false>(o, row, coef, acc);
    // What stands in out is added at the end: a chain that began with it would be as long as all calls together.
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; ++j, out += out_ld) {
        I::store(out, o.accumulate ? I::add(I::load(out), acc[j][0]) : acc[j][0]);
        I::store(out + W, o.accumulate ? I::add(I::load(out + W), acc[j][1]) : acc[j][1]);
    }
}

template <class I, class Unit, DType D, bool KEEP, int... COUNT>
void outer_count(const Outer& o, float* out, int64_t out_ld, std::integer_sequence<int, COUNT...>) {
    static constexpr void (*of[sizeof...(COUNT)])(const Outer&, float*, int64_t) = {outer_of<I, Unit, D, KEEP, COUNT + 1>...};
    of[o.count - 1](o, out, out_ld);
}

template <class I, class Unit, DType D>
void outer_tile(const Outer& o, float* out, int64_t out_ld) {
    const auto counts = std::make_integer_sequence<int, I::MAX_ROWS>();
    o.keep.bits == nullptr ? outer_count<I, Unit, D, false>(o, out, out_ld, counts)
                           : outer_count<I, Unit, D, true>(o, out, out_ld, counts);
}

template <class I, class Unit>
void outer_columns(const Outer& o, float* out, int64_t out_ld) {
    if constexpr (Unit::unit == 2) {
        outer_tile<I, Unit, DType::bf16>(o, out, out_ld);
    } else {
        switch (o.u.dtype) {
            case DType::f32: return outer_tile<I, Unit, DType::f32>(o, out, out_ld);
            case DType::bf16: return outer_tile<I, Unit, DType::bf16>(o, out, out_ld);
            default: return outer_tile<I, Unit, DType::f16>(o, out, out_ld);
        }
    }
}

// UNITS units of rows from `row` on, along all of their columns: each row is read as it lies in memory.
template <class I, class Unit, DType D, int COUNT, int UNITS>
void outer_along(const Outer& o, int64_t row, const uint32_t* coef, bool accumulate, int64_t columns) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    Outer part = o;
    for (int64_t column = 0; column < columns; column += 2 * W) {
        F acc[COUNT][2];
        float* out = o.out + column;
        part.u = o.u.at(0, column);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            for (int v = 0; v < 2; ++v) acc[j][v] = accumulate ? I::load(out + j * o.out_ld + v * W) : I::zero();
        }
#pragma GCC unroll 4
        for (int u = 0; u < UNITS; ++u) {
            U right[2];
            outer_units<I, Unit, D, false, false>(part, row + u * Unit::unit, right);
#pragma GCC unroll 4
            for (int j = 0; j < COUNT; ++j) {
                const U left = I::broadcast(coef + u * o.lanes + j);
                acc[j][0] = Unit::mac(acc[j][0], left, right[0]);
                acc[j][1] = Unit::mac(acc[j][1], left, right[1]);
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            for (int v = 0; v < 2; ++v) I::store(out + j * o.out_ld + v * W, acc[j][v]);
        }
    }
}

// Few coefficients: the sums go through the cache, a few rows at a time. Columns that were computed.
template <class I, class Unit, DType D, int COUNT>
int64_t outer_wide(const Outer& o) {
    // Streams that the processor follows beside each other, and that a small first cache holds where rows lie whole pages apart.
    constexpr int UNITS = 4;
    const int64_t columns = o.rows == 0 ? 0 : o.columns / (2 * I::W) * (2 * I::W);
    const uint32_t* coef = o.coef;
    bool accumulate = o.accumulate;
    int64_t row = 0;
    for (; row + UNITS * Unit::unit <= o.rows; row += UNITS * Unit::unit, coef += UNITS * o.lanes, accumulate = true) {
        outer_along<I, Unit, D, COUNT, UNITS>(o, row, coef, accumulate, columns);
    }
    for (; row < o.rows; row += Unit::unit, coef += o.lanes, accumulate = true) {
        outer_along<I, Unit, D, COUNT, 1>(o, row, coef, accumulate, columns);
    }
    return columns;
}

template <class I, class Unit, int COUNT>
int64_t outer_wide_columns(const Outer& o) {
    if constexpr (COUNT > 1) {
        if (o.count < COUNT) return outer_wide_columns<I, Unit, COUNT - 1>(o);
    }
    // Units of the engine's own type alone: few rows of another type are rare.
    return outer_wide<I, Unit, Unit::unit == 2 ? DType::bf16 : DType::f32, COUNT>(o);
}

// `columns` and `count` are arbitrary: tiles of 2 W columns and MAX_ROWS coefficients, the last columns through a copy.
template <class I, class Unit>
void outer(const Outer& o) {
    constexpr int W = I::W;
    constexpr int CHUNK = 64, FEW = 4;
    const bool wide = o.count <= FEW && o.count > 0 && o.keep.bits == nullptr && has_units<Unit>(o.u.dtype);
    for (int64_t column = wide ? outer_wide_columns<I, Unit, FEW>(o) : 0; column < o.columns; column += 2 * W) {
        const int64_t width = o.columns - column < 2 * W ? o.columns - column : 2 * W;
        // Parts of nearly equal size: one of few coefficients takes as long to read its rows as one of many.
        const int parts = (o.count + I::MAX_ROWS - 1) / I::MAX_ROWS;
        for (int first = 0, i = 0; i < parts; first += (o.count - first) / (parts - i), ++i) {
            Outer part = o;
            part.count = (o.count - first) / (parts - i);
            part.coef = o.coef + first;
            part.u = o.u.at(0, column);
            part.keep = o.keep.at(0, column);
            float* out = o.out + first * o.out_ld + column;
            if (width == 2 * W) {
                outer_columns<I, Unit>(part, out, o.out_ld);
                continue;
            }
            // The rows' ends, copied chunk by chunk: nothing beyond a row is read.
            alignas(64) char rows[CHUNK * 2 * W * 4];
            alignas(64) uint8_t bits[CHUNK * 8];
            float sum[I::MAX_ROWS][2 * W], some[I::MAX_ROWS][2 * W];
            for (int j = 0; j < part.count; ++j) {
                for (int c = 0; c < 2 * W; ++c) sum[j][c] = o.accumulate && c < width ? out[j * o.out_ld + c] : 0.0f;
            }
            part.accumulate = false;
            const int64_t size = size_of(o.u.dtype);
            for (int64_t row = 0; row < o.rows; row += CHUNK) {
                Outer chunk = part;
                chunk.rows = o.rows - row < CHUNK ? o.rows - row : CHUNK;
                chunk.coef = part.coef + row / Unit::unit * o.lanes;
                __builtin_memset(rows, 0, sizeof(rows));
                __builtin_memset(bits, 0, sizeof(bits));
                for (int64_t i = 0; i < chunk.rows; ++i) {
                    __builtin_memcpy(rows + i * 2 * W * size,
                                     static_cast<const char*>(part.u.data) + (row + i) * o.u.ld * size, width * size);
                    if (part.keep.bits != nullptr) {
                        __builtin_memcpy(bits + i * 8, part.keep.bits + (row + i) * o.keep.ld, (width + 7) / 8);
                    }
                }
                chunk.u = {rows, o.u.dtype, 2 * W};
                if (part.keep.bits != nullptr) chunk.keep = {bits, 8};
                outer_columns<I, Unit>(chunk, &some[0][0], 2 * W);
                for (int j = 0; j < part.count; ++j) {
                    for (int c = 0; c < 2 * W; ++c) sum[j][c] += some[j][c];
                }
            }
            for (int j = 0; j < part.count; ++j) {
                for (int64_t c = 0; c < width; ++c) out[j * o.out_ld + c] = sum[j][c];
            }
        }
    }
}

}  // namespace
}  // namespace hlk
