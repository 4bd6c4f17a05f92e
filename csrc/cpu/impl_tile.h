// The register tile of the GEMM. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// The bias of a vector of columns; zeros where there is none.
template <class I>
inline typename I::F bias_of(const Tile& t, int64_t column) {
    if (t.bias.data == nullptr) return I::zero();
    const int64_t count = t.columns - column;
    return count >= I::W ? load_floats<I>(t.bias.data, t.bias.dtype, column)
                         : load_some<I>(t.bias.data, t.bias.dtype, column, count);
}

// Adds bias and base to a vector of sums, converts and stores it.
template <class I>
inline void finish_vector(const Tile& t, int64_t row, int64_t column, typename I::F sum, typename I::F bias) {
    const int64_t count = t.columns - column;
    const bool whole = count >= I::W;
    typename I::F value = I::add(sum, bias);
    if (t.base.data != nullptr) {
        const int64_t first = row * t.base.ld + column;
        value = I::add(value, whole ? load_floats<I>(t.base.data, t.base.dtype, first)
                                    : load_some<I>(t.base.data, t.base.dtype, first, count));
    }
    if (whole) {
        store_floats<I>(t.out, t.out_dtype, row * t.out_ld + column, value);
    } else {
        store_some<I>(t.out, t.out_dtype, row * t.out_ld + column, count, value);
    }
}

// A whole tile without a base: no branch between its vectors, which would cost as much as an eighth of a product of depth 64.
template <class I, class Unit, DType D, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void store_whole(const Tile& t, typename I::F (&sum)[ROWS][VECTORS]) {
    constexpr int W = I::W;
    using T = typename Storage<D>::type;
    if (t.bias.data != nullptr) {
        for (int v = 0; v < VECTORS; ++v) {
            const typename I::F bias = bias_of<I>(t, v * W);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) sum[i][v] = I::add(sum[i][v], bias);
        }
    }
    T* out = static_cast<T*>(t.out);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i, out += t.out_ld) {
        if constexpr (D == DType::bf16 && Unit::unit == 2 && VECTORS == 2) {
            I::store_units(reinterpret_cast<uint32_t*>(out), I::pairs_along(sum[i][0], sum[i][1]));
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                if constexpr (D == DType::f32) I::store(out + v * W, sum[i][v]);
                if constexpr (D == DType::bf16) I::store_bf16(out + v * W, sum[i][v]);
                if constexpr (D == DType::f16) I::store_f16(out + v * W, sum[i][v]);
            }
        }
    }
}

// The rows of the output lie far apart and are not in the cache: fetched while the products run, their stores cost nothing; else
// a twentieth of the time.
inline void prefetch_out(const Tile& t, int rows) {
    const int64_t size = size_of(t.out_dtype);
    const char* row = static_cast<const char*>(t.out);
    for (int i = 0; i < rows; ++i, row += t.out_ld * size) {
        for (int64_t at = 0; at < t.columns * size; at += 64) __builtin_prefetch(row + at, 1);
    }
}

// Units after which a chain of float32 sums ends: what follows is summed from 0 and added. Every rounding is then relative to a
// part of the sum instead of all of it: the low-rank part, which comes first, would make each one as large as itself, and at a
// depth of 1100 the error was 6 times that of a plain matmul. For products of bf16 one chain is far more exact than its operands.
constexpr int64_t float_chain = 384;

// Units between the read of a panel and its prefetch. The hardware's stops at the end of each page.
constexpr int64_t tile_ahead = 24;

// Adds the products of some units to the sums; a and b move on.
template <class I, class Unit, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_products(const uint32_t*& a, const uint32_t*& b, int64_t b_stride, int64_t units,
                                                typename I::F (&sum)[ROWS][VECTORS]) {
    using U = typename I::U;
    constexpr int W = I::W;
    for (int64_t u = 0; u < units; ++u) {
        U right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            right[v] = I::load_units(b + v * W);
            __builtin_prefetch(b + tile_ahead * VECTORS * W + v * W);
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const U left = I::broadcast(a + i);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = Unit::mac(sum[i][v], left, right[v]);
        }
        a += ROWS;
        b += b_stride;
    }
}

template <class I, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void keep_sums(const Tile& t, typename I::F (&sum)[ROWS][VECTORS]) {
    for (int i = 0; i < ROWS; ++i) {
        const uint64_t bits = bits_at(t.keep.bits + i * t.keep.ld, 0, t.columns);
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = I::keep(sum[i][v], bits >> (v * I::W));
    }
}

