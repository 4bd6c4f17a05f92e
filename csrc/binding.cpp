// The ops: checks what memory safety hangs on, allocates, and hands pointers to the kernels, which know nothing of torch.
//
// The ops' schemas and fakes are defined in Python (heterolora_kernels/ops/schema.py); here are their implementations.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <tuple>

#include "binding.h"
#include "cpu/row_statistics.h"

namespace hlk_torch {
namespace {

std::atomic<int> chosen_isa{-1};

}  // namespace

hlk::Isa isa() {
    int isa = chosen_isa.load();
    if (isa < 0) {
        isa = static_cast<int>(hlk::best_isa());
        chosen_isa.store(isa);
    }
    return static_cast<hlk::Isa>(isa);
}

namespace {

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (int i = 0; i < hlk::num_isas; ++i) names.emplace_back(hlk::isa_name(static_cast<hlk::Isa>(i)));
    return names;
}

// An empty string where it can run.
std::string cpu_isa_missing(c10::string_view name) {
    for (int i = 0; i < hlk::num_isas; ++i) {
        const auto isa = static_cast<hlk::Isa>(i);
        if (name != hlk::isa_name(isa)) continue;
        const char* reason = hlk::isa_missing(isa);
        return reason == nullptr ? "" : reason;
    }
    return "no such instruction set";
}

std::string cpu_isa() { return hlk::isa_name(isa()); }

void set_cpu_isa(c10::string_view name) {
    const std::string reason = cpu_isa_missing(name);
    TORCH_CHECK_VALUE(reason.empty(), "instruction set ", name, " cannot be used: ", reason);
    for (int i = 0; i < hlk::num_isas; ++i) {
        if (name == hlk::isa_name(static_cast<hlk::Isa>(i))) chosen_isa.store(i);
    }
}

std::vector<std::string> cpu_stats_columns() {
    return {hlk::stats_columns, hlk::stats_columns + hlk::num_stats_columns};
}

}  // namespace

hlk::Parallel torch_threads() {
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    return {threads, [threads](int64_t count, const std::function<void(int64_t)>& task) {
                if (threads == 1 || count <= 1) {
                    for (int64_t i = 0; i < count; ++i) task(i);
                    return;
                }
                std::atomic<int64_t> next{0};
                at::parallel_for(0, std::min<int64_t>(threads, count), 1, [&](int64_t begin, int64_t end) {
                    for (int64_t t = begin; t < end; ++t) {
                        for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
                    }
                });
            }};
}

std::string dtype_name(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat: return "torch.float32";
        case at::kDouble: return "torch.float64";
        case at::kBFloat16: return "torch.bfloat16";
        case at::kHalf: return "torch.float16";
        case at::kInt: return "torch.int32";
        case at::kLong: return "torch.int64";
        case at::kByte: return "torch.uint8";
        default: return c10::toString(dtype);
    }
}

hlk::DType dtype_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return hlk::DType::f32;
        case at::kBFloat16: return hlk::DType::bf16;
        case at::kHalf: return hlk::DType::f16;
        default:
            TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16 on the cpu backend, got ",
                             dtype_name(tensor.scalar_type()));
    }
}

hlk::Matrix matrix(const char* name, const Tensor& tensor) {
    return {tensor.const_data_ptr(), dtype_of(name, tensor), tensor.dim() == 2 ? tensor.stride(0) : tensor.numel()};
}

hlk::Matrix Call::rows_of(const char* name, const Tensor& tensor) {
    held.push_back(tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : tensor.contiguous());
    return matrix(name, held.back());
}

hlk::Weight weight_of(Call& call, const Tensor& weight) {
    hlk::Weight result;
    if (weight.stride(1) != 1 && weight.stride(0) == 1) {
        result.transposed = true;
        result.values = call.rows_of("weights", weight.t());
    } else {
        result.values = call.rows_of("weights", weight);
    }
    return result;
}

namespace {

struct Shared {
    TensorList sources, lora_A, lora_B;
    const Tensor &scaling, &gate, &active;
    const std::optional<Tensor>& rng;
    at::IntArrayRef path_output, path_source;
    double dropout_p;
    int64_t flags;
};

void check_like(const char* name, int64_t index, const Tensor& tensor, const Tensor& x) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, "[", index, "] must have the dtype of x (", dtype_name(x.scalar_type()),
                     "), got ", dtype_name(tensor.scalar_type()));
    TORCH_CHECK_VALUE(tensor.device() == x.device(), name, "[", index, "] must be on the device of x (", x.device(), "), got ",
                      tensor.device());
}

