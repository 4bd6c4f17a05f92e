"""Linears that read one x run as one op: the same numbers as one by one, whatever happens between their calls."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from families import (
    FAMILIES,
    LAYERS,
    assert_gradients_close,
    every_family,
    layers_of,
    loss_and_gradients,
    make_inputs,
    make_model,
    make_patched,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
)
from helpers_search import train_step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import heterolora_kernels as hlk
from heterolora_kernels import layers as layers_module
from heterolora_kernels.grouping import GROUPS
from heterolora_kernels.state import state_of

K, SIZES = 29, {"q_proj": 21, "k_proj": 7, "v_proj": 13}


class LlamaDecoderLayer(nn.Module):
    """Three linears that read x, called as ``script`` says. The table of groups knows it by its name."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Module()
        for name, size in SIZES.items():
            self.self_attn.add_module(name, nn.Linear(K, size, bias=name != "k_proj"))
        self.script = in_turn

    def forward(self, x):
        return self.script(self, x)


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    return [getattr(layer.self_attn, name) for name in SIZES]


def in_turn(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(x) for linear in linears_of(layer))


def make_layer(dtype: torch.dtype = torch.float64, ranks=(3, 5, 9), seed: int = 0, change=None, **options) -> nn.Module:
    """A patched layer in a Sequential, with lora_B != 0. ``change``: what is done to the layer before it is patched."""
    torch.manual_seed(seed)
    layer = LlamaDecoderLayer().to(dtype)
    if change is not None:
        change(layer)
    model = nn.Sequential(layer)
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 3, "search": "off", "rank_pattern": dict(zip(SIZES, ranks)), **options}))
    open_adapters(model)
    return model


@pytest.fixture
def ops(monkeypatch) -> list[int]:
    """How many linears each op of the test ran."""
    calls, real = [], layers_module.run_group

    def counted(backend, x, weights, *args):
        calls.append(len(weights))
        return real(backend, x, weights, *args)

    monkeypatch.setattr(layers_module, "run_group", counted)
    return calls


def make_x(rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def weighted(outs, seed: int = 2) -> Tensor:
    """A sum in which every element has a factor of its own."""
    generator = torch.Generator().manual_seed(seed)
    return sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outs)


