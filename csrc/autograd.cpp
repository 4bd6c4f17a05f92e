// The ops with their gradients: what the function of heterolora_kernels/ops/autograd.py does, without its way through Python in every
// call. It calls the forward and backward ops through the dispatcher, so that modes and tensor subclasses see them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "binding.h"

namespace hlk_torch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find_op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Forward forward_op(const Inputs& in, int64_t flags) {
    static const auto linear = find_op<LinearForward>("heterolora_kernels::lora_linear_cpu");
    static const auto delta = find_op<DeltaForward>("heterolora_kernels::lora_delta_cpu");
    if (in.is_delta) {
        return delta.call(in.x, in.bases, in.sources, in.lora_A, in.lora_B, in.scaling, in.gate, in.active, in.rng, in.path_output,
                          in.path_source, in.dropout_p, flags);
    }
    return linear.call(in.x, in.bases, in.packs, in.biases, in.sources, in.lora_A, in.lora_B, in.scaling, in.gate, in.active, in.rng,
                       in.path_output, in.path_source, in.dropout_p, flags);
}

Backward backward_op(const Inputs& in, TensorList grad_outs, int64_t flags, const Tensor& hidden, const Tensor& mask, int64_t needs) {
    static const auto linear = find_op<LinearBackward>("heterolora_kernels::lora_linear_backward_cpu");
    static const auto delta = find_op<DeltaBackward>("heterolora_kernels::lora_delta_backward_cpu");
    if (in.is_delta) {
        return delta.call(grad_outs, in.x, in.bases, in.sources, in.lora_A, in.lora_B, in.scaling, in.gate, in.active, in.rng,
                          in.path_output, in.path_source, in.dropout_p, flags, hidden, mask, needs);
    }
    return linear.call(grad_outs, in.x, in.bases, in.packs, in.biases, in.sources, in.lora_A, in.lora_B, in.scaling, in.gate,
                       in.active, in.rng, in.path_output, in.path_source, in.dropout_p, flags, hidden, mask, needs);
}

// [..., K] as the ops take it.
Tensor flat(const Tensor& tensor) {
    if (tensor.dim() == 2 || tensor.dim() == 0) return tensor;
    const auto leading = tensor.sizes().slice(0, tensor.dim() - 1);
    return tensor.reshape({c10::multiply_integers(leading), tensor.size(-1)});
}

variable_list flat(TensorList tensors) {
    variable_list found;
    for (const Tensor& tensor : tensors) found.push_back(flat(tensor));
    return found;
}

// Inputs with x, sources and base_outs flattened, and what brings results into the shape that they came in.
struct Flat {
    explicit Flat(const Inputs& in)
        : x(flat(in.x)), base_outs(in.is_delta ? flat(in.bases) : variable_list()), sources(flat(in.sources)),
          inputs{in.is_delta, x, in.is_delta ? TensorList(base_outs) : in.bases, in.packs, in.biases, sources, in.lora_A, in.lora_B,
                 in.scaling, in.gate, in.active, in.rng, in.path_output, in.path_source, in.dropout_p} {}
    Flat(const Flat&) = delete;

    Tensor x;
    variable_list base_outs, sources;
    Inputs inputs;
};

// `tensor` [M, N] with the leading dimensions of `like` in the place of M.
Tensor shaped(Tensor tensor, const Tensor& like) {
    if (like.dim() == 2) return tensor;
    at::DimVector sizes(like.sizes());
    sizes.back() = tensor.size(-1);
    return tensor.view(sizes);
}

Forward shaped_forward(const Inputs& in, int64_t flags) {
    const Flat flattened(in);
    Forward found = forward_op(flattened.inputs, flags);
    std::vector<Tensor>& outs = std::get<0>(found);
    for (size_t i = 0; i < outs.size(); ++i) outs[i] = shaped(std::move(outs[i]), in.is_delta ? in.bases[i] : in.x);
    return found;
}

// Gradients that raise where they are differentiated.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
    static variable_list forward(AutogradContext*, TensorList grads) {
        variable_list copies;
        for (const Tensor& grad : grads) copies.push_back(grad.clone());
        return copies;
    }
    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
    }
    static void mark(variable_list& grads) {
        variable_list leaves;
        for (const Tensor& grad : grads) {
            if (grad.defined()) leaves.push_back(grad.detach().set_requires_grad(true));
        }
        const variable_list marked = apply(TensorList(leaves));
        size_t next = 0;
        for (Tensor& grad : grads) {
            if (grad.defined()) grad = marked[next++];
        }
    }
};

