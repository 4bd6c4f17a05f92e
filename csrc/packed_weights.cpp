// Packed copies of frozen weights: made once by the caller, kept with the weight, and refused where they no longer fit it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "binding.h"

namespace hlk_torch {
namespace {

// What stands before the units of a pack: for what it was made. Not everything that changes a weight raises its version (writes
// through .data, and all under inference_mode), and an address is used again: hence the sample of the bits.
struct PackHeader {
    uint64_t fingerprint;
    const void* address;
    int64_t version, out_features, in_features;
    int32_t unit, lanes, unit_step, for_forward, magic;
    uint8_t padding[4];
};
static_assert(sizeof(PackHeader) == 64, "the units behind it stay aligned");
constexpr int32_t pack_magic = 0x484C4B32;

// A sample of the weight's bits, so that a write that no version counter saw does not go unnoticed.
uint64_t fingerprint(const hlk::Weight& weight, int64_t rows, int64_t columns) {
    constexpr int64_t samples = 32;
    uint64_t hash = 1469598103934665603ull;
    const int64_t size = hlk::size_of(weight.values.dtype), count = rows * columns;
    for (int64_t i = 0; i < samples && count > 0; ++i) {
        // Spread over the whole and over the columns: a stride that divides them would sample few of them.
        const int64_t at = (count - 1) * i / (samples - 1);
        uint32_t bits = 0;
        std::memcpy(&bits, weight.values.at(at / columns, at % columns).data, size);
        hash = (hash ^ bits) * 1099511628211ull;
    }
    return hash;
}

int64_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

PackHeader header_of(const hlk::Engine& engine, const Tensor& weight, const hlk::Weight& values) {
    const int64_t out = weight.size(0), in = weight.size(1);
    const uint64_t print = values.transposed ? fingerprint(values, in, out) : fingerprint(values, out, in);
    return {print, weight.const_data_ptr(), version_of(weight), out, in, engine.unit, engine.lanes, engine.unit_step, 0,
            pack_magic, {}};
}

int64_t pack_bytes(const hlk::Engine& engine, const Tensor& weight, bool for_forward) {
    const int64_t columns = weight.size(for_forward ? 0 : 1), depth = weight.size(for_forward ? 1 : 0);
    return sizeof(PackHeader) + 4 * hlk::packed_units(engine, columns, depth);
}

// The units of a pack, or nullptr where it was not made for this weight as it is now and this engine.
const uint32_t* usable_pack(const Tensor& pack, const hlk::Engine& engine, const Tensor& weight, PackHeader wanted, bool for_forward) {
    if (pack.scalar_type() != at::kByte || !pack.is_contiguous() || !pack.device().is_cpu()) return nullptr;
    if (pack.numel() != pack_bytes(engine, weight, for_forward)) return nullptr;
    wanted.for_forward = for_forward;
    const void* header = pack.const_data_ptr();
    if (std::memcmp(header, &wanted, sizeof(PackHeader)) != 0) return nullptr;
    return reinterpret_cast<const uint32_t*>(static_cast<const PackHeader*>(header) + 1);
}

Tensor make_pack(const hlk::Engine& engine, const Tensor& weight, const hlk::Weight& values, bool for_forward) {
    Tensor pack = at::empty({pack_bytes(engine, weight, for_forward)}, at::TensorOptions().dtype(at::kByte));
    auto* header = static_cast<PackHeader*>(pack.mutable_data_ptr());
    *header = header_of(engine, weight, values);
    header->for_forward = for_forward;
    hlk::pack_weight(engine, values, weight.size(0), weight.size(1), for_forward, reinterpret_cast<uint32_t*>(header + 1),
                     torch_threads());
    return pack;
}

// Packs are for calls of more than few rows: the others read the weight where it lies.
const hlk::Engine& packing_engine(const Tensor& weight) {
    return hlk::engine_for(isa(), dtype_of("weight", weight), hlk::few_rows + 1);
}

void check_packable(const Tensor& weight) {
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.device().is_cpu(), "weight must be [N, K] on the cpu, got ", weight.sizes(), " on ",
                      weight.device());
}

// Bytes of cpu_pack_weight's tensors; 0 where a dtype's units are wider than its elements: the pack would be larger than the weight.
int64_t cpu_packed_bytes(const Tensor& weight, bool needs_grad) {
    check_packable(weight);
    const auto dtype = weight.scalar_type();
    if (dtype != at::kFloat && dtype != at::kBFloat16) return 0;
    const hlk::Engine& engine = packing_engine(weight);
    if (engine.unit * hlk::size_of(dtype_of("weight", weight)) != 4) return 0;
    return pack_bytes(engine, weight, true) + (needs_grad ? pack_bytes(engine, weight, false) : 0);
}

std::vector<Tensor> cpu_pack_weight(const Tensor& weight, bool needs_grad) {
    check_packable(weight);
    Call call;
    const hlk::Engine& engine = packing_engine(weight);
    const hlk::Weight values = weight_of(call, weight);
    return {make_pack(engine, weight, values, true),
            needs_grad ? make_pack(engine, weight, values, false) : at::empty({0}, at::TensorOptions().dtype(at::kByte))};
}

}  // namespace

void use_packs(const hlk::Engine& engine, const Tensor& weight, const Tensor& forward_pack, const Tensor& backward_pack,
               hlk::Weight& described) {
    const PackHeader wanted = header_of(engine, weight, described);
    described.forward_pack = usable_pack(forward_pack, engine, weight, wanted, true);
    described.backward_pack = usable_pack(backward_pack, engine, weight, wanted, false);
}

}  // namespace hlk_torch

TORCH_LIBRARY_FRAGMENT(heterolora_kernels, m) {
    m.def("cpu_packed_bytes(Tensor weight, bool needs_grad) -> int", &hlk_torch::cpu_packed_bytes);
    m.def("cpu_pack_weight(Tensor weight, bool needs_grad) -> Tensor[]", &hlk_torch::cpu_pack_weight);
}
