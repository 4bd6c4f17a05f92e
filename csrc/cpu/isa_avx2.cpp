// AVX2 with FMA and F16C: sums in float32 for every dtype.
#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "kernels_impl.h"

namespace hlk {
namespace {

struct Avx2 {
    static constexpr int W = 8;
    static constexpr int MAX_ROWS = 6;
    static constexpr int DOT_ROWS = 2;   // with 4 columns each, in registers
    using F = __m256;
    using U = __m256i;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load_bf16(const uint16_t* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static void store(float* p, F f) { _mm256_storeu_ps(p, f); }
    static void store_bf16(uint16_t* p, F f) {
        const U bits = _mm256_castps_si256(f);
        const U odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        U rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const U quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
        rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static void store_f16(uint16_t* p, F f) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    static F keep(F a, uint64_t bits) {
        const U place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const U chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xFF)), place);
        return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, place)));
    }
    static F as_floats(U u) { return _mm256_castsi256_ps(u); }
    static U as_units(F f) { return _mm256_castps_si256(f); }
    static U zero_units() { return _mm256_setzero_si256(); }
    static U load_units(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store_units(uint32_t* p, U u) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), u); }
    static void store_units(uint32_t* p, U u, int64_t count) {
        const U index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskstore_epi32(reinterpret_cast<int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index), u);
    }
    static U broadcast(const uint32_t* p) { return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p))); }
    static void transpose(U* r) {
        U t[8], s[8];
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            s[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            s[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            s[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            s[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x20);
            r[i + 4] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x31);
        }
    }
};

const Engine engine = make_engine<Avx2, FloatUnit<Avx2>>("avx2");

}  // namespace

extern const Engine* const avx2_engine = &engine;

}  // namespace hlk
#else
namespace hlk {
extern const Engine* const avx2_engine = nullptr;
}
#endif
