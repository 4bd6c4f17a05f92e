"""Transforms of torch over patched and accelerated models: torch.func, forward mode, batched gradients, tracing, counting."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from families import make_inputs, make_model, patch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import heterolora_kernels as hlk

BACKENDS = ["reference", "cpu"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _backend(request):
    name = request.node.callspec.params.get("backend", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if name not in hlk.available_backends():
        pytest.skip(f"backend {name} is not built here")
    with hlk.use_backend(name):
        yield


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def patched(**options) -> nn.Module:
    return hlk.apply_heterolora(layers(), hlk.HeteroLoraConfig(**{"r": 3, "search": "off", "init_B": "kaiming_uniform",
                                                                  "target_modules": ["0", "2"], **options})).eval()


def twin_of(model: nn.Module) -> nn.Module:
    """The same function of plain linears, with the adapters' parameters of ``model`` under their names."""
    class Sum(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.s = copy.deepcopy(linear), linear._heterolora.paths[0].scaling
            self.lora_A, self.lora_B = (nn.Parameter(getattr(linear, leaf).detach().clone()) for leaf in ("lora_A", "lora_B"))

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight,
                                        self.linear.bias) + self.s * (x @ self.lora_A.t()) @ self.lora_B.t()

    return nn.Sequential(*(Sum(part) if hasattr(part, "lora_A") else part for part in model))


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")
            and "linear." not in name}


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


x, v = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), torch.ones(5, 8)


def per_sample(model):
    def loss(adapters, row):
        return functional_call(model, adapters, (row[None],)).square().sum()
    return vmap(grad(loss), (None, 0))(adapters_of(model), x)


def hessian_vector(model):
    def loss(adapters):
        return functional_call(model, adapters, (x,)).square().sum()
    adapters = adapters_of(model)
    return jvp(grad(loss), (adapters,), ({name: torch.ones_like(p) for name, p in adapters.items()},))[1]


def dual(model):
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent


def vmap_of_a_backward(model):
    out, adapters = model(x), [p for name, p in model.named_parameters() if name in adapters_of(model)]
    return vmap(lambda given: torch.autograd.grad(out, adapters, given, retain_graph=True))(torch.eye(15).reshape(15, 5, 3))


TRANSFORMS = {
    "vmap": lambda model: vmap(model)(x), "jacrev": lambda model: jacrev(model)(x[0]),
    "jacfwd": lambda model: jacfwd(model)(x[0]),
    "per_sample": per_sample, "hessian_vector": hessian_vector, "jvp": lambda model: jvp(model, (x,), (v,))[1],
    "dual_level": dual,
    "jacobian_vectorized": lambda model: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "vjp_batched": lambda model: torch.autograd.grad(model(x), [p for n, p in model.named_parameters()
                                                                if n in adapters_of(model)],
                                                     torch.eye(15).reshape(15, 5, 3), is_grads_batched=True),
    "vmap_of_a_backward": vmap_of_a_backward,
}


@every_backend
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_plain_linears(backend, transform):
    model = patched()
    twin = twin_of(model)
    for parameter in (*model.parameters(), *twin.parameters()):
        parameter.requires_grad_(False)
    for name, parameter in (*model.named_parameters(), *twin.named_parameters()):
        parameter.requires_grad_(name in adapters_of(model))
    close(transform(model), transform(twin))


@every_backend
def test_closed_rows_stay_out_of_transforms(backend):
    model = patched()
    with torch.no_grad():
        model[0].lora_A[1:] = torch.nan
    search = hlk.RankSearch(model)
    search.apply({"0": 1, "2": 0})
    expected = vmap(model)(x)
    close(expected, model(x))
    tangent = jvp(model, (x,), (v,))[1]
    assert bool(torch.isfinite(tangent).all())
    assert all(bool(torch.isfinite(value).all()) for value in per_sample(model).values())


