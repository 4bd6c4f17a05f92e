"""Linears that read one x run as one op: the same numbers, ranks and statistics as one by one, in one graph."""

from __future__ import annotations

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
    patch,
    reference_backend,  # noqa: F401
)
from helpers_grouping import (
    SIZES,
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
from helpers_search import train_step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import heterolora_kernels as hlk
from heterolora_kernels.grouping import GROUPS
from heterolora_kernels.state import state_of

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


def _free_storage(weight):
    """As FSDP does it with the parameters of a module that is not running."""
    kept = weight.detach().clone()
    weight.data.untyped_storage().resize_(0)

    def undo():
        weight.data.untyped_storage().resize_(kept.untyped_storage().nbytes())
        weight.data.copy_(kept)
    return undo


def _empty(weight):
    """As DeepSpeed's ZeRO-3 does it."""
    kept, weight.data = weight.data, weight.data.new_empty(0)
    return lambda: setattr(weight, "data", kept)


def _exchange(weight):
    kept, weight.data = weight.data, weight.data.float()
    return lambda: setattr(weight, "data", kept)


@pytest.mark.parametrize("runs_before", [0, 1], ids=["first_call", "later_call"])
@pytest.mark.parametrize("change", [_free_storage, _empty, _exchange])
def test_members_that_are_not_there_are_not_touched(change, runs_before, ops):
    model = make_layer()
    expected = [model(make_x()) for _ in range(runs_before)]
    undo = change(model[0].self_attn.v_proj.weight)
    model[0].script = lambda layer, x: [layer.self_attn.q_proj(x), layer.self_attn.k_proj(x)]
    ops.clear()
    model(make_x())
    assert ops == [1, 1]
    undo()
    model[0].script = in_turn
    assert all(torch.equal(out, before) for outs in expected for out, before in zip(model(make_x()), outs))
    assert ops[2:] == [3] * runs_before


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