void check_vector(const char* name, const Tensor& tensor, at::ScalarType dtype, int64_t size) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
                     dtype_name(tensor.scalar_type()));
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the device of x (cpu), got ", tensor.device());
}

int64_t round_up_8(int64_t value) { return (value + 7) / 8 * 8; }

uint32_t threshold_of(double dropout_p) {
    // Python's round: half to even, as nearbyint does in the default mode.
    return static_cast<uint32_t>(std::nearbyint(65536.0 * dropout_p));
}

// Sources, paths and dropout of a call; N of each output must be known already.
void describe_paths(Call& call, const Tensor& x, const Shared& s) {
    hlk::Group& g = call.group;
    TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got shape ", x.sizes());
    g.dtype = dtype_of("x", x);
    g.rows = x.size(0);
    g.engine = &hlk::engine_for(isa(), g.dtype, g.rows);
    g.sources.resize(1 + s.sources.size());
    g.sources[0].values = call.rows_of("x", x);
    g.sources[0].columns = x.size(1);
    for (size_t j = 0; j < s.sources.size(); ++j) {
        const Tensor& source = s.sources[j];
        TORCH_CHECK_VALUE(source.dim() == 2, "sources[", j, "] must be [M, K_", j, "], got shape ", source.sizes());
        TORCH_CHECK_VALUE(source.size(0) == g.rows, "sources[", j, "] must have M = ", g.rows, " rows as x has, got ",
                          source.size(0));
        check_like("sources", j, source, x);
        g.sources[1 + j].values = call.rows_of("sources", source);
        g.sources[1 + j].columns = source.size(1);
    }
    const size_t paths = s.lora_A.size();
    TORCH_CHECK_VALUE(s.lora_B.size() == paths, "lora_B must have one entry per path (", paths, "), got ", s.lora_B.size());
    TORCH_CHECK_VALUE(s.path_output.size() == paths, "path_output must have one entry per path (", paths, "), got ",
                      s.path_output.size());
    TORCH_CHECK_VALUE(s.path_source.size() == paths, "path_source must have one entry per path (", paths, "), got ",
                      s.path_source.size());
    int64_t total = 0;
    for (const Tensor& a : s.lora_A) total += a.dim() == 2 ? a.size(0) : 0;
    check_vector("scaling", s.scaling, at::kFloat, paths);
    check_vector("gate", s.gate, at::kFloat, total);
    check_vector("active", s.active, at::kInt, paths);
    const float* scaling = call.vector_of<float>(s.scaling);
    const float* gate = call.vector_of<float>(s.gate);
    const int32_t* active = call.vector_of<int32_t>(s.active);
    g.paths.resize(paths);
    std::vector<bool> read(g.sources.size(), false);
    int64_t column = 0;
    for (size_t p = 0; p < paths; ++p) {
        const Tensor &a = s.lora_A[p], &b = s.lora_B[p];
        hlk::Path& path = g.paths[p];
        TORCH_CHECK_VALUE(s.path_output[p] >= 0 && s.path_output[p] < static_cast<int64_t>(g.outputs.size()), "path_output[", p,
                          "] must be in [0, ", g.outputs.size(), "), got ", s.path_output[p]);
        TORCH_CHECK_VALUE(s.path_source[p] >= -1 && s.path_source[p] < static_cast<int64_t>(s.sources.size()), "path_source[", p,
                          "] must be in [-1, ", s.sources.size(), "), got ", s.path_source[p]);
        path.output = static_cast<int>(s.path_output[p]);
        path.source = static_cast<int>(s.path_source[p]) + 1;
        read[path.source] = true;
        const int64_t in = g.sources[path.source].columns, out = g.outputs[path.output].columns;
        TORCH_CHECK_VALUE(a.dim() == 2 && a.size(1) == in, "lora_A[", p, "] must be [r, ", in, "], got shape ", a.sizes());
        TORCH_CHECK_VALUE(b.dim() == 2 && b.size(0) == out && b.size(1) == a.size(0), "lora_B[", p, "] must be [", out, ", ",
                          a.size(0), "], got shape ", b.sizes());
        TORCH_CHECK_TYPE(b.scalar_type() == a.scalar_type(), "lora_B[", p, "] must have the dtype of lora_A[", p, "] (",
                         dtype_name(a.scalar_type()), "), got ", dtype_name(b.scalar_type()));
        TORCH_CHECK_VALUE(a.device().is_cpu(), "lora_A[", p, "] must be on the device of x (cpu), got ", a.device());
        TORCH_CHECK_VALUE(b.device().is_cpu(), "lora_B[", p, "] must be on the device of x (cpu), got ", b.device());
        path.rank = a.size(0);
        path.rows = s.flags & flag_statistics ? path.rank : std::clamp<int64_t>(active[p], 0, path.rank);
        path.lora_A = call.rows_of("lora_A", a);
        path.lora_B = call.rows_of("lora_B", b);
        path.scaling = scaling[p];
        path.gate = gate;
        path.hidden_column = column;
        gate += path.rank;
        column += round_up_8(path.rank);
    }
    g.hidden_ld = column;
    for (size_t j = 0; j < s.sources.size(); ++j) {
        TORCH_CHECK_VALUE(read[1 + j], "sources[", j, "] is read by no path: no entry of path_source is ", j);
    }
    TORCH_CHECK_VALUE(s.dropout_p >= 0 && s.dropout_p <= 1, "dropout_p must be in [0, 1], got ", s.dropout_p);
    TORCH_CHECK_VALUE(s.rng.has_value() == (s.dropout_p > 0), "rng must be given exactly where dropout_p > 0, got dropout_p=",
                      s.dropout_p, " and rng=", s.rng.has_value() ? "a tensor" : "None");
    TORCH_CHECK_VALUE(s.flags >= 0 && s.flags < 2 * flag_save, "flags must be a union of Flags, got ", s.flags);
    g.dropout = s.dropout_p > 0;
    if (!g.dropout) return;
    check_vector("rng", *s.rng, at::kLong, 1);
    g.dropout_key = static_cast<uint64_t>(*s.rng->const_data_ptr<int64_t>());
    g.dropout_threshold = threshold_of(s.dropout_p);
    g.dropout_scale = g.dropout_threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - g.dropout_threshold));
    // The bytes of each source in a row of the mask, x first and only if a path reads it.
    int64_t width = 0;
    for (size_t key = 0; key < g.sources.size(); ++key) {
        if (key > 0 || read[0]) width += (g.sources[key].columns + 7) / 8;
    }
    int64_t first = 0;
    for (size_t key = 0; key < g.sources.size(); ++key) {
        if (key == 0 && !read[0]) continue;
        // The place in a row; the tensor's address is added where it is known.
        g.sources[key].keep = {reinterpret_cast<const uint8_t*>(first), width};
        first += (g.sources[key].columns + 7) / 8;
        g.sources[key].keep_out = reinterpret_cast<uint8_t*>(1);
    }
}

