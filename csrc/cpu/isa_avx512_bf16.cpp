// AVX-512 with bf16: a unit is a pair of bf16, multiplied and summed in float32 by one instruction (vdpbf16ps).
#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "avx512_bf16.h"

namespace hlk {
namespace {
const Engine engine = make_engine<Avx512Bf16, PairUnit<Avx512Bf16>>("avx512_bf16");
}
extern const Engine* const avx512_bf16_engine = &engine;
}  // namespace hlk
#else
namespace hlk {
extern const Engine* const avx512_bf16_engine = nullptr;
}
#endif