def results(model: nn.Module, x: Tensor, used=(0, 1, 2), backwards: int = 1) -> tuple[list[Tensor], dict, Tensor]:
    """Outputs, gradients of the parameters and of x."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    outs = model(x)
    loss = weighted([outs[i] for i in used])
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    return [out.detach() for out in outs], {name: p.grad for name, p in model.named_parameters()}, x.grad


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name


def both(script=None, x=None, **options) -> tuple[nn.Module, nn.Module]:
    """The same layer with and without groups."""
    models = [make_layer(group=group, **options) for group in ("auto", "off")]
    for model in models:
        model[0].script = script or in_turn
    return models


BACKENDS = [
    pytest.param("reference", torch.float64, id="reference-float64"),
    *(pytest.param(backend, dtype, id=f"{backend}-{name}", marks=[] if backend in hlk.available_backends() else
                   pytest.mark.skip(reason=f"the backend {backend} cannot run here: see `heterolora info`"))
      for backend in ("reference", "cpu") for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                                              ("float16", torch.float16))),
]


# ---- the same numbers ----


@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("rows", [1, 7, 350], ids=lambda rows: f"M{2 * rows}")
@pytest.mark.parametrize("options", [
    pytest.param({}, id="plain"), pytest.param({"lora_dropout": 0.3}, id="dropout"),
    pytest.param({"adapter_dtype": "float32"}, id="float32-adapters"),
])
def test_outputs_and_gradients_of_parameters_are_the_same_bits(backend, dtype, rows, options, ops):
    if options.get("adapter_dtype") and dtype == torch.float64:
        options = {}
    one, other = both(dtype=dtype, **{"adapter_dtype": None if dtype == torch.float64 else str(dtype)[6:], **options})
    for model in (one, other):
        model.train()
        search = hlk.RankSearch(model)
        search.apply({"0.self_attn.q_proj": 2, "0.self_attn.v_proj": [True, False] * 4 + [True]})
    x, found = make_x(rows, dtype), []
    with hlk.use_backend(backend):
        for model in (one, other):
            torch.manual_seed(3)
            found.append(results(model, x))
    assert ops == [3, 1, 1, 1]
    for grouped, alone in zip(found[0][0], found[1][0]):
        assert torch.equal(grouped, alone)
    assert_equal(found[0][1], found[1][1])
    exact = make_layer(group="off", **{**options, "adapter_dtype": None}).train()
    exact.load_state_dict({name: value.double() if value.is_floating_point() else value
                           for name, value in other.state_dict().items()})
    torch.manual_seed(3)
    truth = results(exact, x.detach().double())[2]
    errors = [(grad_x.double() - truth).norm() / truth.norm() for _, _, grad_x in found]
    # 16-bit types: one rounding instead of three.
    assert errors[0] <= (1.01 if dtype.itemsize == 2 else 2) * errors[1] + 1e-15
    assert errors[0] < {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@every_family
def test_families_run_one_op_per_group_and_the_same_outputs(family, ops):
    expected = {tuple(group) for group in GROUPS[type(layers_of(make_model(family), family)[0]).__name__]}
    seen = []
    for group in ("auto", "off"):
        model, outs = make_patched(family, group=group), {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                module.register_forward_hook(lambda m, args, out, name=name: outs.update({name: out.detach()}))
        _, gradients = loss_and_gradients(model, make_inputs())
        seen.append((outs, gradients, list(ops)))
        ops.clear()
    assert sorted(count for count in seen[0][2] if count > 1) == sorted(LAYERS * [len(group) for group in expected])
    assert set(seen[1][2]) == {1}
    assert_equal(seen[0][0], seen[1][0])
    # Norms of Llama round to float32 on the way.
    assert_gradients_close(seen[0][1], seen[1][1], tolerance=1e-5)


def test_names_do_not_change():
    one, other = make_patched("llama"), make_patched("llama", group="off")
    assert list(one.state_dict()) == list(other.state_dict())
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert [name for name, _ in one.named_modules()] == [name for name, _ in other.named_modules()]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"]], ids=["two", "one"])
def test_targets_alone_are_grouped(targets, ops):
    one, other = both(target_modules=targets, rank_pattern={})
    found, expected = results(one, make_x()), results(other, make_x())
    assert ops == [len(targets)] + [1] * len(targets)
    assert_equal(found[1], expected[1])


def test_paths_of_rank_zero_are_grouped(ops):
    one, other = both()
    for model in (one, other):
        search = hlk.RankSearch(model)
        search.apply(dict.fromkeys(search.paths, 0))
    found, expected = results(one, make_x()), results(other, make_x())
    assert ops == [3, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0]))
    assert_equal(found[1], expected[1])


def test_a_trainable_weight_and_bias_get_their_gradients(ops):
    models = both()
    for model in models:
        model[0].self_attn.q_proj.weight.requires_grad_()
        model[0].self_attn.v_proj.bias.requires_grad_()
    found, expected = (results(model, make_x()) for model in models)
    assert ops[0] == 3 and found[1]["0.self_attn.q_proj.weight"].any() and found[1]["0.self_attn.v_proj.bias"].any()
    assert_equal(found[1], expected[1])


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_unused_outputs_take_no_part_in_the_backward(used, dropout, ops):
    one, other = both(lora_dropout=dropout)
    found = []
    for model in (one, other):
        model.train()
        with torch.no_grad():
            for i in {0, 1, 2} - set(used):
                linears_of(model[0])[i].lora_B.fill_(float("nan"))
        torch.manual_seed(3)
        with hlk.collect_statistics(model) as ledger:
            found.append((*results(model, make_x(), used), ledger.table()))
    assert ops == [3, 1, 1, 1]
    assert_equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-12)
    for path, columns in found[1][3].items():
        assert_equal(found[0][3][path], columns)
        assert columns["grad_A_sq"].any() == (list(SIZES).index(path.rpartition(".")[2]) in used)


def test_backward_twice_with_retain_graph():
    one, other = both(lora_dropout=0.2)
    for model in (one, other):
        model.train()
    torch.manual_seed(3)
    found = results(one, make_x(), backwards=2)
    torch.manual_seed(3)
    expected = results(other, make_x(), backwards=2)
    assert_equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-12, atol=1e-12)


def test_two_forwards_before_two_backwards():
    one, other = both()
    found = []
    for model in (one, other):
        first, second = model(make_x(seed=1)), model(make_x(seed=2))
        weighted(second).backward()
        weighted(first, seed=5).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_equal(*found)


# ---- what happens between the calls ----


def swapped(layer, x):
    q, k, v = linears_of(layer)
    v_out, q_out = v(x), q(x)
    return [q_out, k(x), v_out]


def one_twice(layer, x):
    q, k, v = linears_of(layer)
    first = q(x)
    return [first + q(x), k(x), v(x)]


def one_never(layer, x):
    q, k, v = linears_of(layer)
    return [q(x), x[..., :2] * 1, v(x)]


def another_tensor(layer, x):
    q, k, v = linears_of(layer)
    return [q(x), k(x.clone() * 2), v(x)]


def two_tensors_of_one_shape(layer, x):
    y = x * 3
    return [a + b for a, b in zip(in_turn(layer, x), in_turn(layer, y))]


def two_tensors_crossed(layer, x):
    q, k, v = linears_of(layer)
    y = x * 3
    return [q(x) + q(y), k(x) + k(y), v(y) + v(x)]


def first_without_grad(layer, x):
    q, k, v = linears_of(layer)
    with torch.no_grad():
        out = q(x)
    return [out * x[..., :1], k(x), v(x)]


def last_without_grad(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x), k(x)]
    with torch.no_grad():
        assert not v(x).requires_grad
    return [*outs, v(x)]


def one_in_eval_mode(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x)]
    k.eval()
    return [*outs, k(x), v(x)]


def one_in_autocast(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs.append(k(x.float() if x.dtype == torch.float64 else x).to(x.dtype))
    return [*outs, v(x)]


def parameter_written(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x)]
    with torch.no_grad():
        k.lora_B.mul_(2)
        v.weight.add_(1)
    return [*outs, k(x), v(x)]


def parameter_replaced(layer, x):
    q, k, v = linears_of(layer)
    outs, kept = [q(x)], v.weight
    v.weight = nn.Parameter(kept.detach() * 2, requires_grad=False)
    try:
        return [*outs, k(x), v(x)]
    finally:
        v.weight = kept


def mask_written(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x)]
    v.lora_mask[:4] = False
    return [*outs, k(x), v(x)]


def adapters_disabled(layer, x):
    q, k, v = linears_of(layer)
    outs, switches = [q(x)], q._heterolora.switches
    switches.enabled = False
    outs.append(k(x))
    switches.enabled = True
    return [*outs, v(x)]


def another_linear_between(layer, x):
    q, k, v = linears_of(layer)
    outs = [q(x), k(x)]
    layer.self_attn.q_proj(x + 1)
    return [*outs, v(x)]


SCRIPTS = {
    swapped: [3], one_twice: [3, 3], one_never: [3], another_tensor: [3, 1], two_tensors_of_one_shape: [3, 3],
    two_tensors_crossed: None, first_without_grad: [1, 3], last_without_grad: None, one_in_eval_mode: [3, 1],
    one_in_autocast: None, parameter_written: None, parameter_replaced: [3, 1], mask_written: None,
    adapters_disabled: [3], another_linear_between: None,
}


@pytest.mark.parametrize("script, counts", SCRIPTS.items(), ids=[script.__name__ for script in SCRIPTS])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_what_happens_between_the_calls(script, counts, dropout, mode, ops):
    found, state = [], []
    for model in both(script, lora_dropout=dropout, dtype=torch.float32):
        model.train()
        torch.manual_seed(3)
        with mode():
            outs = model(make_x(dtype=torch.float32) * 1)
        found.append([out.detach().clone() for out in outs])
        state.append(torch.get_rng_state())
        if not state[1:] and counts is not None and not (mode is not contextlib.nullcontext and script is first_without_grad):
            assert ops == counts
        if mode is contextlib.nullcontext and script not in (parameter_written, mask_written):
            weighted(outs).backward()
            found[-1] += [p.grad for p in model.parameters()]
    assert len(found[0]) == len(found[1])
    for grouped, alone in zip(*found):
        assert (grouped is None) == (alone is None)
        assert grouped is None or torch.equal(grouped, alone)
    assert torch.equal(*state)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_x_written_in_place_is_seen(mode, ops):
    found = []
    for model in both():
        model[0].self_attn.v_proj.register_forward_pre_hook(lambda m, args: (args[0].mul_(2), None)[1])
        with mode():
            found.append([out.detach().clone() for out in model(make_x() * 1)])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert not torch.equal(found[0][2], make_layer()(make_x())[2])


HOOKS = {
    "input replaced": lambda model: model[0].self_attn.k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "output replaced": lambda model: model[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: out * 2),
    "output written": lambda model: model[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: out.mul_(2)),
    "output of a later one written": lambda model: model[0].self_attn.v_proj.register_forward_hook(
        lambda m, args, out: out.sin_()),
    "gradients seen": lambda model: model[0].self_attn.k_proj.register_full_backward_hook(
        lambda m, grad_in, grad_out: (grad_in[0] * 2,)),
    "gradients of outputs changed": lambda model: model[0].self_attn.k_proj.register_full_backward_pre_hook(
        lambda m, grad_out: (grad_out[0] * 2,)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_a_member(hook):
    found = []
    for model in both():
        hook(model)
        found.append(results(model, make_x()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0]))
    assert_equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-12)


def test_one_hook_of_a_gradient_of_one_output():
    one, other = both()
    for model in (one, other):
        handle = model[0].self_attn.k_proj.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: g * 3) and None)
        model.found = results(model, make_x())
        handle.remove()
    assert_equal(one.found[1], other.found[1])


# ---- checkpointing ----


def around_the_layer(model, x, use_reentrant):
    return checkpoint(model[0], x, use_reentrant=use_reentrant)


def around_one(which):
    def script(model, x, use_reentrant):
        def run(layer, x):
            return tuple(checkpoint(linear, x, use_reentrant=use_reentrant) if i in which else linear(x)
                         for i, linear in enumerate(linears_of(layer)))

        model[0].script = run
        return model(x)

    return script


def around_all_of_them(model, x, use_reentrant):
    layer = model[0]
    layer.script = lambda layer, x: checkpoint(in_turn, layer, x, use_reentrant=use_reentrant)
    return model(x)


def nested_one(model, x, use_reentrant):
    return checkpoint(lambda x: around_one((1,))(model, x, use_reentrant), x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("run", [around_the_layer, around_one((0,)), around_one((1,)), around_one((0, 1, 2)), around_one((2,)),
                                 around_all_of_them, nested_one],
                         ids=["layer", "first", "second", "each", "last", "all", "nested"])
def test_gradients_under_checkpointing(run, dropout, use_reentrant):
    if run is nested_one and dropout and use_reentrant:
        pytest.skip("a reentrant checkpoint in a reentrant one cannot be told from the outer one alone")
    x, found = make_x(), []
    for model, checkpointed in zip(both(lora_dropout=dropout), (True, False)):
        model.train()
        torch.manual_seed(3)
        leaf = x.detach().requires_grad_()
        outs = run(model, leaf, use_reentrant) if checkpointed else model(leaf)
        weighted(outs).backward()
        found.append(([out.detach() for out in outs], {name: p.grad for name, p in model.named_parameters()}, leaf.grad))
        with hlk.disable_adapter(model), torch.no_grad():
            bases = in_turn(model[0], x)
        # An output is linear in lora_B: a recompute with another mask would give the gradient of another output.
        for i, linear in enumerate(linears_of(model[0])):
            delta = weighted([*[0 * out for out in outs[:i]], outs[i] - bases[i]])
            torch.testing.assert_close((linear.lora_B.grad * linear.lora_B).sum(), delta, rtol=1e-9, atol=1e-9)
    if not dropout or run is around_the_layer:
        assert_close_results(*found)


def assert_close_results(found, expected) -> None:
    for a, b in zip(found[0], expected[0]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, value in expected[1].items():
        assert (found[1][name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-10, atol=1e-12)


def test_a_layer_under_checkpointing_runs_one_op_in_forward_and_recompute(ops):
    for use_reentrant in (True, False):
        ops.clear()
        model, x = make_layer(), make_x()
        weighted(around_the_layer(model, x, use_reentrant)).backward()
        assert ops == [3, 3]


# ---- what cannot be grouped runs alone ----


class _Subclass(torch.Tensor):
    pass


def _forward_of_its_own(linear):
    linear.forward = type(linear).forward.__get__(linear)


def _other_dtype(linear):
    linear.double()


def _subclass(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(_Subclass), requires_grad=False)


def _wants_no_gradient(linear):
    linear.lora_A.requires_grad_(False), linear.lora_B.requires_grad_(False)


@pytest.mark.parametrize("change", [_forward_of_its_own, _subclass, _wants_no_gradient])
def test_a_member_that_is_unlike_the_others_runs_alone(change, ops):
    model = make_layer()
    change(model[0].self_attn.k_proj)
    outs = model(make_x().detach())
    assert ops == [1, 1, 1]
    expected = make_layer(group="off")(make_x().detach())
    for out, value in zip(outs, expected):
        assert torch.equal(torch.Tensor(out) if isinstance(out, _Subclass) else out, value)


def test_members_of_two_dtypes_run_alone(ops):
    model = make_layer(dtype=torch.float32)
    _other_dtype(model[0].self_attn.k_proj)
    model[0].script = lambda layer, x: [layer.self_attn.q_proj(x), layer.self_attn.k_proj(x.double()), layer.self_attn.v_proj(x)]
    model(make_x(dtype=torch.float32))
    assert ops == [1, 1, 1]


def test_members_whose_storage_was_freed_are_not_touched(ops):
    """As FSDP does it with the parameters of a module that is not running."""
    model = make_layer()
    weight = model[0].self_attn.v_proj.weight
    size = weight.untyped_storage().nbytes()
    model[0].script = lambda layer, x: [layer.self_attn.q_proj(x), layer.self_attn.k_proj(x)]
    weight.data.untyped_storage().resize_(0)
    model(make_x())
    assert ops == [1, 1]
    weight.data.untyped_storage().resize_(size)


def test_a_group_of_meta_tensors_runs_alone(ops):
    model = make_layer().to("meta")
    assert [out.device.type for out in model(make_x().to("meta"))] == ["meta"] * 3
    assert ops == [1, 1, 1]


def test_wide_linears_run_as_one_only_before_a_backward(ops):
    model = make_patched("llama", shortcuts=())
    with torch.no_grad():
        expected = model(**make_inputs()).logits
    assert sorted(ops) == sorted(LAYERS * [3, 1, 1, 1, 1])
    ops.clear()
    assert torch.equal(model(**make_inputs()).logits, expected)
    assert sorted(ops) == sorted(LAYERS * [3, 1, 2, 1])


def test_off_changes_no_layer_and_is_checked():
    model = make_layer(group="off")
    assert "_heterolora" not in model[0].__dict__ and state_of(model).layers == []
    with pytest.raises(ValueError, match="group must be one of"):
        hlk.HeteroLoraConfig(group="on")


def test_a_layer_whose_forward_is_hidden_is_patched_without_groups(ops):
    def hide(layer):
        layer.forward = lambda x: in_turn(layer, x)

    model = make_layer(change=hide)
    model(make_x())
    assert ops == [1, 1, 1]


def test_outside_the_layer_each_runs_alone_and_nothing_is_held(ops):
    model, x = make_layer(), make_x()
    seen = weakref.ref(x)
    model[0].self_attn.q_proj(x), model[0].self_attn.k_proj(x)
    del x
    gc.collect()
    assert ops == [1, 1] and seen() is None


# ---- nothing is held ----


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("script", [in_turn, one_never, one_twice, another_tensor], ids=lambda script: script.__name__)
def test_nothing_is_held_after_the_layer(script, mode):
    model, seen = make_layer(), []
    model[0].script = script
    model[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    with mode():
        outs = model(make_x() * 1)
    seen += [weakref.ref(out) for out in outs]
    del outs
    gc.collect()
    assert len(seen) >= 4 and all(ref() is None for ref in seen)


def test_an_output_is_let_go_when_it_is_taken():
    model, seen = make_layer(), []

    def script(layer, x):
        for linear in linears_of(layer):
            seen.append(weakref.ref(linear(x)))
            assert seen[-1]() is None
        return x

    model[0].script = script
    with torch.no_grad():
        model(make_x())
    assert len(seen) == 3 and model[0]._heterolora.groups[0]._turn is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_held_after_an_exception(error):
    model, seen = make_layer(), []

    def script(layer, x):
        seen.append(weakref.ref(layer.self_attn.q_proj(x)))
        seen.append(weakref.ref(x))
        raise error

    model[0].script = script
    with pytest.raises(error):
        model(make_x() * 1)
    gc.collect()
    assert all(ref() is None for ref in seen)
    model[0].script = in_turn
    assert torch.equal(model(make_x())[1], make_layer(group="off")(make_x())[1])


def test_a_copy_made_between_the_calls_holds_nothing_and_runs_its_own():
    model, copies = make_layer(), []

    def script(layer, x):
        q, k, v = linears_of(layer)
        outs = [q(x)]
        copies.append(copy.deepcopy(model))
        return [*outs, k(x), v(x)]

    model[0].script = script
    with torch.no_grad():
        model(make_x())
    twin = copies[0]
    group = twin[0]._heterolora.groups[0]
    assert group._turn is None and not group.is_running and group.linears == linears_of(twin[0])
    twin[0].script = in_turn
    with torch.no_grad():
        linears_of(twin[0])[1].lora_B.zero_()
    outs, expected = twin(make_x()), make_layer(group="off")(make_x())
    assert torch.equal(outs[0], expected[0]) and not torch.equal(outs[1], expected[1])


def test_the_group_saves_x_once():
    for group, count in (("auto", 1), ("off", 3)):
        model, x, saved = make_layer(group=group), make_x(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            model(x)
        assert saved.count(x.data_ptr()) == count


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", ["llama", "bert", "opt_norm_first"])
def test_a_step_saves_no_more_than_without_groups(name, autocast):
    bytes_saved = []
    for group in ("auto", "off"):
        model, storages = make_patched(name, torch.float32, group=group).train(), {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
            model(**make_inputs())
        bytes_saved.append(sum(size for size, _ in storages.values()))
    assert bytes_saved[0] <= bytes_saved[1]
    # Under autocast each linear casts x for itself.
    assert not autocast or bytes_saved[0] < bytes_saved[1]


# ---- ranks, statistics, scores ----


def test_masks_are_followed_whoever_writes_them(ops):
    one, other = both()
    for model in (one, other):
        model(make_x())
        hlk.RankSearch(model).apply({"0.self_attn.k_proj": 0, "0.self_attn.v_proj": 4})
    assert_equal(results(one, make_x())[1], results(other, make_x())[1])
    for model in (one, other):
        linears_of(model[0])[2].lora_mask.copy_(torch.tensor([False, True, True] * 3))
        linears_of(model[0])[0].lora_mask.fill_(False)
    found, expected = results(one, make_x()), results(other, make_x())
    assert set(ops) == {1, 3} and torch.equal(found[0][2], expected[0][2]) and torch.equal(found[0][0], expected[0][0])
    assert_equal(found[1], expected[1])


def test_derived_tensors_of_the_members_are_parts_of_the_groups():
    model = make_layer()
    group, before = model[0]._heterolora.groups[0], [linear._heterolora.derived for linear in linears_of(model[0])]
    hlk.RankSearch(model).apply({"0.self_attn.k_proj": 2})
    assert group.derived.gate.tolist() == [1.0] * 3 + [1.0, 1.0, 0.0, 0.0, 0.0] + [1.0] * 9
    assert group.derived.active.tolist() == [3, 2, 9]
    assert [linear._heterolora.derived for linear in linears_of(model[0])] == before


@pytest.mark.parametrize("change", [
    pytest.param(lambda model: model.double(), id="dtype"),
    pytest.param(lambda model: model.to("meta").to_empty(device="cpu"), id="device"),
    pytest.param(lambda model: model.load_state_dict(model.state_dict(), assign=True), id="assigned"),
])
def test_a_moved_group_is_one_again(change, ops):
    model = make_layer(dtype=torch.float32)
    change(model)
    model(make_x(dtype=model[0].self_attn.q_proj.weight.dtype))
    assert ops == [3]


@pytest.mark.parametrize("alone", [False, True], ids=["together", "one-apart"])
@pytest.mark.parametrize("name", ["llama", "bert", "opt_norm_last", "gemma2"])
def test_statistics_are_those_without_groups(name, alone):
    tables = []
    for group in ("auto", "off"):
        model = make_patched(name, group=group)
        search = hlk.RankSearch(model)
        search.apply({path: i % 3 for i, path in enumerate(search.paths) if search.ranks[path] > 2})
        if alone:
            part = FAMILIES[name].qkv[1]
            for layer in layers_of(model, name):
                layer.get_submodule(part).register_forward_pre_hook(lambda m, args: (args[0].clone(), *args[1:]))
        with hlk.collect_statistics(model) as ledger:
            loss_and_gradients(model, make_inputs())
            loss_and_gradients(model, make_inputs(seed=3))
        tables.append(ledger.table())
    assert tables[0].keys() == tables[1].keys()
    for path, columns in tables[1].items():
        for column, value in columns.items():
            assert value.any(), (path, column)
            torch.testing.assert_close(tables[0][path][column], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("proxy, score", [("grad_norm", "probe"), ("fisher", "probe"), ("gate", "probe"), ("synflow", "probe"),
                                          ("alpha_test", "probe"), ("snip", "in_step")])
def test_scores_are_those_without_groups(proxy, score, ops):
    found = []
    for group in ("auto", "off"):
        ops.clear()
        model = patch(make_model("llama", torch.float32), group=group, proxy=proxy, score=score, interval=2,
                      search="dynamic", warmup=0).train()
        batches = [make_inputs(seed=seed) for seed in (1, 2)]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        search = hlk.RankSearch(model, optimizer, batches)
        if score == "in_step":
            search.start()
            for batch in batches:
                train_step(model, optimizer, batch, search)
            found.append(search.history[-1]["scores"])
        else:
            ops.clear()
            found.append(search.score(batches))
        assert (max(ops) == 3) == (group == "auto")
    assert found[0].keys() == found[1].keys() and max(found[1].values()) > 0
    for path, value in found[1].items():
        assert found[0][path] == pytest.approx(value, rel=1e-3, abs=1e-6), path


def test_scoring_gives_every_derived_tensor_back():
    model = patch(make_model("llama", torch.float32)).train()
    state = state_of(model)
    before = [(module._heterolora.derived, module._heterolora.derived.gate.clone()) for module in state.linears]
    groups = [(group, group.derived) for layer in state.layers for group in layer._heterolora.groups]
    search = hlk.RankSearch(model, dataloader=[make_inputs()])
    for proxy in ("grad_norm", "synflow", "alpha_test"):
        search.score([make_inputs()], proxy=proxy)
    assert len(groups) == 2 * LAYERS and all(group.derived is derived for group, derived in groups)
    for module, (derived, gate) in zip(state.linears, before):
        assert module._heterolora.derived is derived and torch.equal(derived.gate, gate)


def test_disabled_adapters_run_no_op(ops):
    model = make_layer()
    with hlk.disable_adapter(model):
        outs = model(make_x())
    assert ops == [] and torch.equal(outs[1], hlk.remove_heterolora(make_layer())(make_x())[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_is_the_same_bits(dtype, ops):
    found = []
    for model in both(dtype=torch.float32):
        with torch.autocast("cpu", dtype):
            found.append(results(model, make_x(dtype=torch.float32)))
    assert ops == [3, 1, 1, 1] and found[0][0][0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0]))
    assert_equal(found[0][1], found[1][1])


# ---- torch.compile ----


def _graph_ops(model) -> tuple:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def _counts(counter) -> list[int]:
    """How many linears each op of the captured graphs runs."""
    found = []
    for graph in counter.graphs:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found += [len(node.args[1]) for node in module.graph.nodes
                          if "lora_linear_reference" in str(node.target) and node.op == "call_function"]
    return found


@pytest.mark.parametrize("checkpointed", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_compiled_model_is_one_graph_that_follows_the_ranks(checkpointed):
    model = patch(make_model("llama", torch.float32), shortcuts=()).train()
    if checkpointed is not None:
        for layer in layers_of(model, "llama"):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=checkpointed)
        # A reentrant checkpoint needs an input that asks for a gradient.
        model.get_input_embeddings().weight.requires_grad_()
    search = hlk.RankSearch(model)
    compiled, counter = _graph_ops(model)
    for ranks in (3, 1, 0, 2):
        search.apply(dict.fromkeys(search.paths[::2], ranks))
        _, expected = loss_and_gradients(model, make_inputs())
        _, found = loss_and_gradients(compiled, make_inputs())
        found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        assert_gradients_close(found, expected, tolerance=1e-4, may_be_zero=True)
    assert counter.frame_count == 1
    if checkpointed is None:
        assert sorted(_counts(counter)) == sorted(LAYERS * [3, 2, 1, 1])


def test_compiled_members_with_hooks_run_alone():
    one, other = both()
    compiled, counter = _graph_ops(one)
    for model in (one, other):
        model[0].self_attn.v_proj.register_forward_pre_hook(lambda m, args: (args[0].mul_(2), None)[1])
    with torch.no_grad():
        found, expected = compiled(make_x() * 1), other(make_x() * 1)
    assert counter.frame_count == 1 and all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected))


def test_compiled_layer_with_dropout_shares_the_mask():
    model = make_layer(lora_dropout=0.3, ranks=(7, 7, 7)).train()
    with torch.no_grad():
        for linear in linears_of(model[0]):
            linear.lora_A.copy_(linears_of(model[0])[0].lora_A), linear.weight.zero_()
            linear.lora_B.copy_(torch.eye(linear.out_features, 7))
            if linear.bias is not None:
                linear.bias.zero_()
    compiled, counter = _graph_ops(model)
    with torch.no_grad():
        q, k, v = compiled(make_x())
    assert counter.frame_count == 1 and torch.equal(q[..., :7], k) and torch.equal(q[..., :7], v[..., :7])


def test_exported_layer_computes_the_same():
    model, x = make_layer(dtype=torch.float32).eval(), make_x(dtype=torch.float32).detach()
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=False).module()
        assert all(torch.equal(a, b) for a, b in zip(exported(x), model(x)))
