// The kernels of kernels.h as templates over an instruction set `I` (its vectors and their operations) and the kind of unit.
// Included once per instruction set, after its target is set: no header with inline functions of its own may come after
// that, or the linker may pick a copy that the processor cannot run.
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

// The first `count` < W values, zeros behind them; reads nothing beyond.
template <class I>
inline typename I::F load_some(const void* data, DType dtype, int64_t index, int64_t count) {
    alignas(64) char buffer[4 * I::W] = {};
    const int64_t size = size_of(dtype);
    __builtin_memcpy(buffer, static_cast<const char*>(data) + index * size, count * size);
    return load_floats<I>(buffer, dtype, 0);
}

template <class I>
inline void store_some(void* data, DType dtype, int64_t index, int64_t count, typename I::F value) {
    alignas(64) char buffer[4 * I::W];
    const int64_t size = size_of(dtype);
    store_floats<I>(buffer, dtype, 0, value);
    __builtin_memcpy(static_cast<char*>(data) + index * size, buffer, count * size);
}

inline uint64_t bits_at(const uint8_t* bits, int64_t column, int64_t count) {
    uint64_t value = 0;
    __builtin_memcpy(&value, bits + column / 8, (count + 7) / 8);
    return value;
}

// Units that hold one float.
template <class I>
struct FloatUnit {
    static constexpr int unit = 1;
    using F = typename I::F;
    using U = typename I::U;
    static F mac(F acc, U a, U b) { return I::fma(I::as_floats(a), I::as_floats(b), acc); }

    // W units along a row, from element `index` on; `count` elements are there.
    static U along(Matrix source, int64_t row, int64_t index, int64_t count, Keep keep) {
        const int64_t first = row * source.ld + index;
        F value = count >= I::W ? load_floats<I>(source.data, source.dtype, first)
                                : load_some<I>(source.data, source.dtype, first, count);
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

    static U along(Matrix source, int64_t row, int64_t index, int64_t count, Keep keep) {
        const int64_t first = row * source.ld + index;
        U value;
        if (source.dtype == DType::bf16) {
            if (count >= 2 * I::W) {
                value = I::load_units(static_cast<const uint16_t*>(source.data) + first);
            } else {
                alignas(64) uint16_t buffer[2 * I::W] = {};
                __builtin_memcpy(buffer, static_cast<const uint16_t*>(source.data) + first, 2 * count);
                value = I::load_units(buffer);
            }
        } else {
            F low = count >= I::W ? load_floats<I>(source.data, source.dtype, first)
                                  : load_some<I>(source.data, source.dtype, first, count);
            const int64_t rest = count - I::W;
            F high = rest <= 0 ? I::zero() : rest >= I::W ? load_floats<I>(source.data, source.dtype, first + I::W)
                                                         : load_some<I>(source.data, source.dtype, first + I::W, rest);
            value = I::pairs_along(low, high);
        }
        if (keep.bits != nullptr) {
            value = I::keep_halves(value, bits_at(keep.bits + row * keep.ld, index, count < 2 * I::W ? count : 2 * I::W));
        }
        return value;
    }
};

template <class I, class Unit>
void pack_rows(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out, int64_t stride) {
    using U = typename I::U;
    constexpr int W = I::W;
    const int64_t units = (depth + Unit::unit - 1) / Unit::unit;
    for (int64_t row = 0; row < rows; row += W) {
        const int64_t here = rows - row < W ? rows - row : W;
        for (int64_t u = 0; u < units; u += W) {
            U block[W];
            for (int64_t i = 0; i < here; ++i) {
                block[i] = Unit::along(source, row + i, u * Unit::unit, depth - u * Unit::unit, keep);
            }
            for (int64_t i = here; i < W; ++i) block[i] = I::zero_units();
            I::transpose(block);
            const int64_t count = units - u < W ? units - u : W;
            uint32_t* to = out + u * stride + row;
            if (here == W) {
                for (int64_t i = 0; i < count; ++i) I::store_units(to + i * stride, block[i]);
            } else {
                for (int64_t i = 0; i < count; ++i) I::store_units(to + i * stride, block[i], here);
            }
        }
    }
}

template <class I, class Unit>
void pack_columns(Matrix source, int64_t depth, int64_t columns, uint32_t* out, int64_t stride) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    auto load = [&](int64_t row, int64_t column, int64_t count) -> F {
        if (row >= depth) return I::zero();
        const int64_t first = row * source.ld + column;
        return count >= W ? load_floats<I>(source.data, source.dtype, first)
                          : load_some<I>(source.data, source.dtype, first, count);
    };
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
            U value;
            if constexpr (Unit::unit == 2) {
                value = I::pairs(load(2 * u, column, count), load(2 * u + 1, column, count));
            } else {
                value = I::as_units(load(u, column, count));
            }
            if (count == W) {
                I::store_units(to + column, value);
            } else {
                I::store_units(to + column, value, count);
            }
        }
    }
}

