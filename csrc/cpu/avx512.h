// The vectors of AVX-512 (F, BW, DQ, VL); included after the target is set.
#pragma once

#include <immintrin.h>

#include "kernels_impl.h"

namespace hlk {
namespace {

struct Avx512 {
    static constexpr int W = 16;
    // 12 x 2 accumulators, 2 vectors of the right operand, and room for broadcasts in 32 registers.
    static constexpr int MAX_ROWS = 12;
    static constexpr int DOT_ROWS = 4;   // with 4 columns each, in registers
    using F = __m512;
    using U = __m512i;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load_bf16(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    // The first bytes or values alone, zeros behind them.
    static U load_some_units(const void* p, int64_t bytes) { return _mm512_maskz_loadu_epi8(bytes < 64 ? (1ull << bytes) - 1 : ~0ull, p); }
    static F load_some_bf16(const void* p, int64_t count) {
        const __m256i half = _mm512_castsi512_si256(load_some_units(p, 2 * count));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static F load_some_f16(const void* p, int64_t count) {
        return _mm512_cvtph_ps(_mm512_castsi512_si256(load_some_units(p, 2 * count)));
    }
    static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
    static __m256i to_bf16(F f) {
        const U bits = _mm512_castps_si512(f);
        const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        U rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        const U quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), quiet);
        return _mm512_cvtepi32_epi16(rounded);
    }
    static void store_bf16(uint16_t* p, F f) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(f)); }
    static void store_f16(uint16_t* p, F f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_some_bf16(void* p, F f, int64_t count) { store_some_halves(p, to_bf16(f), count); }
    static void store_some_f16(void* p, F f, int64_t count) {
        store_some_halves(p, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT), count);
    }
    static void store_some_halves(void* p, __m256i halves, int64_t count) {
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << (count < 16 ? count : 16)) - 1), halves);
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    // The sums of 16 vectors, each as `sum` adds it up. Unrolled: their address would be taken otherwise.
    [[gnu::always_inline]] static F sums(const F (&acc)[4][4]) {
        F r[8], s[4], t[2];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            // Taken in this order, they lie in order at the end.
            const F a = acc[i / 4 % 2 * 2][i % 2 * 2 + i / 2 % 2], b = acc[i / 4 % 2 * 2 + 1][i % 2 * 2 + i / 2 % 2];
            r[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            s[i] = add(_mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) t[i] = add(_mm512_shuffle_ps(s[i], s[i + 2], 0x44), _mm512_shuffle_ps(s[i], s[i + 2], 0xEE));
        return add(_mm512_shuffle_ps(t[0], t[1], 0x88), _mm512_shuffle_ps(t[0], t[1], 0xDD));
    }
    static F keep(F a, uint64_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a); }
    // Philox4x32-10 for the counters first ... first + 7: bit 8 i + j tells whether draw j of counter i, 16 bits of it, is at least the
    // threshold. Of each 64-bit lane a product takes the low half alone, so what stands above it need not be cleared.
    static uint64_t draws_at_least(uint64_t key, uint32_t first, uint32_t row, uint32_t source, uint32_t threshold) {
        // 0x10000 keeps nothing, and has no 16 bits.
        if (threshold > 0xFFFF) return 0;
        // In this order unpacking leaves the counters in theirs.
        U c0 = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
        U c1 = _mm512_set1_epi64(row), c2 = _mm512_set1_epi64(source), c3 = _mm512_setzero_si512();
        const U m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const U p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
            constexpr int xor_of_three = 0x96;
            c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), xor_of_three);
            c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), xor_of_three);
            c1 = p1;
            c3 = p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        constexpr __mmask16 odd = 0xAAAA;
        const U c01 = _mm512_mask_blend_epi32(odd, c0, _mm512_slli_epi64(c1, 32)), c23 = _mm512_mask_blend_epi32(odd, c2, _mm512_slli_epi64(c3, 32));
        const U least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
        const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(c01, c23), least);
        const uint64_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(c01, c23), least);
        return low | high << 32;
    }
    static F as_floats(U u) { return _mm512_castsi512_ps(u); }
    static U as_units(F f) { return _mm512_castps_si512(f); }
    static U zero_units() { return _mm512_setzero_si512(); }
    static U load_units(const void* p) { return _mm512_loadu_si512(p); }
    static void store_units(uint32_t* p, U u) { _mm512_storeu_si512(p, u); }
    static void store_units(uint32_t* p, U u, int64_t count) {
        _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << (count < 16 ? count : 16)) - 1), u);
    }
    static U broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static void transpose(U* r) {
        U t[16], s[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            s[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            s[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            s[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            s[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // s[4 g + c]: rows 4 g ... 4 g + 3, columns c, c + 4, c + 8, c + 12, one in each 128-bit lane.
        for (int c = 0; c < 4; ++c) {
            const U low = _mm512_shuffle_i32x4(s[c], s[4 + c], 0x88);        // columns c, c + 8 of rows 0-3, 4-7
            const U high = _mm512_shuffle_i32x4(s[c], s[4 + c], 0xDD);       // columns c + 4, c + 12
            const U low2 = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0x88);
            const U high2 = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0xDD);
            r[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
            r[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xDD);
            r[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
            r[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xDD);
        }
    }
};

}  // namespace
}  // namespace hlk