int64_t mask_width(const hlk::Group& g) {
    for (const hlk::Source& source : g.sources) {
        if (source.keep_out != nullptr) return source.keep.ld;
    }
    return 0;
}

void place_mask(hlk::Group& g, uint8_t* data, bool written) {
    for (hlk::Source& source : g.sources) {
        if (source.keep_out == nullptr) continue;
        source.keep.bits = data + reinterpret_cast<intptr_t>(source.keep.bits);
        source.keep_out = written ? const_cast<uint8_t*>(source.keep.bits) : nullptr;
    }
}

void describe_linears(Call& call, const Tensor& x, TensorList weights, TensorList packs, TensorList biases) {
    TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got shape ", x.sizes());
    TORCH_CHECK_VALUE(!weights.empty(), "weights must hold at least one weight, got none");
    TORCH_CHECK_VALUE(packs.empty() || packs.size() == 2 * weights.size(), "packs must be empty or hold two tensors per weight (",
                      2 * weights.size(), "), got ", packs.size());
    TORCH_CHECK_VALUE(biases.size() == weights.size(), "biases must have one entry per weight (", weights.size(),
                      "), empty where there is none, got ", biases.size());
    const hlk::Engine& engine = hlk::engine_for(isa(), dtype_of("x", x), x.size(0));
    call.group.outputs.resize(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor &weight = weights[i], &bias = biases[i];
        hlk::Output& output = call.group.outputs[i];
        TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(1), "weights[", i, "] must be [N_", i, ", ", x.size(1),
                          "], got shape ", weight.sizes());
        check_like("weights", i, weight, x);
        output.columns = weight.size(0);
        output.has_weight = true;
        output.weight = weight_of(call, weight);
        if (!packs.empty() && x.size(0) > hlk::few_rows) {
            use_packs(engine, weight, packs[2 * i], packs[2 * i + 1], output.weight);
        }
        if (bias.numel() == 0 && output.columns != 0) continue;
        TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == output.columns, "biases[", i, "] must be [", output.columns,
                          "] or empty, got ", bias.sizes());
        check_like("biases", i, bias, x);
        call.held.push_back(bias.contiguous());
        output.bias = matrix("biases", call.held.back());
    }
}

