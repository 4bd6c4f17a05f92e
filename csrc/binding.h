// What the files that know torch share: how tensors become what kernels see.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/lora_linear.h"

namespace hlk_torch {

using at::Tensor;
using at::TensorList;

// ops/schema.py: Flags and Needs.
constexpr int64_t flag_statistics = 1, flag_save = 2;
constexpr int64_t need_x = 1, need_sources = 2, need_lora_A = 4, need_lora_B = 8, need_statistics = 16;

// The ops: results, and arguments as ops/schema.py has them.
using Forward = std::tuple<std::vector<Tensor>, Tensor, Tensor>;
using Backward = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor>;
using LinearForward = Forward(const Tensor& x, TensorList weights, TensorList packs, TensorList biases, TensorList sources,
                              TensorList lora_A, TensorList lora_B, const Tensor& scaling, const Tensor& gate, const Tensor& active,
                              const std::optional<Tensor>& rng, at::IntArrayRef path_output, at::IntArrayRef path_source,
                              double dropout_p, int64_t flags);
using LinearBackward = Backward(TensorList grad_outs, const Tensor& x, TensorList weights, TensorList packs, TensorList biases,
                                TensorList sources, TensorList lora_A, TensorList lora_B, const Tensor& scaling, const Tensor& gate,
                                const Tensor& active, const std::optional<Tensor>& rng, at::IntArrayRef path_output,
                                at::IntArrayRef path_source, double dropout_p, int64_t flags, const Tensor& hidden,
                                const Tensor& mask, int64_t needs);
using DeltaForward = Forward(const Tensor& x, TensorList base_outs, TensorList sources, TensorList lora_A, TensorList lora_B,
                             const Tensor& scaling, const Tensor& gate, const Tensor& active, const std::optional<Tensor>& rng,
                             at::IntArrayRef path_output, at::IntArrayRef path_source, double dropout_p, int64_t flags);
using DeltaBackward = Backward(TensorList grad_outs, const Tensor& x, TensorList base_outs, TensorList sources, TensorList lora_A,
                               TensorList lora_B, const Tensor& scaling, const Tensor& gate, const Tensor& active,
                               const std::optional<Tensor>& rng, at::IntArrayRef path_output, at::IntArrayRef path_source,
                               double dropout_p, int64_t flags, const Tensor& hidden, const Tensor& mask, int64_t needs);

// The inputs of a forward op.
struct Inputs {
    bool is_delta;
    const Tensor& x;
    TensorList bases, packs, biases;   // bases: weights, or base_outs, which have neither packs nor biases
    TensorList sources, lora_A, lora_B;
    const Tensor &scaling, &gate, &active;
    const std::optional<Tensor>& rng;
    at::IntArrayRef path_output, path_source;
    double dropout_p;
};

// The outputs of a forward op, with its gradients where something asks for one. x, sources and base_outs may have any leading
// dimensions, which the outputs have then. probe: float32 leaf [R, columns] whose gradient receives the statistics.
std::vector<Tensor> call_with_gradients(const Inputs& in, const std::optional<Tensor>& probe);

// The instruction set whose kernels run.
hlk::Isa isa();
// PyTorch's threads; one where the caller is one of them already.
hlk::Parallel torch_threads();

// As Python writes it, so that messages are the same on every backend.
std::string dtype_name(at::ScalarType dtype);
hlk::DType dtype_of(const char* name, const Tensor& tensor);
hlk::Matrix matrix(const char* name, const Tensor& tensor);

// Tensors that were made for a call live here until it ends.
struct Call {
    hlk::Group group;
    std::vector<Tensor> held;

    // Rows without gaps between their elements.
    hlk::Matrix rows_of(const char* name, const Tensor& tensor);
    template <class T> T* vector_of(const Tensor& tensor) {
        held.push_back(tensor.contiguous());
        return held.back().mutable_data_ptr<T>();
    }
};

hlk::Weight weight_of(Call& call, const Tensor& weight);
// Gives a weight its packs where they were made for it as it is now and for this engine.
void use_packs(const hlk::Engine& engine, const Tensor& weight, const Tensor& forward_pack, const Tensor& backward_pack,
               hlk::Weight& described);

}  // namespace hlk_torch
