"""The patched linear: autocast, dropout masks and their groups, inference mode, statistics, moves and loads."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from families import (
    FAMILIES,
    HIDDEN,
    INNER,
    LAYERS,
    EagerTwin,
    assert_gradients_close,
    every_family,
    layers_of,
    loss_and_gradients,
    loss_of,
    make_inputs,
    make_model,
    make_patched,
    patch,
    reference_backend,  # noqa: F401
)
from torch import Tensor, nn

import heterolora_kernels as hlk
from heterolora_kernels.grouping import GROUPS, LinearGroup, surroundings_now

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# ---- autocast ----

autocasts = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@every_family
@autocasts
def test_autocast_right_after_patching_is_equal_bit_for_bit(family, dtype):
    model, inputs = make_model(family), make_inputs()
    outputs = []
    for _ in range(2):
        seen = {}
        handles = [module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.detach()}))
                   for name, module in model.named_modules() if isinstance(module, nn.Linear) or "c_" in name]
        with torch.autocast("cpu", dtype=dtype):
            out = model(**inputs)
        outputs.append({**seen, "logits": out.logits, "loss": out.loss})
        for handle in handles:
            handle.remove()
        if len(outputs) == 1:
            patch(model, open_B=False)
    before, after = outputs
    assert before.keys() == after.keys() and len(before) > 4 * LAYERS
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_norm_first", "gpt2", "bert"])
def test_autocast_gives_float32_gradients_near_those_of_float32(name):
    model, inputs = make_patched(name, torch.float32), make_inputs()
    losses, expected = loss_and_gradients(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_losses, gradients = loss_and_gradients(model, inputs)
    assert not torch.equal(losses[0], autocast_losses[0])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    largest = max(gradient.norm() for gradient in expected.values())
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and (gradients[key] - gradient).norm() < 0.1 * gradient.norm() + 0.01 * largest, key


def test_autocast_leaves_float64_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(3, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        after = patch(model, shortcuts=(), open_B=False)(x)
    assert before.dtype == after.dtype == torch.float64 and torch.equal(before, after)


def test_autocast_off_inside_a_block_is_off():
    model, inputs = make_patched("llama", torch.float32), make_inputs()
    expected = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(expected, model(**inputs).logits)


def test_autocast_reaches_the_backward_of_sixteen_bit_bases():
    model, inputs = make_patched("llama", torch.bfloat16), make_inputs()
    _, gradients = loss_and_gradients(model, inputs)
    exact = patch(make_model("llama").to(torch.bfloat16).float())
    _, expected = loss_and_gradients(exact, inputs)
    for key, gradient in expected.items():
        assert gradients[key].dtype == torch.float32
        assert (gradients[key] - gradient).norm() < 0.1 * gradient.norm(), key


# ---- dropout ----


def masks_of(model: nn.Module, names, inputs: dict) -> dict[str, Tensor]:
    """What each linear's path made of its x in one forward: drop(x) / x. Its A and B are the identity, s is 1."""
    seen, handles = {}, []
    for name in names:
        module = model.get_submodule(name)
        with torch.no_grad():
            module.lora_A.copy_(torch.eye(module.in_features))
            module.lora_B.copy_(torch.eye(module.out_features, module.in_features))

        def record(module, args, out, name=name):
            delta = out - F.linear(args[0], module.weight, module.bias)
            columns = min(module.in_features, module.out_features)
            seen[name] = (delta[..., :columns] / args[0][..., :columns]).detach()

        handles.append(module.register_forward_hook(record))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def make_identities(**options) -> nn.Module:
    """A Llama whose paths have as many rows as x has columns, so that their masks can be read off."""
    return patch(make_model("llama", torch.float64), shortcuts=(), r=HIDDEN, lora_alpha=HIDDEN, **options)


def linears(*parts: str) -> list[str]:
    return [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in parts]