template <class I, class Unit, int ROWS, int VECTORS>
void tile_of(const Tile& t) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    F acc[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = I::zero();
    }
    for (int s = 0; s < t.num_segments; ++s) {
        const Segment segment = t.segments[s];
        const uint32_t* a = segment.a;
        const uint32_t* b = segment.b;
        for (int64_t u = 0; u < segment.units; ++u) {
            U right[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) right[v] = I::load_units(b + v * W);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) {
                const U left = I::broadcast(a + i);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) acc[i][v] = Unit::mac(acc[i][v], left, right[v]);
            }
            a += segment.a_stride;
            b += segment.b_stride;
        }
        if (s == 0 && t.keep.bits != nullptr) {
            for (int i = 0; i < ROWS; ++i) {
                const uint64_t bits = bits_at(t.keep.bits + i * t.keep.ld, 0, t.columns);
                for (int v = 0; v < VECTORS; ++v) acc[i][v] = I::keep(acc[i][v], bits >> (v * W));
            }
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = v * W, count = t.columns - column;
        if (count <= 0) break;
        const bool whole = count >= W;
        F bias = I::zero();
        if (t.bias.data != nullptr) {
            bias = whole ? load_floats<I>(t.bias.data, t.bias.dtype, column)
                         : load_some<I>(t.bias.data, t.bias.dtype, column, count);
        }
        for (int i = 0; i < ROWS; ++i) {
            F value = I::add(acc[i][v], bias);
            if (t.base.data != nullptr) {
                const int64_t first = i * t.base.ld + column;
                value = I::add(value, whole ? load_floats<I>(t.base.data, t.base.dtype, first)
                                            : load_some<I>(t.base.data, t.base.dtype, first, count));
            }
            if (whole) {
                store_floats<I>(t.out, t.out_dtype, i * t.out_ld + column, value);
            } else {
                store_some<I>(t.out, t.out_dtype, i * t.out_ld + column, count, value);
            }
        }
    }
}

template <class I, class Unit, int ROWS>
void tile_rows(const Tile& t) {
    if constexpr (ROWS > 1) {
        if (t.rows < ROWS) return tile_rows<I, Unit, ROWS - 1>(t);
    }
    t.vectors == 1 ? tile_of<I, Unit, ROWS, 1>(t) : tile_of<I, Unit, ROWS, 2>(t);
}

template <class I, class Unit>
void tile(const Tile& t) {
    tile_rows<I, Unit, I::MAX_ROWS>(t);
}

