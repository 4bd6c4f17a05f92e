"""The compiled autograd function against the one in Python: the same bits, graphs and refusals."""

from dataclasses import replace

import pytest
import torch
from helpers_errors import assert_bounded
from helpers_op import CASES, assert_same, make_inputs, random_grads
from torch.overrides import TorchFunctionMode

from heterolora_kernels.backends import resolve, unavailable_backends
from heterolora_kernels.ops import autograd
from heterolora_kernels.ops.ledger import NUM_COLUMNS

if "cpu" in unavailable_backends():
    pytest.skip(unavailable_backends()["cpu"], allow_module_level=True)

resolve(torch.device("cpu"), "cpu")
NAMES = ("one_path_dropout", "sources_only", "three_linears_four_paths")


def _run(inputs, delta, probe=None):
    if not delta:
        return inputs.run(probe, backend="cpu"), dict(inputs.leaves())
    bases = [torch.linspace(-1, 1, len(inputs.x) * len(w)).view(-1, len(w)).requires_grad_() for w in inputs.weights]
    leaves = {name: leaf for name, leaf in inputs.leaves().items() if not name.startswith(("weights", "biases"))}
    return inputs.run_delta(bases, probe, backend="cpu"), leaves | {f"bases[{i}]": base for i, base in enumerate(bases)}


def _results(name, delta, used, asked=None):
    """Outputs, gradients by name and statistics, where the loss reads the outputs ``used``."""
    inputs = make_inputs(CASES[name], torch.float32).requires_grad_(asked)
    probe = torch.zeros(inputs.gate.numel(), NUM_COLUMNS, requires_grad=True)
    outs, leaves = _run(inputs, delta, probe)
    grads = random_grads(outs)
    picked = [i for i in range(len(outs)) if used is None or i in used]
    asking = {key: leaf for key, leaf in (leaves | {"probe": probe}).items() if leaf.requires_grad}
    found = torch.autograd.grad([outs[i] for i in picked], list(asking.values()), [grads[i] for i in picked], allow_unused=True)
    return outs, dict(zip(asking, found))


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("name, used, asked", [*((name, None, None) for name in NAMES), ("three_linears_four_paths", (1,), None),
                                               ("three_linears_four_paths", (0, 2), None),
                                               ("three_linears_four_paths", None, {"sources[1]", "lora_B[0]"})],
                         ids=[*NAMES, "one_output_used", "two_outputs_used", "some_ask"])