@pytest.mark.parametrize("backend", ["reference"])
def test_a_call_with_shortcuts_and_groups_can_be_transformed(backend):
    model, ids = patch(make_model("llama", torch.float64), shortcuts="all"), make_inputs()["input_ids"]
    model.set_attn_implementation("eager")
    embedded = model.get_input_embeddings()(ids).detach()

    def run(given):
        return model(inputs_embeds=given).logits

    tangent = jvp(run, (embedded,), (torch.ones_like(embedded),))[1]
    given = embedded.clone().requires_grad_()
    weights = torch.randn(tangent.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (run(given) * weights).sum().backward()
    torch.testing.assert_close((tangent * weights).sum(), given.grad.sum(), rtol=1e-6, atol=1e-6)


@every_backend
def test_dropout_under_vmap_needs_torchs_word(backend):
    model = patched(lora_dropout=0.5).train()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(x)
    assert vmap(model, randomness="different")(x).shape == (5, 3)


def test_statistics_refuse_transforms():
    model = patched()
    with hlk.collect_statistics(model), pytest.raises(RuntimeError, match="heterolora_kernels collects statistics"):
        per_sample(model)


@every_backend
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "weight"])
def test_a_write_between_forward_and_backward_is_noticed(backend, leaf):
    model, given = patched(), x.clone().requires_grad_()
    out = model(given).sum()
    with torch.no_grad():
        getattr(model[2], leaf).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# ---- inputs of other layouts ----


LAYOUTS = {
    "jagged": (lambda: torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged), lambda out: out.values()),
    "nested": (lambda: torch.nested.nested_tensor([x[:2], x[2:]]), lambda out: torch.cat(out.unbind())),
    "sparse": (x.to_sparse, lambda out: out.to_dense() if out.is_sparse else out),
}


@pytest.mark.parametrize("make, dense", LAYOUTS.values(), ids=LAYOUTS)
def test_peft_layers_take_what_peft_takes(make, dense):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def run(accelerated):
        # One layer: no activation takes all of these.
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 3)), peft.LoraConfig(target_modules=["0"],
                                                                                    init_lora_weights=False))
        with torch.no_grad():
            return dense((hlk.accelerate_peft(model) if accelerated else model)(make()))
    close(run(True), run(False))


@pytest.mark.parametrize("kind", ["jagged"])
def test_patched_linears_take_jagged_inputs(kind):
    make, dense = LAYOUTS[kind]
    model = patched()
    with torch.no_grad():
        close(dense(model(make())), model(x))


# ---- tracing ----


_COLD = """
import sys, torch
from torch import nn
import heterolora_kernels as hlk
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2, search="off", init_B="kaiming_uniform", target_modules=["0", "2"])).eval()
x = torch.randn(40, 8)
with torch.no_grad():
    run = {"export": lambda: torch.export.export(model, (x,)).module(), "trace": lambda: torch.jit.trace(model, x),
           "compile": lambda: torch.compile(model, backend="eager", fullgraph=True),
           "vmap": lambda: torch.func.vmap(model), "fake": lambda: fake(model, x)}
    def fake(model, x):
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(40, 8))
        return model
    torch.testing.assert_close(run[sys.argv[1]]()(x), model(x), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("what", ["export", "trace", "compile", "vmap", "fake"])
def test_first_thing_done_with_a_patched_model(what):
    found = subprocess.run([sys.executable, "-c", _COLD, what], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


# ---- counting ----


@every_backend
def test_flops_are_counted(backend):
    model = patched()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[0].lora_A.requires_grad_(), model[0].lora_B.requires_grad_(), model[2].lora_B.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = model(x)
    rows, low_rank = 5, lambda k, n: 2 * 5 * 3 * (k + n)
    assert counter.get_total_flops() == 2 * rows * (8 * 16 + 16 * 3) + low_rank(8, 16) + low_rank(16, 3)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # The second linear: grad of x, q, its part of the gradient of x, and grad_B; the first: q, grad_A and grad_B.
    second = 2 * rows * 16 * 3 + 2 * rows * 3 * (3 + 16 + 3)
    first = 2 * rows * 3 * (16 + 8 + 16)
    assert counter.get_total_flops() == first + second