void describe_bases(Call& call, const Tensor& x, TensorList base_outs) {
    TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got shape ", x.sizes());
    TORCH_CHECK_VALUE(!base_outs.empty(), "base_outs must hold at least one output, got none");
    call.group.outputs.resize(base_outs.size());
    for (size_t i = 0; i < base_outs.size(); ++i) {
        TORCH_CHECK_VALUE(base_outs[i].dim() == 2 && base_outs[i].size(0) == x.size(0), "base_outs[", i, "] must be [", x.size(0),
                          ", N_", i, "], got shape ", base_outs[i].sizes());
        check_like("base_outs", i, base_outs[i], x);
        call.group.outputs[i].columns = base_outs[i].size(1);
        call.group.outputs[i].base = call.rows_of("base_outs", base_outs[i]);
    }
}

// ---- the ops ----

Forward run_forward(Call& call, const Tensor& x, int64_t flags) {
    hlk::Group& g = call.group;
    std::vector<Tensor> outs;
    for (hlk::Output& output : g.outputs) {
        outs.push_back(at::empty({g.rows, output.columns}, x.options()));
        output.out = outs.back().mutable_data_ptr();
    }
    const bool saves = flags & flag_save;
    Tensor hidden = saves ? at::zeros({g.rows, g.hidden_ld}, x.options()) : at::empty({0}, x.options());
    if (saves) g.hidden = hidden.mutable_data_ptr();
    const auto bytes = x.options().dtype(at::kByte);
    Tensor mask = g.dropout ? at::empty({g.rows, mask_width(g)}, bytes) : at::empty({0}, bytes);
    if (g.dropout) place_mask(g, static_cast<uint8_t*>(mask.mutable_data_ptr()), true);
    hlk::forward(g, torch_threads());
    if (g.dropout && !saves) mask = at::empty({0}, bytes);
    return {std::move(outs), std::move(hidden), std::move(mask)};
}

