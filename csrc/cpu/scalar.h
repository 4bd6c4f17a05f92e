// Single numbers of 16 bits as floats, in plain C++: for code that is compiled for any processor, not for the instruction sets'.
#pragma once

#include <cstdint>

namespace hlk {

inline float float_of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of_bf16(uint16_t half) { return float_of_bits(static_cast<uint32_t>(half) << 16); }

inline float float_of_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    if (magnitude >= 0x400) return float_of_bits(sign | ((magnitude << 13) + 0x38000000));
    return float_of_bits(sign | bits_of_float(static_cast<float>(magnitude) * 0x1p-24f));
}

}  // namespace hlk