def test_equals_the_function_in_python(monkeypatch, name, used, asked, delta):
    outs, grads = _results(name, delta, used, asked)
    assert "LoraOp" in outs[0].grad_fn.name() and type(outs[0].grad_fn).__name__ != "_LoraOpBackward"
    monkeypatch.setattr(autograd, "_compiled", {})
    wanted_outs, wanted = _results(name, delta, used, asked)
    assert type(wanted_outs[0].grad_fn).__name__ == "_LoraOpBackward"
    assert_same(outs, wanted_outs, rtol=0, atol=0)
    for key, want in wanted.items():
        assert (grads[key] is None) == (want is None), key
        if want is not None:
            torch.testing.assert_close(grads[key], want, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("shape", [(), (2, 2), (1, 4, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_leading_dimensions(delta, shape):
    inputs = make_inputs(replace(CASES["three_linears_four_paths"], m=torch.Size(shape).numel()), torch.float32).requires_grad_()
    outs, leaves = _run(inputs, delta)
    grads = random_grads(outs)
    wanted = torch.autograd.grad(outs, list(leaves.values()), grads)

    def shaped(tensor):
        # The rows in another place of the memory, where there is more than one leading dimension.
        parted = tensor.detach().reshape(*shape, tensor.shape[1])
        return (parted.transpose(0, -1).contiguous().transpose(0, -1) if len(shape) > 1 else parted.clone()).requires_grad_()

    moved = {name: shaped(leaf) for name, leaf in leaves.items() if name == "x" or name.startswith("bases")}
    moved["sources[1]"] = inputs.sources[1].detach()[None].requires_grad_()
    inputs = inputs.mapped(lambda name, leaf: moved.get(name, leaf))
    bases = [moved[f"bases[{i}]"] for i in range(3 * delta)]
    with torch.no_grad():
        plain = inputs.run_delta(bases, backend="cpu") if delta else inputs.run(backend="cpu")
    found = inputs.run_delta(bases, backend="cpu") if delta else inputs.run(backend="cpu")
    assert all("LoraOp" in out.grad_fn.name() and out._base is None for out in found)
    assert_same(plain, found, rtol=0, atol=0)
    assert_same(found, [out.reshape(*shape, out.shape[1]) for out in outs], rtol=0, atol=0)
    asking = leaves | moved
    again = torch.autograd.grad(found, list(asking.values()), [grad.reshape(out.shape) for grad, out in zip(grads, found)])
    again = dict(zip(asking, again))
    wanted = {name: grad.reshape(leaf.shape) for (name, leaf), grad in zip(asking.items(), wanted)}
    # torch's own products may add in another order where rows lie elsewhere; the kernels do not.
    torchs = [name for name in wanted if name.startswith("weights")]
    for name in torchs:
        grad, rows = grads[int(name[8:-1])].double(), inputs.x.detach().reshape(-1, inputs.x.shape[-1]).double()
        assert_bounded(again.pop(name), wanted.pop(name), grad.t() @ rows, 2, grad.abs().t() @ rows.abs(), name=name)
    assert_same(again, wanted, rtol=0, atol=0)


def test_paths_of_unused_outputs_may_hold_nan():
    inputs = make_inputs(replace(CASES["two_linears"], gates="ones"), torch.float32)
    for p, output in enumerate(inputs.path_output):
        if output == 1:
            inputs.lora_A[p].fill_(torch.nan)
    inputs.x.requires_grad_()
    grad, = torch.autograd.grad(inputs.run(backend="cpu")[0].sum(), inputs.x)
    assert grad.isfinite().all() and grad.abs().sum() > 0


def test_refusals_are_those_of_pytorch():
    inputs = make_inputs(CASES["one_path"], torch.float32).requires_grad_()
    out, = inputs.run(backend="cpu")
    grad, = torch.autograd.grad(out.square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    out, = inputs.run(backend="cpu")
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    for changed in ("x", "lora_A[0]"):
        shaped = replace(inputs, x=inputs.x[None])
        out, = shaped.run(backend="cpu")
        with torch.no_grad():
            inputs.leaves()[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_hooks_of_saved_tensors_see_the_same_tensors_and_may_raise(monkeypatch):
    def packed():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            inputs.run(backend="cpu")[0].sum().backward()
        return shapes

    def refuse(tensor):
        raise KeyError("wanted")

    inputs = make_inputs(CASES["one_path_dropout"], torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.raises(KeyError, match="wanted"):
        inputs.run(backend="cpu")
    seen = packed()
    monkeypatch.setattr(autograd, "_compiled", {})
    assert len(seen) > 5 and seen == packed()


def test_what_is_no_plain_tensor_goes_the_general_way():
    class Subclass(torch.Tensor):
        pass

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    inputs = make_inputs(CASES["one_path"], torch.float32)
    compiled = autograd._compiled["lora_linear", "cpu"]
    arguments = (inputs.weights, inputs.packs, inputs.biases, *inputs.path_args()[:-1], None)
    assert torch.is_tensor(compiled(inputs.x, *arguments)[0])
    assert compiled(inputs.x.as_subclass(Subclass), *arguments) is NotImplemented
    with Mode():
        assert compiled(inputs.x, *arguments) is NotImplemented
    seen = []
    torch.vmap(lambda x: seen.append(compiled(x, *arguments)) or x)(inputs.x.expand(2, *inputs.x.shape))
    assert seen == [NotImplemented]
    assert torch.is_tensor(compiled(inputs.x, *arguments)[0])
    with pytest.raises(TypeError, match="15 arguments"):
        compiled(inputs.x)