template <class I, class Unit, int ROWS, int VECTORS>
void tile_of(const Tile& t) {
    using F = typename I::F;
    constexpr int W = I::W;
    constexpr bool CHAINS = Unit::unit == 1;
    F sum[ROWS][VECTORS], ended[ROWS][VECTORS];   // the chain that runs, and those that ended
    bool any_ended = false;
    prefetch_out(t, ROWS);
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = I::zero();
    }
    for (int s = 0; s < t.num_segments; ++s) {
        const Segment segment = t.segments[s];
        const uint32_t* a = segment.a;
        const uint32_t* b = segment.b;
        if constexpr (CHAINS) {
            for (int64_t left = segment.units; left > 0; left -= float_chain) {
                add_products<I, Unit>(a, b, segment.b_stride, left < float_chain ? left : float_chain, sum);
                if (left <= float_chain && s + 1 == t.num_segments) break;
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) {
                        ended[i][v] = any_ended ? I::add(ended[i][v], sum[i][v]) : sum[i][v];
                        sum[i][v] = I::zero();
                    }
                }
                any_ended = true;
            }
        } else {
            add_products<I, Unit>(a, b, segment.b_stride, segment.units, sum);
        }
        if (s == 0 && t.keep.bits != nullptr) {
            keep_sums<I>(t, sum);
            if (any_ended) keep_sums<I>(t, ended);
        }
    }
    if (CHAINS && any_ended) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = I::add(ended[i][v], sum[i][v]);
        }
    }
    if (t.columns == VECTORS * W && t.base.data == nullptr) {
        switch (t.out_dtype) {
            case DType::f32: return store_whole<I, Unit, DType::f32>(t, sum);
            case DType::bf16: return store_whole<I, Unit, DType::bf16>(t, sum);
            default: return store_whole<I, Unit, DType::f16>(t, sum);
        }
    }
    for (int v = 0; v < VECTORS && v * W < t.columns; ++v) {
        const F bias = bias_of<I>(t, v * W);
        for (int i = 0; i < ROWS; ++i) finish_vector<I>(t, i, v * W, sum[i][v], bias);
    }
}

// A strip times half a vector of columns, into float32: a path of rank 8 or less.
template <class I, bool CHAINS, int ROWS>
void half_tile_of(const Tile& t) {
    using H = typename I::Half;
    typename H::F sum[ROWS], ended[ROWS];
    const Segment segment = t.segments[0];
    const uint32_t *a = segment.a, *b = segment.b;
    for (int i = 0; i < ROWS; ++i) sum[i] = ended[i] = H::zero();
    for (int64_t left = segment.units; left > 0; left -= float_chain) {
        const int64_t units = CHAINS && left > float_chain ? float_chain : left;
        for (int64_t u = 0; u < units; ++u, a += ROWS, b += segment.b_stride) {
            const typename H::U right = H::load_units(b);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) sum[i] = H::mac(sum[i], H::broadcast(a + i), right);
        }
        if (!CHAINS) break;
        for (int i = 0; i < ROWS; ++i) {
            ended[i] = H::add(ended[i], sum[i]);
            sum[i] = H::zero();
        }
    }
    for (int i = 0; i < ROWS; ++i) H::store(static_cast<float*>(t.out) + i * t.out_ld, CHAINS ? ended[i] : sum[i]);
}

template <class I, class = void> struct HasHalf : std::false_type {};
template <class I> struct HasHalf<I, std::void_t<typename I::Half>> : std::true_type {};

template <class I, class Unit, int... ROWS>
void half_tile(const Tile& t, std::integer_sequence<int, ROWS...>) {
    if constexpr (HasHalf<I>::value) {
        static constexpr void (*of[])(const Tile&) = {half_tile_of<I, Unit::unit == 1, ROWS + 1>...};
        of[t.rows - 1](t);
    }
}

template <class I, class Unit, int... ROWS>
void tile_rows(const Tile& t, std::integer_sequence<int, ROWS...>) {
    static constexpr void (*of[2][sizeof...(ROWS)])(const Tile&) = {{tile_of<I, Unit, ROWS + 1, 1>...},
                                                                   {tile_of<I, Unit, ROWS + 1, 2>...}};
    of[t.vectors - 1][t.rows - 1](t);
}

template <class I, class Unit>
void tile(const Tile& t) {
    const bool plain = t.num_segments == 1 && t.out_dtype == DType::f32 && t.bias.data == nullptr && t.base.data == nullptr &&
                       t.keep.bits == nullptr;
    if (HasHalf<I>::value && plain && t.columns == I::W / 2) {
        return half_tile<I, Unit>(t, std::make_integer_sequence<int, I::MAX_ROWS>());
    }
    tile_rows<I, Unit>(t, std::make_integer_sequence<int, I::MAX_ROWS>());
}

}  // namespace
}  // namespace hlk