// Differentiable in this order: x, probe if there is one, bases, biases, sources, lora_A, lora_B.
struct LoraOp : torch::autograd::Function<LoraOp> {
    static variable_list forward(AutogradContext* ctx, const Inputs* in, bool has_probe, TensorList) {
        const int64_t flags = has_probe ? flag_save | flag_statistics : flag_save;
        Forward found = [&] {
            at::AutoDispatchBelowADInplaceOrView below;
            return shaped_forward(*in, flags);
        }();
        auto& [outs, hidden, mask] = found;
        const TensorList lists[] = {in->bases, in->packs, in->biases, in->sources, in->lora_A, in->lora_B};
        std::vector<int64_t> numbers{in->is_delta, has_probe, flags};
        variable_list saved{in->x, in->scaling, in->gate, in->active, in->rng.value_or(Tensor()), std::move(hidden), std::move(mask)};
        for (const TensorList& list : lists) {
            numbers.push_back(static_cast<int64_t>(list.size()));
            saved.insert(saved.end(), list.begin(), list.end());
        }
        numbers.insert(numbers.end(), in->path_output.begin(), in->path_output.end());
        numbers.insert(numbers.end(), in->path_source.begin(), in->path_source.end());
        // Zeros in the place of an unused output's gradient would cost its matmuls, and 0 * inf is nan.
        ctx->set_materialize_grads(false);
        ctx->saved_data["numbers"] = std::move(numbers);
        ctx->saved_data["dropout_p"] = in->dropout_p;
        ctx->save_for_backward(std::move(saved));
        return std::move(outs);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outs) {
        variable_list grads;
        {
            at::AutoGradMode no_grad(false);
            grads = gradients(ctx, grad_outs);
        }
        if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(grad_outs)) OnceDifferentiable::mark(grads);
        return grads;
    }

private:
    static variable_list gradients(AutogradContext* ctx, const variable_list& grad_outs) {
        const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
        const variable_list saved = ctx->get_saved_variables();
        const bool has_probe = numbers[1];
        TensorList lists[6];
        const Tensor* next = saved.data() + 7;
        for (int i = 0; i < 6; ++i) {
            lists[i] = TensorList(next, numbers[3 + i]);
            next += numbers[3 + i];
        }
        const auto& [bases, packs, biases, sources, lora_A, lora_B] = lists;
        const size_t paths = lora_A.size();
        const int64_t* places = numbers.data() + 9;
        const std::optional<Tensor> rng = saved[4].defined() ? std::optional<Tensor>(saved[4]) : std::nullopt;
        const Flat flattened({numbers[0] != 0, saved[0], bases, packs, biases, sources, lora_A, lora_B, saved[1], saved[2], saved[3],
                              rng, {places, paths}, {places + paths, paths}, ctx->saved_data["dropout_p"].toDouble()});
        const Inputs& in = flattened.inputs;

        // Which edges ask, in the order of the inputs.
        const size_t total = 1 + has_probe + bases.size() + biases.size() + sources.size() + 2 * paths;
        const size_t at_bases = 1 + has_probe, at_biases = at_bases + bases.size(), at_sources = at_biases + biases.size(),
                     at_A = at_sources + sources.size(), at_B = at_A + paths;
        const auto asks = [&](size_t edge) { return ctx->needs_input_grad(edge); };
        const auto any_asks = [&](size_t begin, size_t end) {
            for (; begin < end; ++begin) {
                if (asks(begin)) return true;
            }
            return false;
        };
        const bool asks_probe = has_probe && asks(1);
        const int64_t needs = asks(0) * need_x | any_asks(at_sources, at_A) * need_sources | any_asks(at_A, at_B) * need_lora_A |
                              any_asks(at_B, total) * need_lora_B | asks_probe * need_statistics;
        variable_list grads(2 + total);   // two inputs in front are no tensors
        Tensor* grad_of = grads.data() + 2;
        if (std::none_of(grad_outs.begin(), grad_outs.end(), [](const Tensor& grad) { return grad.defined(); })) return grads;
        // An output that the loss does not use is left out, with its paths: their parameters get no gradient.
        variable_list given;
        for (const Tensor& grad : grad_outs) given.push_back(grad.defined() ? flat(grad) : at::empty({0}, in.x.options()));
        const auto uses = [&](size_t p) { return grad_outs[in.path_output[p]].defined(); };
        if (needs != 0) {
            at::AutoDispatchBelowADInplaceOrView below;
            auto [grad_x, grad_sources, grad_A, grad_B, stats] = backward_op(in, given, numbers[2], saved[5], saved[6], needs);
            if (asks(0)) grad_of[0] = shaped(std::move(grad_x), saved[0]);
            if (asks_probe) grad_of[1] = std::move(stats);
            for (size_t p = 0; p < paths; ++p) {
                if (!uses(p)) continue;
                const int64_t source = in.path_source[p];
                if (source >= 0 && asks(at_sources + source)) {
                    grad_of[at_sources + source] = shaped(grad_sources[source], sources[source]);
                }
                if (asks(at_A + p)) grad_of[at_A + p] = std::move(grad_A[p]);
                if (asks(at_B + p)) grad_of[at_B + p] = std::move(grad_B[p]);
            }
        }
        for (size_t i = 0; i < bases.size(); ++i) {
            if (!grad_outs[i].defined()) continue;
            if (asks(at_bases + i)) grad_of[at_bases + i] = in.is_delta ? grad_outs[i] : at::mm(given[i].t(), in.x);
            if (!in.is_delta && asks(at_biases + i)) grad_of[at_biases + i] = given[i].sum(0);
        }
        return grads;
    }
};

}  // namespace

std::vector<Tensor> call_with_gradients(const Inputs& in, const std::optional<Tensor>& probe) {
    if (at::GradMode::is_enabled()) {
        variable_list inputs{in.x};
        if (probe.has_value()) inputs.push_back(*probe);
        for (const TensorList& list : {in.bases, in.biases, in.sources, in.lora_A, in.lora_B}) {
            inputs.insert(inputs.end(), list.begin(), list.end());
        }
        if (torch::autograd::any_variable_requires_grad(inputs)) return LoraOp::apply(&in, probe.has_value(), TensorList(inputs));
    }
    return std::get<0>(shaped_forward(in, 0));
}

}  // namespace hlk_torch
