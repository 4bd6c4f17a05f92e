// AVX-512 without bf16 instructions: sums in float32 for every dtype.
#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "avx512.h"

namespace hlk {
namespace {
const Engine engine = make_engine<Avx512, FloatUnit<Avx512>>("avx512");
}
extern const Engine* const avx512_engine = &engine;
}  // namespace hlk
#else
namespace hlk {
extern const Engine* const avx512_engine = nullptr;
}
#endif
