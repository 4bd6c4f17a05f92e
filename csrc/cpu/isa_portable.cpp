// Plain C++ for any processor: vectors are arrays, which the compiler may turn into what the target has.
#include "kernels_impl.h"
#include "scalar.h"

namespace hlk {
namespace {

inline uint16_t bf16_of(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // stays a nan
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);                // to nearest, ties to even
}

inline uint16_t f16_of(float value) {
    const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to infinity
    if (magnitude < 0x38800000) {                                             // subnormal: the adder rounds to even
        const uint32_t rounded = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
        return static_cast<uint16_t>(sign | rounded);
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

struct Portable {
    static constexpr int W = 8;
    static constexpr int MAX_ROWS = 4;
    static constexpr int DOT_ROWS = 2;   // with 4 columns each, in registers
    struct F { float v[W]; };
    struct U { uint32_t v[W]; };

    template <class Fn> static F make(Fn fn) {
        F f;
        for (int i = 0; i < W; ++i) f.v[i] = fn(i);
        return f;
    }
    template <class Fn> static U make_units(Fn fn) {
        U u;
        for (int i = 0; i < W; ++i) u.v[i] = fn(i);
        return u;
    }
    static F zero() { return F{}; }
    static F set1(float x) { return make([&](int) { return x; }); }
    static F load(const float* p) { return make([&](int i) { return p[i]; }); }
    static F load_bf16(const uint16_t* p) { return make([&](int i) { return float_of_bf16(p[i]); }); }
    static F load_f16(const uint16_t* p) { return make([&](int i) { return float_of_f16(p[i]); }); }
    static void store(float* p, F f) { for (int i = 0; i < W; ++i) p[i] = f.v[i]; }
    static void store_bf16(uint16_t* p, F f) { for (int i = 0; i < W; ++i) p[i] = bf16_of(f.v[i]); }
    static void store_f16(uint16_t* p, F f) { for (int i = 0; i < W; ++i) p[i] = f16_of(f.v[i]); }
    static F add(F a, F b) { return make([&](int i) { return a.v[i] + b.v[i]; }); }
    static F mul(F a, F b) { return make([&](int i) { return a.v[i] * b.v[i]; }); }
    static F fma(F a, F b, F c) { return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static F abs(F a) { return make([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; }); }
    static float sum(F a) {
        float total = 0;
        for (int i = 0; i < W; ++i) total += a.v[i];
        return total;
    }
    static F keep(F a, uint64_t bits) { return make([&](int i) { return bits >> i & 1 ? a.v[i] : 0.0f; }); }
    static F as_floats(U u) { return make([&](int i) { return float_of_bits(u.v[i]); }); }
    static U as_units(F f) { return make_units([&](int i) { return bits_of_float(f.v[i]); }); }
    static U zero_units() { return U{}; }
    static U load_units(const void* p) {
        U u;
        __builtin_memcpy(u.v, p, sizeof(u.v));
        return u;
    }
    static void store_units(uint32_t* p, U u) { __builtin_memcpy(p, u.v, sizeof(u.v)); }
    static void store_units(uint32_t* p, U u, int64_t count) { __builtin_memcpy(p, u.v, 4 * count); }
    static U broadcast(const uint32_t* p) { return make_units([&](int) { return *p; }); }
    static void transpose(U* rows) {
        for (int i = 0; i < W; ++i) {
            for (int j = 0; j < i; ++j) {
                const uint32_t kept = rows[i].v[j];
                rows[i].v[j] = rows[j].v[i];
                rows[j].v[i] = kept;
            }
        }
    }
};

const Engine engine = make_engine<Portable, FloatUnit<Portable>>("portable");

}  // namespace

extern const Engine* const portable_engine = &engine;

}  // namespace hlk
