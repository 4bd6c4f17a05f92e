// Which instruction sets this build and this processor have.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hlk {

extern const Engine* const portable_engine;
extern const Engine* const avx2_engine;
extern const Engine* const avx512_engine;
extern const Engine* const avx512_bf16_engine;
extern const Engine* const amx_bf16_engine;
extern const Engine* const amx_bf16_emulated_engine;

namespace {

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
    bool amx_allowed = false;   // the system gives this process the state of the tiles
};

#if defined(__x86_64__)
// Linux saves the 8 KB of the tiles only for processes that asked: once for all threads, also those that come later.
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long request_permission = 0x1023, tile_data = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

Features detect() {
    Features found;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return found;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xE6) == 0xE6, tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned leaves = a;
    const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
    const bool amx = tiles && (d >> 24 & 1) && (d >> 22 & 1);   // AMX-TILE, AMX-BF16
    found.avx2 = ymm && fma && f16c && (b >> 5 & 1);
    found.avx512 = found.avx2 && zmm && avx512;
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = found.avx512 && (a >> 5 & 1);
    found.amx_bf16 = found.avx512_bf16 && amx;
    found.amx_allowed = found.amx_bf16 && request_amx();
#endif
    return found;
}

const Features& features() {
    static const Features found = detect();
    return found;
}

}  // namespace

const char* isa_name(Isa isa) {
    static const char* const names[num_isas] = {"portable", "avx2", "avx512", "avx512_bf16",
                                               "amx_bf16", "amx_bf16_emulated"};
    return names[static_cast<int>(isa)];
}

const char* isa_missing(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::portable: return nullptr;
        case Isa::avx2: return features().avx2 ? nullptr : "the processor has no AVX2 with FMA and F16C";
        case Isa::avx512: return features().avx512 ? nullptr : "the processor has no AVX-512 (F, BW, DQ, VL)";
        case Isa::amx_bf16:
            if (amx_bf16_engine == nullptr) return "built by a compiler that does not know AMX";
            if (!features().amx_bf16) return "the processor has no AMX bf16 tiles";
            return features().amx_allowed ? nullptr : "the system does not let this process use the AMX tiles";
        default: return features().avx512_bf16 ? nullptr : "the processor has no AVX-512 bf16 instructions";
    }
#else
    return isa == Isa::portable ? nullptr : "built for another architecture than x86-64";
#endif
}

Isa best_isa() {
    int isa = static_cast<int>(Isa::amx_bf16);
    while (isa_missing(static_cast<Isa>(isa)) != nullptr) --isa;
    return static_cast<Isa>(isa);
}

const Engine& engine_for(Isa isa, DType dtype, int64_t rows) {
    if (isa == Isa::portable) return *portable_engine;
    if (isa == Isa::avx2) return *avx2_engine;
    if (isa == Isa::avx512 || dtype != DType::bf16) return *avx512_engine;
    // A tile of 16 rows for one row would be empty, and few rows read the weight where it lies.
    if (isa == Isa::avx512_bf16 || rows <= few_rows) return *avx512_bf16_engine;
    return isa == Isa::amx_bf16 ? *amx_bf16_engine : *amx_bf16_emulated_engine;
}

}  // namespace hlk
