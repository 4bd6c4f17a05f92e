// The register tile of the GEMM. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

// The bias of a vector of columns; zeros where there is none.
template <class I>
inline typename I::F bias_of(const Tile& t, int64_t column) {
    if (t.bias.data == nullptr) return I::zero();
    return load_up_to<I>(t.bias, 0, column, t.columns - column);
}

// Adds bias and base to a vector of sums, converts and stores it.
template <class I>
inline void finish_vector(const Tile& t, int64_t row, int64_t column, typename I::F sum, typename I::F bias) {
    const int64_t count = t.columns - column;
    typename I::F value = I::add(sum, bias);
    if (t.base.data != nullptr) value = I::add(value, load_up_to<I>(t.base, row, column, count));
    store_up_to<I>(t.out, t.out_dtype, row * t.out_ld + column, count, value);
}

// A whole tile without a base: no branch between its vectors, which would cost as much as an eighth of a product of depth 64.
template <class I, class Unit, DType D, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void store_whole(const Tile& t, typename I::F (&sum)[ROWS][VECTORS]) {
    constexpr int W = I::W;
    using T = typename Storage<D>::type;
    if (t.bias.data != nullptr) {
#pragma GCC unroll 4
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

// Units between the read of a panel and its prefetch. The hardware's stops at the end of each page.
constexpr int64_t tile_ahead = 24;

// Where the units of ROWS rows lie: in a strip, or (IN_PLACE) in rows of a matrix, three to a pointer, which the processor's
// addressing reaches without further arithmetic.
template <int ROWS, bool IN_PLACE>
struct LeftRows {
    const char* rows[IN_PLACE ? (ROWS + 2) / 3 : 1];
    int64_t apart;

    explicit LeftRows(const Left& left) : apart(left.row_bytes) {
        for (int i = 0; 3 * i < (IN_PLACE ? ROWS : 1); ++i) rows[i] = reinterpret_cast<const char*>(left.data) + 3 * i * apart;
    }
    [[gnu::always_inline]] const uint32_t* at(int row) const {
        return reinterpret_cast<const uint32_t*>(IN_PLACE ? rows[row / 3] + row % 3 * apart : rows[0] + 4 * row);
    }
    [[gnu::always_inline]] void next() {
        for (const char*& row : rows) row += IN_PLACE ? 4 : 4 * ROWS;
    }
};

// Adds the products of some units to the sums; left and b move on.
template <class I, class Unit, bool IN_PLACE, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_products(LeftRows<ROWS, IN_PLACE>& left, const uint32_t*& b, int64_t b_stride, int64_t units,
                                                const char*& next, int64_t next_step, typename I::F (&sum)[ROWS][VECTORS]) {
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
            const U unit = I::broadcast(left.at(i));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = Unit::mac(sum[i][v], unit, right[v]);
        }
        // Plain C++ has no registers left for it.
        if constexpr (I::MAX_ROWS > 4) {
            __builtin_prefetch(next, 0, 2);
            next += next_step;
        }
        left.next();
        b += b_stride;
    }
}

// Adds the products of a segment. Chains of float32 sums end within it, and at its end where another segment follows.
template <class I, class Unit, bool IN_PLACE, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_segment(const Segment& segment, bool last, typename I::F (&sum)[ROWS][VECTORS],
                                               typename I::F (&ended)[ROWS][VECTORS], bool& any_ended) {
    LeftRows<ROWS, IN_PLACE> left(segment.a);
    const uint32_t* b = segment.b;
    // An address that is mapped: the processor would look for any other in vain.
    const char* next = segment.next != nullptr ? segment.next : reinterpret_cast<const char*>(b);
    if constexpr (Unit::unit == 2) {
        add_products<I, Unit>(left, b, segment.b_stride, segment.units, next, segment.next_step, sum);
        return;
    }
    for (int64_t units = segment.units; units > 0; units -= float_chain) {
        add_products<I, Unit>(left, b, segment.b_stride, units < float_chain ? units : float_chain, next, segment.next_step, sum);
        if (units <= float_chain && last) break;
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
}

template <class I, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void keep_sums(const Tile& t, typename I::F (&sum)[ROWS][VECTORS]) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
        const uint64_t bits = bits_at(t.keep.bits + i * t.keep.ld, 0, t.columns);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = I::keep(sum[i][v], bits >> (v * I::W));
    }
}

// A tile with a base or less than whole vectors of columns, its sums [rows][vectors][W].
template <class I, int VECTORS>
[[gnu::noinline]] void store_parts(const Tile& t, int rows, const float* sums) {
    constexpr int W = I::W;
    for (int v = 0; v < VECTORS && v * W < t.columns; ++v) {
        const typename I::F bias = bias_of<I>(t, v * W);
        for (int i = 0; i < rows; ++i) finish_vector<I>(t, i, v * W, I::load(sums + (i * VECTORS + v) * W), bias);
    }
}

// Every loop over the sums is unrolled and nothing takes their address: otherwise they would lie in memory between segments, and
// storing and reading them again takes as long as 8 units of products.
template <class I, class Unit, int ROWS, int VECTORS>
void tile_of(const Tile& t) {
    using F = typename I::F;
    constexpr int W = I::W;
    F sum[ROWS][VECTORS], ended[ROWS][VECTORS];   // the chain that runs, and those that ended
    bool any_ended = false;
    prefetch_out(t, ROWS);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = I::zero();
    }
    for (int s = 0; s < t.num_segments; ++s) {
        const Segment segment = t.segments[s];
        const bool last = s + 1 == t.num_segments;
        if (segment.a.row_bytes != 0) {
            add_segment<I, Unit, true>(segment, last, sum, ended, any_ended);
        } else {
            add_segment<I, Unit, false>(segment, last, sum, ended, any_ended);
        }
        if (s == 0 && t.keep.bits != nullptr) {
            keep_sums<I>(t, sum);
            if (any_ended) keep_sums<I>(t, ended);
        }
    }
    if (Unit::unit == 1 && any_ended) {
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
    alignas(64) float sums[ROWS * VECTORS * W];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) I::store(sums + (i * VECTORS + v) * W, sum[i][v]);
    }
    store_parts<I, VECTORS>(t, ROWS, sums);
}

template <class I, class Unit, int... ROWS>
void tile_rows(const Tile& t, std::integer_sequence<int, ROWS...>) {
    static constexpr void (*of[2][sizeof...(ROWS)])(const Tile&) = {{tile_of<I, Unit, ROWS + 1, 1>...},
                                                                   {tile_of<I, Unit, ROWS + 1, 2>...}};
    of[t.vectors - 1][t.rows - 1](t);
}

template <class I, class Unit>
void tile(const Tile& t) {
    tile_rows<I, Unit>(t, std::make_integer_sequence<int, I::MAX_ROWS>());
}

}  // namespace
}  // namespace hlk