def assert_same_mask(one: Tensor, other: Tensor, same: bool) -> None:
    columns = min(one.shape[-1], other.shape[-1])
    assert torch.equal(one[..., :columns].round(decimals=6), other[..., :columns].round(decimals=6)) == same


def test_masks_in_training():
    p = 0.3
    pattern = {"down_proj": INNER}
    model = make_identities(lora_dropout=p, rank_pattern=pattern, alpha_pattern=pattern).train()
    names = linears(*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj")
    masks = masks_of(model, names, make_inputs())
    kept = 65536 / (65536 - round(65536 * p))
    for name in names:
        values = masks[name].round(decimals=6).unique()
        torch.testing.assert_close(values, torch.tensor([0.0, kept], dtype=torch.float64), rtol=0, atol=1e-6)
        assert 0.1 < (masks[name] == 0).double().mean() < 0.5
    groups = [[f"model.layers.{i}.{part}" for part in parts] for i in range(LAYERS)
              for parts in (QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",))]
    for group in groups:
        for name in group:
            assert_same_mask(masks[group[0]], masks[name], same=True)
    for i, group in enumerate(groups):
        for other in groups[:i]:
            assert_same_mask(masks[group[0]], masks[other[0]], same=False)


def test_masks_are_drawn_anew_for_each_forward_and_follow_the_seed():
    model, draws = make_identities(lora_dropout=0.3, target_modules=["q_proj"]).train(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(masks_of(model, linears("self_attn.q_proj"), make_inputs()))
    for name in draws[0]:
        assert_same_mask(draws[0][name], draws[1][name], same=False)
        assert_same_mask(draws[0][name], draws[2][name], same=True)


def test_mask_is_shared_where_some_members_have_no_path():
    model = make_identities(lora_dropout=0.3, target_modules=["q_proj", "v_proj"]).train()
    masks = masks_of(model, linears("self_attn.q_proj", "self_attn.v_proj"), make_inputs())
    for i in range(LAYERS):
        assert_same_mask(*(masks[f"model.layers.{i}.self_attn.{part}"] for part in ("q_proj", "v_proj")), same=True)


@every_family
def test_no_dropout_in_eval_mode(family):
    inputs = make_inputs()
    expected = make_patched(family)(**inputs).logits
    model = make_patched(family, lora_dropout=0.5)
    state = torch.get_rng_state()
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.train()(**inputs).logits, expected)


def test_gradients_with_dropout_agree_with_differences():
    # A family whose norms compute in float64; those of Llama round to float32.
    model, inputs, step = make_patched("opt_norm_first", lora_dropout=0.3).train(), make_inputs(), 1e-5

    def loss():
        torch.manual_seed(4)
        return loss_of(model, inputs)

    torch.manual_seed(4)
    _, gradients = loss_and_gradients(model, inputs)
    parameters = dict(model.named_parameters())
    for name in ("layers.0.self_attn.v_proj.lora_A", "layers.1.fc2.lora_B", "layers.1.residual_2.lora_A",
                 "layers.2.shortcut_ffn.lora_B", "layers.0.shortcut_sa.lora_A"):
        parameter, direction = parameters[f"model.decoder.{name}"], gradients[f"model.decoder.{name}"]
        direction = direction / direction.norm()
        with torch.no_grad():
            parameter += step * direction
            up = loss()
            parameter -= 2 * step * direction
            difference = (up - loss()) / (2 * step)
            parameter += step * direction
        torch.testing.assert_close(difference, (gradients[f"model.decoder.{name}"] * direction).sum(),
                                   rtol=1e-6, atol=1e-10)


def test_mask_groups_hold_nothing_after_the_forward():
    model, seen = make_patched("llama", shortcuts=(), lora_dropout=0.3).train(), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        model(**make_inputs())
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_mask_group_of_members_that_are_not_all_called_holds_nothing_after_the_layer():
    model, seen = make_patched("llama", shortcuts=(), lora_dropout=0.3).train(), []
    layer = model.model.layers[0]
    layer.self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))

    def fail(module, args):
        raise KeyboardInterrupt

    layer.self_attn.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**make_inputs())
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


