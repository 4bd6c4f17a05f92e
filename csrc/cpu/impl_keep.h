// Dropout's draws. Part of kernels_impl.h.
#pragma once

#include "impl_vectors.h"

namespace hlk {
namespace {

template <class I, class = void> struct HasDraws : std::false_type {};
template <class I> struct HasDraws<I, std::void_t<decltype(&I::draws_at_least)>> : std::true_type {};

// Philox4x32-10 for counters (column / 8, row, source, 0); see ops/rng.py for the rule and its source.
template <class I>
void keep_bits(uint64_t key, uint32_t row, uint32_t source, int64_t columns, uint32_t threshold, uint8_t* out) {
    const int64_t bytes = (columns + 7) / 8;
    if constexpr (HasDraws<I>::value) {
        for (int64_t first = 0; first < bytes; first += 8) {
            const uint64_t bits = I::draws_at_least(key, static_cast<uint32_t>(first), row, source, threshold);
            __builtin_memcpy(out + first, &bits, bytes - first < 8 ? bytes - first : 8);
        }
    } else {
        constexpr int N = 16;
        for (int64_t first = 0; first < bytes; first += N) {
            uint32_t c0[N], c1[N], c2[N], c3[N];
            for (int i = 0; i < N; ++i) {
                c0[i] = static_cast<uint32_t>(first) + i;
                c1[i] = row;
                c2[i] = source;
                c3[i] = 0;
            }
            uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
            for (int round = 0; round < 10; ++round) {
                for (int i = 0; i < N; ++i) {
                    const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
                    const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
                    c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
                    c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
                    c1[i] = static_cast<uint32_t>(p1);
                    c3[i] = static_cast<uint32_t>(p0);
                }
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            uint8_t bits[N];
            for (int i = 0; i < N; ++i) {
                uint32_t byte = 0;
                byte |= static_cast<uint32_t>((c0[i] & 0xFFFF) >= threshold) << 0;
                byte |= static_cast<uint32_t>((c0[i] >> 16) >= threshold) << 1;
                byte |= static_cast<uint32_t>((c1[i] & 0xFFFF) >= threshold) << 2;
                byte |= static_cast<uint32_t>((c1[i] >> 16) >= threshold) << 3;
                byte |= static_cast<uint32_t>((c2[i] & 0xFFFF) >= threshold) << 4;
                byte |= static_cast<uint32_t>((c2[i] >> 16) >= threshold) << 5;
                byte |= static_cast<uint32_t>((c3[i] & 0xFFFF) >= threshold) << 6;
                byte |= static_cast<uint32_t>((c3[i] >> 16) >= threshold) << 7;
                bits[i] = static_cast<uint8_t>(byte);
            }
            __builtin_memcpy(out + first, bits, bytes - first < N ? bytes - first : N);
        }
    }
    // Columns that do not exist are 0, as on every backend.
    if (columns % 8 != 0) out[bytes - 1] &= static_cast<uint8_t>((1 << (columns % 8)) - 1);
}

}  // namespace
}  // namespace hlk
