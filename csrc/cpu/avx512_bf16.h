// AVX-512 with its bf16 instructions; included after the target is set.
#pragma once

#include "avx512.h"

namespace hlk {
namespace {

struct Avx512Bf16 : Avx512 {
    static F dot(F acc, U a, U b) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void store_bf16(uint16_t* p, F f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(f)));
    }
    static void store_some_bf16(void* p, F f, int64_t count) {
        store_some_halves(p, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(f)), count);
    }
    // 2 W values in order as W units.
    static U pairs_along(F first, F second) { return reinterpret_cast<U>(_mm512_cvtne2ps_pbh(second, first)); }
    // Unit c: low half from even[c], high half from odd[c].
    static U pairs(F even, F odd) {
        const U low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
        const U high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static void interleave(const uint16_t* even, const uint16_t* odd, U& low, U& high) {
        const U e = _mm512_loadu_si512(even), o = _mm512_loadu_si512(odd);
        low = _mm512_permutex2var_epi16(e, index(0), o);
        high = _mm512_permutex2var_epi16(e, index(16), o);
    }
    static U keep_halves(U u, uint64_t bits) { return _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), u); }
    static U keep_pair(U u, uint64_t even, uint64_t odd) {
        const U low = _mm512_maskz_set1_epi32(static_cast<__mmask16>(even), 0xFFFF);
        const U high = _mm512_maskz_set1_epi32(static_cast<__mmask16>(odd), static_cast<int>(0xFFFF0000));
        return _mm512_and_si512(u, _mm512_or_si512(low, high));
    }

private:
    // first, 32 + first, first + 1, 33 + first ...: places in the 64 halves of two vectors.
    static U index(int first) {
        const U ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const U even = _mm512_add_epi32(ascending, _mm512_set1_epi32(first));
        return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
    }
};

}  // namespace
}  // namespace hlk