# ---- mask groups alone ----

def _opened(members) -> LinearGroup:
    group = LinearGroup(members)
    group.layer.begin().surroundings = surroundings_now()
    return group


def _key(group: LinearGroup, member: str, x: Tensor) -> Tensor:
    return group.enter(group.layer.now(), member, x).key(x)


ORDERS = {"as_listed": "qkv", "backwards": "vkq", "mixed": "kqv"}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_group_members_share_a_key_in_any_order(order):
    torch.manual_seed(0)
    group, x = _opened("qkv"), torch.randn(2, 3)
    keys = [_key(group, member, x) for member in order]
    torch.manual_seed(0)
    torch.randn(2, 3)
    assert keys[0] is keys[1] is keys[2]
    assert torch.equal(keys[0], torch.randint(0, 2**63 - 1, (1,)))
    assert not torch.equal(_key(group, order[0], x), keys[0]), "a complete group begins anew"


def test_group_member_with_another_tensor_draws_its_own_key():
    group, x = _opened("qkv"), torch.randn(2, 3)
    q, k, v = _key(group, "q", x), _key(group, "k", x.clone()), _key(group, "v", x)
    assert q is v and not torch.equal(q, k)


def test_group_member_called_twice_draws_anew():
    group, x = _opened("qkv"), torch.randn(2, 3)
    first, second, k = _key(group, "q", x), _key(group, "q", x), _key(group, "k", x)
    assert not torch.equal(first, second) and k is second


def test_group_copies_hold_nothing():
    group = _opened("qkv")
    _key(group, "q", torch.randn(2, 3))
    twin = copy.deepcopy(group)
    assert twin.members == group.members and not twin.layer.now().turns and twin.derived is None and twin.running() is None


@every_family
def test_groups_are_the_linears_that_read_one_tensor(family):
    model, inputs = make_model(family), {}
    layer = layers_of(model, family)[0]
    expected = {tuple(group) for group in GROUPS[type(layer).__name__]}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            # The tensors are kept, so that no two of them have one id.
            module.register_forward_pre_hook(
                lambda m, args, name=name: inputs.setdefault(id(args[0]), (args[0], []))[1].append(name))
    model(**make_inputs())
    assert {tuple(names) for _, names in inputs.values() if len(names) > 1} == expected


# ---- inference mode ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def test_training_and_reallocation_after_a_first_forward_without_grad(name, first):
    _, expected = loss_and_gradients(make_patched(name).train(), make_inputs())
    model = make_patched(name)
    with first():
        logits = model(**make_inputs()).logits
    assert torch.equal(logits, model(**make_inputs()).logits)
    _, gradients = loss_and_gradients(model.train(), make_inputs())
    assert_gradients_close(gradients, expected, tolerance=0.0)
    search = hlk.RankSearch(model)
    search.apply(dict.fromkeys(search.paths, 0))
    torch.testing.assert_close(model.eval()(**make_inputs()).logits, make_model(name, torch.float64)(**make_inputs()).logits)
    with first():
        search.apply(dict.fromkeys(search.paths, 2))
    search.apply({name: path.r for name, path in model.__dict__["_heterolora_state"].paths.items()})
    _, gradients = loss_and_gradients(model.train(), make_inputs())
    assert_gradients_close(gradients, expected, tolerance=0.0)


