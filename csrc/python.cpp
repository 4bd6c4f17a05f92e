// The module heterolora_kernels._C: importing it loads the library, which registers the ops; its functions are those ops with their
// gradients for plain tensors. Reading the arguments here takes a fraction of what torch.ops needs for so many lists.
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "binding.h"

namespace {

using at::Tensor;

using Tensors = c10::SmallVector<Tensor, 4>;
using Numbers = c10::SmallVector<int64_t, 4>;

// Each reads one argument; false where the general way has to: another type, a subclass of Tensor, another layout (sparse, nested,
// mkldnn), or a tangent of forward-mode differentiation, which the kernels would drop.
bool read(PyObject* value, Tensor& out) {
    if (!THPVariable_CheckExact(value)) return false;
    out = THPVariable_Unpack(value);
    return out.layout() == c10::kStrided && !out.is_nested() && !out._fw_grad(0).defined();
}

bool read(PyObject* value, std::optional<Tensor>& out) {
    if (value == Py_None) return true;
    return read(value, out.emplace());
}

bool read(PyObject* value, int64_t& out) {
    if (!PyLong_CheckExact(value)) return false;
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0;
}

bool read(PyObject* value, double& out) {
    if (!PyFloat_CheckExact(value)) return false;
    out = PyFloat_AS_DOUBLE(value);
    return true;
}

template <class T, unsigned N>
bool read(PyObject* value, c10::SmallVector<T, N>& out) {
    if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    for (Py_ssize_t i = 0; i < size; ++i) {
        if (!read(PySequence_Fast_GET_ITEM(value, i), out.emplace_back())) return false;
    }
    return true;
}

template <class... Values>
bool read_all(PyObject* const* arguments, Values&... values) {
    return (read(*arguments++, values) && ...);
}

// A mode of torch functions, or a transform of torch.func.
bool is_overridden() {
    return at::impl::torch_function_mode_enabled() ||
           c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

PyObject* call(const hlk_torch::Inputs& inputs, const std::optional<Tensor>& probe) {
    std::vector<Tensor> outs;
    {
        pybind11::gil_scoped_release released;
        outs = hlk_torch::call_with_gradients(inputs, probe);
    }
    THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(outs.size())));
    if (!list) throw python_error();
    for (size_t i = 0; i < outs.size(); ++i) PyList_SET_ITEM(list.get(), i, THPVariable_Wrap(std::move(outs[i])));
    return list.release();
}

PyObject* lora_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 15, "lora_linear takes 15 arguments, got ", count);
    Tensor x, scaling, gate, active;
    Tensors weights, packs, biases, sources, lora_A, lora_B;
    std::optional<Tensor> rng, probe;
    Numbers path_output, path_source;
    double dropout_p = 0;
    if (is_overridden() || !read_all(arguments, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng,
                                     path_output, path_source, dropout_p, probe)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return call({false, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                 dropout_p}, probe);
    END_HANDLE_TH_ERRORS
}

PyObject* lora_delta(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 13, "lora_delta takes 13 arguments, got ", count);
    Tensor x, scaling, gate, active;
    Tensors base_outs, sources, lora_A, lora_B;
    std::optional<Tensor> rng, probe;
    Numbers path_output, path_source;
    double dropout_p = 0;
    if (is_overridden() || !read_all(arguments, x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                                     path_source, dropout_p, probe)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return call({true, x, base_outs, {}, {}, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p},
                probe);
    END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction as_method() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"lora_linear", as_method<lora_linear>(), METH_FASTCALL,
     "lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, "
     "probe) -> outs, or NotImplemented"},
    {"lora_delta", as_method<lora_delta>(), METH_FASTCALL,
     "lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, probe) -> "
     "outs, or NotImplemented"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", "The compiled kernels, as functions and through torch.ops.", -1, methods,
                                 nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module_definition); }
