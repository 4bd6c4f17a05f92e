"""The calls of a group's members: whatever happens between them the numbers are those of one by one, and nothing is held."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from families import (
    make_inputs,
    make_patched,
    reference_backend,  # noqa: F401
)
from helpers_grouping import (
    assert_equal,
    both,
    counted_ops,  # noqa: F401
    in_turn,
    linears_of,
    make_layer,
    make_x,
    results,
    weighted,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import heterolora_kernels as hlk

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


def _assign(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def _exchange(model):
    for linear in linears_of(model[0]):
        linear.weight = nn.Parameter(linear.weight.detach().clone())


@pytest.mark.parametrize("change", [_assign, _exchange])
def test_exchanged_weights_are_freed_and_the_new_ones_run_as_one(change, ops):
    model, x = make_layer(torch.float32), make_x(rows=20, dtype=torch.float32)   # enough for packs
    before = [out.detach() for out in model(x)]
    weights = [weakref.ref(linear.weight) for linear in linears_of(model[0])]
    change(model)
    gc.collect()
    assert all(ref() is None for ref in weights)
    assert all(map(torch.equal, model(x), before)) and ops == [3, 3]


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
    assert len(seen) == 3 and not model[0]._heterolora.groups[0].layer.now().turns


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
    assert not group.layer.now().turns and group.running() is None and group.linears == linears_of(twin[0])
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
