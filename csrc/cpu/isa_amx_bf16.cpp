// AMX bf16: products of 16 x 32 by 32 x 16 by one instruction (tdpbf16ps), the rest as on AVX-512 bf16; and the same kernels over
// tiles in memory, so that they run in tests where the processor has AVX-512 bf16 alone.
#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "amx.h"

// A compiler without this header comes with an assembler that does not know the tiles either.
#if __has_include(<amxbf16intrin.h>)
#define HLK_AMX_ASSEMBLY 1
#endif

namespace hlk {
namespace {

#if HLK_AMX_ASSEMBLY
// The processor's tiles. Written in assembly: the compilers' intrinsics do not tell that they read and write memory, so
// stores before a load could move behind it. `Tiles::begin` and `end` surround what a thread does with them: between tasks the
// tiles are free, and a thread that switches need not save 8 KB.
struct ProcessorTiles {
    static void begin() {
        struct alignas(64) Configuration {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        static_assert(sizeof(Configuration) == 64, "as ldtilecfg reads it");
        const Configuration configuration;
        asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
    }
    static void end() { asm volatile("tilerelease" : : : "memory"); }
    template <int TILE> static void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE> static void load(const void* from, int64_t row_bytes) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(row_bytes) : "memory");
    }
    template <int TILE> static void store(void* to, int64_t row_bytes) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(to), "r"(row_bytes) : "memory");
    }
    template <int SUM, int A, int B> static void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
    }
};

const Engine engine = make_amx_engine<ProcessorTiles>("amx_bf16");
#endif

// Tiles in memory. The sums of a tdpbf16ps are those of the processor (even and odd places apart, then together, then added),
// but for denormals, which it takes for zero. Tiles that are used outside begin and end are nan: there the processor would fault.
struct EmulatedTiles {
    static void begin() { configured = true; }
    static void end() { configured = false; }
    template <int TILE> static void zero() {
        for (int i = 0; i < amx_side; ++i) set(TILE, i, _mm512_setzero_si512());
    }
    template <int TILE> static void load(const void* from, int64_t row_bytes) {
        for (int i = 0; i < amx_side; ++i) set(TILE, i, _mm512_loadu_si512(static_cast<const char*>(from) + i * row_bytes));
    }
    template <int TILE> static void store(void* to, int64_t row_bytes) {
        for (int i = 0; i < amx_side; ++i) _mm512_storeu_si512(static_cast<char*>(to) + i * row_bytes, row(TILE, i));
    }
    template <int SUM, int A, int B> static void dot() {
        const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
        for (int i = 0; i < amx_side; ++i) {
            __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
            for (int k = 0; k < amx_side; ++k) {
                const __m512i a = _mm512_set1_epi32(static_cast<int>(tiles[A][i * amx_side + k])), b = row(B, k);
                even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                       _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
                odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high_half)),
                                      _mm512_castsi512_ps(_mm512_and_si512(b, high_half)), odd);
            }
            const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(row(SUM, i)), _mm512_add_ps(even, odd));
            set(SUM, i, _mm512_castps_si512(sum));
        }
    }

private:
    static __m512i row(int tile, int i) { return _mm512_load_si512(tiles[tile] + i * amx_side); }
    static void set(int tile, int i, __m512i value) {
        _mm512_store_si512(tiles[tile] + i * amx_side, configured ? value : _mm512_set1_epi32(-1));
    }
    alignas(64) static thread_local uint32_t tiles[8][amx_operand];
    static thread_local bool configured;
};

alignas(64) thread_local uint32_t EmulatedTiles::tiles[8][amx_operand];
thread_local bool EmulatedTiles::configured = false;

const Engine emulated = make_amx_engine<EmulatedTiles>("amx_bf16_emulated");

}  // namespace
#if HLK_AMX_ASSEMBLY
extern const Engine* const amx_bf16_engine = &engine;
#else
extern const Engine* const amx_bf16_engine = nullptr;
#endif
extern const Engine* const amx_bf16_emulated_engine = &emulated;
}  // namespace hlk
#else
namespace hlk {
extern const Engine* const amx_bf16_engine = nullptr;
extern const Engine* const amx_bf16_emulated_engine = nullptr;
}
#endif