Backward run_backward(Call& call, TensorList grad_outs, const Tensor& x, const Shared& s, const Tensor& hidden, const Tensor& mask,
                      int64_t needs) {
    hlk::Group& g = call.group;
    TORCH_CHECK_VALUE(grad_outs.size() == g.outputs.size(), "grad_outs must have one entry per output (", g.outputs.size(), "), got ",
                      grad_outs.size());
    for (size_t i = 0; i < grad_outs.size(); ++i) {
        const Tensor& grad = grad_outs[i];
        // An output that nobody uses: nothing of it is computed, nor of its paths.
        if (grad.dim() == 1 && grad.size(0) == 0) continue;
        TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == g.rows && grad.size(1) == g.outputs[i].columns, "grad_outs[", i,
                          "] must be [", g.rows, ", ", g.outputs[i].columns, "], got shape ", grad.sizes());
        check_like("grad_outs", i, grad, x);
        g.outputs[i].grad_out = call.rows_of("grad_outs", grad);
    }
    TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(0) == g.rows && hidden.size(1) == g.hidden_ld, "hidden must be [", g.rows, ", ",
                      g.hidden_ld, "], got ", hidden.sizes(), ": was the forward run without Flags.SAVE?");
    TORCH_CHECK_TYPE(hidden.scalar_type() == x.scalar_type(), "hidden must have the dtype of x (", dtype_name(x.scalar_type()), "), got ",
                     dtype_name(hidden.scalar_type()));
    TORCH_CHECK_VALUE(hidden.device().is_cpu(), "hidden must be on the device of x (cpu), got ", hidden.device());
    const Tensor hidden_rows = hidden.contiguous();
    g.hidden = const_cast<void*>(hidden_rows.const_data_ptr());
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, "mask must be torch.uint8, got ", dtype_name(mask.scalar_type()));
    const Tensor mask_rows = mask.contiguous();
    if (g.dropout) {
        TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(0) == g.rows && mask.size(1) == mask_width(g), "mask must be [", g.rows, ", ",
                          mask_width(g), "], got ", mask.sizes());
        place_mask(g, const_cast<uint8_t*>(static_cast<const uint8_t*>(mask_rows.const_data_ptr())), false);
    } else {
        TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == 0, "mask must be [0], got ", mask.sizes());
    }
    TORCH_CHECK_VALUE(needs >= 0 && needs < 2 * need_statistics, "needs must be a union of Needs, got ", needs);

    const auto nothing = [&](const Tensor& like) { return at::empty({0}, like.options()); };
    Tensor grad_x = needs & need_x ? at::empty({g.rows, g.sources[0].columns}, x.options()) : nothing(x);
    if (needs & need_x) g.sources[0].grad = grad_x.mutable_data_ptr();
    std::vector<Tensor> grad_sources, grad_A, grad_B;
    for (size_t j = 0; j < s.sources.size(); ++j) {
        const bool wanted = needs & need_sources;
        grad_sources.push_back(wanted ? at::empty({g.rows, g.sources[1 + j].columns}, x.options()) : nothing(x));
        if (wanted) g.sources[1 + j].grad = grad_sources.back().mutable_data_ptr();
    }
    const int64_t total = s.gate.size(0);
    Tensor stats = needs & need_statistics ? at::zeros({total, hlk::num_stats_columns}, x.options().dtype(at::kFloat))
                                           : at::empty({0}, x.options().dtype(at::kFloat));
    float* stats_row = needs & need_statistics ? stats.mutable_data_ptr<float>() : nullptr;
    for (size_t p = 0; p < g.paths.size(); ++p) {
        hlk::Path& path = g.paths[p];
        if (g.outputs[path.output].grad_out.data == nullptr) path.rows = 0;
        // Rows that are not computed stay 0.
        const auto gradient = [&](const Tensor& like, bool wanted) {
            if (!wanted) return nothing(like);
            return path.rows < path.rank ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
        };
        grad_A.push_back(gradient(s.lora_A[p], needs & need_lora_A));
        grad_B.push_back(gradient(s.lora_B[p], needs & need_lora_B));
        if (needs & need_lora_A) path.grad_A = grad_A.back().mutable_data_ptr();
        if (needs & need_lora_B) path.grad_B = grad_B.back().mutable_data_ptr();
        if (stats_row != nullptr) {
            path.stats = stats_row;
            stats_row += path.rank * hlk::num_stats_columns;
        }
    }
    hlk::backward(g, torch_threads());
    return {std::move(grad_x), std::move(grad_sources), std::move(grad_A), std::move(grad_B), std::move(stats)};
}

Forward lora_linear(const Tensor& x, TensorList weights, TensorList packs, TensorList biases, TensorList sources, TensorList lora_A,
                    TensorList lora_B, const Tensor& scaling, const Tensor& gate, const Tensor& active,
                    const std::optional<Tensor>& rng, at::IntArrayRef path_output, at::IntArrayRef path_source, double dropout_p,
                    int64_t flags) {
    Call call;
    describe_linears(call, x, weights, packs, biases);
    describe_paths(call, x, {sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, flags});
    return run_forward(call, x, flags);
}

Backward lora_linear_backward(TensorList grad_outs, const Tensor& x, TensorList weights, TensorList packs, TensorList biases,
                              TensorList sources, TensorList lora_A, TensorList lora_B, const Tensor& scaling, const Tensor& gate,
                              const Tensor& active, const std::optional<Tensor>& rng, at::IntArrayRef path_output,
                              at::IntArrayRef path_source, double dropout_p, int64_t flags, const Tensor& hidden,
                              const Tensor& mask, int64_t needs) {
    Call call;
    const Shared shared{sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, flags};
    describe_linears(call, x, weights, packs, biases);
    describe_paths(call, x, shared);
    return run_backward(call, grad_outs, x, shared, hidden, mask, needs);
}

Forward lora_delta(const Tensor& x, TensorList base_outs, TensorList sources, TensorList lora_A, TensorList lora_B,
                   const Tensor& scaling, const Tensor& gate, const Tensor& active, const std::optional<Tensor>& rng,
                   at::IntArrayRef path_output, at::IntArrayRef path_source, double dropout_p, int64_t flags) {
    Call call;
    describe_bases(call, x, base_outs);
    describe_paths(call, x, {sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, flags});
    return run_forward(call, x, flags);
}