# ---- statistics ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_norm_last", "gpt2"])
def test_shadow_statistics_of_inactive_paths(name):
    family = FAMILIES[name]
    model, inputs = make_patched(name), make_inputs()
    search = hlk.RankSearch(model)
    off, partly = search.paths[::2], search.paths[1::4]
    search.apply({**{path: 0 for path in off}, **{path: 1 for path in partly}})
    sources, outs = {}, {}
    for path in search.paths:
        layer_name, _, site = path.rpartition(".")
        if site in ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"):
            index = int(layer_name.rpartition(".")[2])
            part = family.feed_forward if site in ("residual_2", "shortcut_sa") else family.attention
            where = family.f if site in ("residual_2", "shortcut_ffn") else family.h
            source = layers_of(model, family)[index - (site == "shortcut_ffn")].get_submodule(where)
            target = model.get_submodule(layer_name).get_submodule(part)
        else:
            source = target = model.get_submodule(path)
        source.register_forward_pre_hook(lambda m, args, path=path: sources.update({path: args[0].detach().flatten(0, -2)}))
        target.register_forward_hook(lambda m, args, out, path=path: (out.retain_grad(), outs.update({path: out}))[0])
    with hlk.collect_statistics(model) as ledger:
        _, gradients = loss_and_gradients(model, inputs)
    table, parameters = ledger.table(), dict(model.named_parameters())
    assert set(table) == set(search.paths)
    for path, found in table.items():
        A, B = (parameters[f"{path}.{leaf}"].detach() for leaf in ("lora_A", "lora_B"))
        h, grad_out = sources[path] @ A.t(), outs[path].grad.flatten(0, -2)
        q = grad_out @ B
        grad_A, grad_B = 2.0 * q.t() @ sources[path], 2.0 * grad_out.t() @ h
        expected = {
            "hidden_sq": h.square().sum(0), "grad_A_sq": grad_A.square().sum(1), "grad_B_sq": grad_B.square().sum(0),
            "abs_A_grad_A": (A * grad_A).abs().sum(1), "abs_B_grad_B": (B * grad_B).abs().sum(0),
            "gate_grad": 2.0 * (q * h).sum(0),
            "taylor_sq": (A * grad_A).square().sum(1) + (B * grad_B).square().sum(0),
        }
        assert found.keys() == expected.keys()
        for column, values in expected.items():
            assert values.abs().min() > 0 and found[column].dtype == torch.float32
            torch.testing.assert_close(found[column].double(), values, rtol=1e-6, atol=1e-12, msg=f"{path} {column}")
        torch.testing.assert_close((A * grad_A).sum(1), expected["gate_grad"])
        torch.testing.assert_close((B * grad_B).sum(0), expected["gate_grad"])
        rows = 0 if path in off else 1 if path in partly else len(A)
        for gradient, shadow in ((gradients[f"{path}.lora_A"], grad_A), (gradients[f"{path}.lora_B"].t(), grad_B.t())):
            torch.testing.assert_close(gradient[:rows], shadow[:rows], rtol=1e-9, atol=1e-15)
            assert not gradient[rows:].any()


def test_statistics_do_not_change_results():
    model, inputs = make_patched("llama"), make_inputs()
    hlk.RankSearch(model).apply({"model.layers.1.self_attn.q_proj": 0, "model.layers.1.shortcut_ffn": 1})
    losses, expected = loss_and_gradients(model, inputs)
    with hlk.collect_statistics(model):
        found_losses, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(losses[0], found_losses[0])
    assert_gradients_close(gradients, expected, tolerance=1e-12, may_be_zero=True)


# ---- ranks, moves, loads ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_inactive_rows_are_as_if_they_were_not_there(name):
    inputs, model = make_inputs(), make_patched(name)
    masks, generator = {}, torch.Generator().manual_seed(0)
    search = hlk.RankSearch(model)
    for path, rank in search.ranks.items():
        masks[path] = torch.rand(rank, generator=generator) < 0.5
    model(**inputs)
    search.apply(masks)
    twin = EagerTwin(make_model(name, torch.float64), model, FAMILIES[name])
    with torch.no_grad():
        for path, mask in masks.items():
            twin.adapters[f"{path}.lora_B"][:, ~mask] = 0
    losses, gradients = loss_and_gradients(model, inputs)
    expected_losses, expected = twin.loss_and_gradients(inputs)
    for path, mask in masks.items():
        expected[f"{path}.lora_B"][:, ~mask] = 0
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert_gradients_close(gradients, expected, may_be_zero=True)


