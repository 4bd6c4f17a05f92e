// Which instruction sets this build and this processor have.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hlk {

extern const Engine* const portable_engine;
extern const Engine* const avx2_engine;
extern const Engine* const avx512_engine;
extern const Engine* const avx512_bf16_engine;

namespace {

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

Features detect() {
    Features found;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return found;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xE6) == 0xE6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned leaves = a;
    const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
    found.avx2 = ymm && fma && f16c && (b >> 5 & 1);
    found.avx512 = found.avx2 && zmm && avx512;
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = found.avx512 && (a >> 5 & 1);
#endif
    return found;
}

const Features& features() {
    static const Features found = detect();
    return found;
}

}  // namespace

const char* isa_name(Isa isa) {
    static const char* const names[num_isas] = {"portable", "avx2", "avx512", "avx512_bf16"};
    return names[static_cast<int>(isa)];
}

const char* isa_missing(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::portable: return nullptr;
        case Isa::avx2: return features().avx2 ? nullptr : "the processor has no AVX2 with FMA and F16C";
        case Isa::avx512: return features().avx512 ? nullptr : "the processor has no AVX-512 (F, BW, DQ, VL)";
        default: return features().avx512_bf16 ? nullptr : "the processor has no AVX-512 bf16 instructions";
    }
#else
    return isa == Isa::portable ? nullptr : "built for another architecture than x86-64";
#endif
}

const Engine& engine_for(Isa isa, DType dtype) {
    switch (isa) {
        case Isa::portable: return *portable_engine;
        case Isa::avx2: return *avx2_engine;
        case Isa::avx512: return *avx512_engine;
        default: return dtype == DType::bf16 ? *avx512_bf16_engine : *avx512_engine;
    }
}

}  // namespace hlk