// Two vectors of columns of the rows of one unit.
template <class I, class Unit, DType D, bool KEEP>
inline void outer_units(const Outer& o, int64_t row, typename I::U (&right)[2]) {
    using F = typename I::F;
    constexpr int W = I::W;
    using T = typename Storage<D>::type;
    auto* even = static_cast<const T*>(o.u.data) + row * o.u.ld;
    if constexpr (Unit::unit == 2) {
        alignas(64) static const uint16_t zeros[2 * W] = {};
        auto* odd = row + 1 < o.rows ? even + o.u.ld : zeros;
        I::interleave(even, odd, right[0], right[1]);
        if constexpr (KEEP) {
            const uint64_t low = bits_at(o.keep.bits + row * o.keep.ld, 0, 2 * W);
            const uint64_t high = row + 1 < o.rows ? bits_at(o.keep.bits + (row + 1) * o.keep.ld, 0, 2 * W) : 0;
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

template <class I, class Unit, DType D, bool KEEP, int COUNT>
void outer_of(const Outer& o, float* out, int64_t out_ld) {
    using F = typename I::F;
    using U = typename I::U;
    constexpr int W = I::W;
    F acc[COUNT][2];
    for (int j = 0; j < COUNT; ++j) acc[j][0] = acc[j][1] = I::zero();
    const uint32_t* coef = o.coef;
    for (int64_t row = 0; row < o.rows; row += Unit::unit) {
        U right[2];
        outer_units<I, Unit, D, KEEP>(o, row, right);
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; ++j) {
            const U left = I::broadcast(coef + j);
            acc[j][0] = Unit::mac(acc[j][0], left, right[0]);
            acc[j][1] = Unit::mac(acc[j][1], left, right[1]);
        }
        coef += o.coef_stride;
    }
    for (int j = 0; j < COUNT; ++j) {
        I::store(out + j * out_ld, acc[j][0]);
        I::store(out + j * out_ld + W, acc[j][1]);
    }
}

template <class I, class Unit, DType D, bool KEEP, int COUNT>
void outer_count(const Outer& o, float* out, int64_t out_ld) {
    if constexpr (COUNT > 1) {
        if (o.count < COUNT) return outer_count<I, Unit, D, KEEP, COUNT - 1>(o, out, out_ld);
    }
    outer_of<I, Unit, D, KEEP, COUNT>(o, out, out_ld);
}

template <class I, class Unit, DType D>
void outer_tile(const Outer& o, float* out, int64_t out_ld) {
    o.keep.bits == nullptr ? outer_count<I, Unit, D, false, I::MAX_ROWS>(o, out, out_ld)
                           : outer_count<I, Unit, D, true, I::MAX_ROWS>(o, out, out_ld);
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

// `columns` and `count` are arbitrary: tiles of 2 W columns and MAX_ROWS coefficients, the last columns through a copy.
template <class I, class Unit>
void outer(const Outer& o) {
    constexpr int W = I::W;
    constexpr int CHUNK = 64;
    for (int64_t column = 0; column < o.columns; column += 2 * W) {
        const int64_t width = o.columns - column < 2 * W ? o.columns - column : 2 * W;
        for (int first = 0; first < o.count; first += I::MAX_ROWS) {
            Outer part = o;
            part.count = o.count - first < I::MAX_ROWS ? o.count - first : I::MAX_ROWS;
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
                for (int c = 0; c < 2 * W; ++c) sum[j][c] = 0.0f;
            }
            const int64_t size = size_of(o.u.dtype);
            for (int64_t row = 0; row < o.rows; row += CHUNK) {
                Outer chunk = part;
                chunk.rows = o.rows - row < CHUNK ? o.rows - row : CHUNK;
                chunk.coef = part.coef + row / Unit::unit * o.coef_stride;
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

// Philox4x32-10 for counters (column / 8, row, source, 0); see ops/rng.py for the rule and its source.
template <class I>
void keep_bits(uint64_t key, uint32_t row, uint32_t source, int64_t columns, uint32_t threshold, uint8_t* out) {
    constexpr int N = 16;
    const int64_t bytes = (columns + 7) / 8;
    for (int64_t first = 0; first < bytes; first += N) {
        uint32_t c0[N], c1[N], c2[N], c3[N];
        for (int i = 0; i < N; ++i) {
            c0[i] = static_cast<uint32_t>(first) + i;
            c1[i] = row;
            c2[i] = source;
            c3[i] = 0;
        }
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            for (int i = 0; i < N; ++i) {
                const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
                const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
                c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = static_cast<uint32_t>(p1);
                c3[i] = static_cast<uint32_t>(p0);
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint8_t bits[N];
        for (int i = 0; i < N; ++i) {
            uint32_t byte = 0;
            byte |= static_cast<uint32_t>((c0[i] & 0xFFFF) >= threshold) << 0;
            byte |= static_cast<uint32_t>((c0[i] >> 16) >= threshold) << 1;
            byte |= static_cast<uint32_t>((c1[i] & 0xFFFF) >= threshold) << 2;
            byte |= static_cast<uint32_t>((c1[i] >> 16) >= threshold) << 3;
            byte |= static_cast<uint32_t>((c2[i] & 0xFFFF) >= threshold) << 4;
            byte |= static_cast<uint32_t>((c2[i] >> 16) >= threshold) << 5;
            byte |= static_cast<uint32_t>((c3[i] & 0xFFFF) >= threshold) << 6;
            byte |= static_cast<uint32_t>((c3[i] >> 16) >= threshold) << 7;
            bits[i] = static_cast<uint8_t>(byte);
        }
        __builtin_memcpy(out + first, bits, bytes - first < N ? bytes - first : N);
    }
    // Columns that do not exist are 0, as on every backend.
    if (columns % 8 != 0) out[bytes - 1] &= static_cast<uint8_t>((1 << (columns % 8)) - 1);
}

template <class I, class Unit>
constexpr Engine make_engine(const char* name) {
    return {name, Unit::unit, I::W, I::MAX_ROWS, pack_rows<I, Unit>, pack_columns<I, Unit>, tile<I, Unit>,
            outer<I, Unit>, dot<I, Unit>, merge<I>, keep_bits<I>};
}

}  // namespace
}  // namespace hlk