MOVES = {"to_dtype": lambda m: m.to(torch.float64), "double": nn.Module.double, "to_and_back": lambda m: m.half().double(),
         "bfloat16": nn.Module.bfloat16, "half": nn.Module.half, "apply": lambda m: m._apply(lambda t: t.clone())}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_moved_model_computes_with_its_masks(name, move):
    model, inputs = make_patched(name, torch.float32), make_inputs()
    search = hlk.RankSearch(model)
    search.apply({path: 0 if i % 2 else [True, *[False] * (rank - 1)] for i, (path, rank) in enumerate(search.ranks.items())})
    expected = model(**inputs).logits
    full = make_patched(name, torch.float32)(**inputs).logits
    move(model)
    masks = [buffer for key, buffer in model.named_buffers() if key.endswith("lora_mask")]
    assert {mask.dtype for mask in masks} == {torch.bool} and sum(int(mask.sum()) for mask in masks) == (len(masks) + 1) // 2
    assert not torch.allclose(expected, full, rtol=0.1, atol=0.01)
    found = model(**inputs).logits
    assert found.dtype == next(model.parameters()).dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
    _, gradients = loss_and_gradients(model, inputs)
    assert {gradient.dtype for gradient in gradients.values()} == {found.dtype}


def test_moved_model_leaves_nothing_on_its_old_device():
    model, x = patch(nn.Sequential(nn.Linear(5, 4)), shortcuts=()), torch.randn(2, 5)
    model(x)
    assert model.to("meta")(x.to("meta")).device.type == "meta"
    derived = model[0]._heterolora.derived
    assert {t.device.type for t in (derived.scaling, derived.gate, derived.active, derived.probe)} == {"meta"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loaded_state_brings_masks_and_adapters(name, assign):
    source, inputs = make_patched(name), make_inputs()
    hlk.RankSearch(source).apply({path: 1 for path in hlk.RankSearch(source).paths[::3]})
    target = patch(make_model(name, torch.float64), seed=9)
    before = target(**inputs).logits
    assert not target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign).missing_keys
    assert torch.equal(target(**inputs).logits, source(**inputs).logits) and not torch.equal(before, source(**inputs).logits)
    assert hlk.RankSearch(source).paths == hlk.RankSearch(target).paths


def test_base_checkpoint_loads_into_a_patched_model():
    model = patch(make_model("llama", torch.float64), open_B=False)
    result = model.load_state_dict(make_model("llama", torch.float64, seed=5).state_dict(), strict=False)
    assert not result.unexpected_keys and all("lora_" in key for key in result.missing_keys)
    assert torch.equal(model(**make_inputs()).logits, make_model("llama", torch.float64, seed=5)(**make_inputs()).logits)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (0, 5), (2, 3, 5), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear_of_any_shape_equals_its_formula(shape, bias):
    torch.manual_seed(0)
    model = patch(nn.Sequential(nn.Linear(5, 7, bias=bias)).double(), shortcuts=())
    x, linear = torch.randn(shape, dtype=torch.float64, requires_grad=True), model[0]
    expected = F.linear(x, linear.weight, linear.bias) + 2 * x @ linear.lora_A.t() @ linear.lora_B.t()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    leaves = (x, linear.lora_A, linear.lora_B)
    for one, other in zip(torch.autograd.grad(model(x).sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_weight_that_is_trained_beside_its_adapter_gets_a_gradient():
    torch.manual_seed(0)
    model = patch(nn.Sequential(nn.Linear(5, 7)).double(), shortcuts=())
    linear, x = model[0].requires_grad_(True), torch.randn(3, 5, dtype=torch.float64)
    expected = F.linear(x, linear.weight, linear.bias) + 2 * x @ linear.lora_A.t() @ linear.lora_B.t()
    leaves = (linear.weight, linear.bias)
    for one, other in zip(torch.autograd.grad(model(x).square().sum(), leaves),
                          torch.autograd.grad(expected.square().sum(), leaves)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