Backward lora_delta_backward(TensorList grad_outs, const Tensor& x, TensorList base_outs, TensorList sources, TensorList lora_A,
                             TensorList lora_B, const Tensor& scaling, const Tensor& gate, const Tensor& active,
                             const std::optional<Tensor>& rng, at::IntArrayRef path_output, at::IntArrayRef path_source,
                             double dropout_p, int64_t flags, const Tensor& hidden, const Tensor& mask, int64_t needs) {
    Call call;
    const Shared shared{sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, flags};
    describe_bases(call, x, base_outs);
    describe_paths(call, x, shared);
    return run_backward(call, grad_outs, x, shared, hidden, mask, needs);
}

// ---- statistics of accumulated gradients ----

Tensor cpu_row_statistics(TensorList lora_A, TensorList lora_B, TensorList grad_A, TensorList grad_B) {
    const size_t paths = lora_A.size();
    TORCH_CHECK_VALUE(lora_B.size() == paths && grad_A.size() == paths && grad_B.size() == paths,
                      "lora_B, grad_A and grad_B must have one entry per path (", paths, ")");
    std::vector<Tensor> held;
    const auto pointer = [&](const char* name, size_t p, const Tensor& tensor, const Tensor& like) {
        TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.sizes() == like.sizes() && tensor.device().is_cpu(), name, "[", p, "] must be ",
                          like.sizes(), " on the cpu, got ", tensor.sizes(), " on ", tensor.device());
        TORCH_CHECK_TYPE(tensor.scalar_type() == lora_A[p].scalar_type(), name, "[", p, "] must be ", dtype_name(lora_A[p].scalar_type()), ", got ",
                         dtype_name(tensor.scalar_type()));
        held.push_back(tensor.contiguous());
        return held.back().const_data_ptr();
    };
    int64_t rows = 0;
    std::vector<hlk::PathGradients> gradients;
    for (size_t p = 0; p < paths; ++p) {
        const Tensor &a = lora_A[p], &b = lora_B[p];
        TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && b.size(1) == a.size(0), "lora_A[", p, "] must be [r, K] and lora_B[", p,
                          "] [N, r], got ", a.sizes(), " and ", b.sizes());
        gradients.push_back({pointer("lora_A", p, a, a), pointer("lora_B", p, b, b), pointer("grad_A", p, grad_A[p], a),
                             pointer("grad_B", p, grad_B[p], b), dtype_of("lora_A", a), a.size(0), a.size(1), b.size(0), nullptr});
        rows += a.size(0);
    }
    Tensor stats = at::empty({rows, hlk::num_stats_columns}, at::TensorOptions().dtype(at::kFloat));
    float* row = stats.mutable_data_ptr<float>();
    for (hlk::PathGradients& path : gradients) {
        path.stats = row;
        row += path.rank * hlk::num_stats_columns;
    }
    torch_threads().run(paths, [&](int64_t p) { hlk::row_statistics(gradients[p]); });
    return stats;
}

}  // namespace
}  // namespace hlk_torch

TORCH_LIBRARY_FRAGMENT(heterolora_kernels, m) {
    using namespace hlk_torch;
    m.def("cpu_isas() -> str[]", &cpu_isas);
    m.def("cpu_isa() -> str", &cpu_isa);
    m.def("cpu_isa_missing(str name) -> str", &cpu_isa_missing);
    m.def("set_cpu_isa(str name) -> ()", &set_cpu_isa);
    m.def("cpu_stats_columns() -> str[]", &cpu_stats_columns);
    m.def("cpu_row_statistics(Tensor[] lora_A, Tensor[] lora_B, Tensor[] grad_A, Tensor[] grad_B) -> Tensor", &cpu_row_statistics);
}

TORCH_LIBRARY_IMPL(heterolora_kernels, CPU, m) {
    using namespace hlk_torch;
    m.impl("lora_linear_cpu", &lora_linear);
    m.impl("lora_linear_backward_cpu", &lora_linear_backward);
    m.impl("lora_delta_cpu", &lora_delta);
    m.impl("lora_delta_backward_cpu", &lora_delta_backward);
}
