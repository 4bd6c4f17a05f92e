"""Packed weights: where they are made, what they may take, and that a stale one is never used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import heterolora_kernels as hlk
from heterolora_kernels import backends, functional, packing
from heterolora_kernels.ops.ledger import row_statistics
from heterolora_kernels.packing import FEW_ROWS, PackBudget

pytestmark = pytest.mark.skipif("cpu" not in hlk.available_backends(), reason="the compiled extension is not built")

ROWS = FEW_ROWS + 9


def _model(dtype=torch.float32, pack="auto", conv1d=False):
    torch.manual_seed(0)
    layers = [nn.Linear(19, 37, dtype=dtype), nn.Linear(37, 11, bias=False, dtype=dtype)]
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        layers[0] = Conv1D(37, 19).to(dtype)
    return hlk.apply_heterolora(nn.Sequential(*layers), hlk.HeteroLoraConfig(r=3, init_B="kaiming_uniform", pack=pack))


def _x(rows=ROWS, dtype=torch.float32):
    return torch.randn(rows, 19, generator=torch.Generator().manual_seed(1)).to(dtype)


def _packs(model):
    return [module._heterolora.packs for module in model]


def _run(model, x=None):
    """Output and the gradient of x."""
    x = (_x(dtype=model[1].weight.dtype) if x is None else x).requires_grad_()
    out = model(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packs_change_no_bit(dtype, conv1d):
    packed, plain = _model(dtype, "copy", conv1d), _model(dtype, "off", conv1d)
    assert _same(_run(packed), _run(plain)) and _same(_run(packed), _run(plain))
    made = [tensor for packs in _packs(packed) for tensor in packs.tensors if tensor.numel()]
    assert all(not packs.tensors for packs in _packs(plain))
    if torch.ops.heterolora_kernels.cpu_packed_bytes(packed[1].weight, True):
        assert len(made) == 4


def test_a_pack_is_read():
    model = _model(pack="copy")
    before = _run(model)
    for packs in _packs(model):
        for tensor in packs.tensors:
            tensor[64:] = 0
    assert not _same(_run(model), before)
    hlk.invalidate(model)
    assert _same(_run(model), before)


def test_the_second_pack_is_made_for_the_first_gradient():
    model = _model(pack="copy")
    with torch.no_grad():
        model(_x())
    assert [packs.tensors[1].numel() for packs in _packs(model)] == [0, 0]
    _run(model)
    assert all(packs.tensors[1].numel() for packs in _packs(model))


def test_few_rows_make_none():
    model = _model(pack="copy")
    model(_x(FEW_ROWS))
    assert all(not packs.tensors for packs in _packs(model))


def _add(model):
    with torch.no_grad():
        model[0].weight.add_(0.5)


def _write_through_data(model):
    model[0].weight.data.mul_(-1.5)


def _load(model):
    state = {name: value + 1 if name.endswith("weight") else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def _load_assigned(model):
    model.load_state_dict({name: value + 1 if name.endswith("weight") else value for name, value in model.state_dict().items()},
                          assign=True)


def _write_a_part_and_say_so(model):
    model[0].weight.data[3, 4] += 100
    hlk.invalidate(model)


def _under_inference_mode(model):
    with torch.inference_mode():
        model[0].weight.mul_(2.0)


CHANGES = [_add, _write_through_data, _load, _load_assigned, _write_a_part_and_say_so, _under_inference_mode]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_weight_is_followed(change):
    model, plain = _model(pack="copy"), _model(pack="off")
    _run(model)
    change(model), change(plain)
    assert _same(_run(model), _run(plain)) and _same(_run(model), _run(plain))


def test_a_graph_that_waits_is_safe_from_a_dropped_pack():
    model, x = _model(pack="copy"), _x().requires_grad_()
    expected = _run(model)[1]
    loss = model(x).square().sum()
    hlk.invalidate(model)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_makes_its_own(copied):
    model = _model(pack="copy")
    expected = _run(model)
    other = copied(model)
    assert all(not packs.tensors for packs in _packs(other))
    assert _packs(other)[0].budget.used == 0 and _packs(other)[0].budget is _packs(other)[1].budget
    assert _same(_run(other), expected)
    with torch.no_grad():
        other[0].weight.zero_()
    assert _same(_run(model), expected)


@pytest.mark.parametrize("move", [lambda m: m.double().float(), lambda m: m.bfloat16().float()], ids=["double", "bfloat16"])
def test_moving_drops_them(move):
    model = _model(pack="copy")
    _run(model)
    move(model)
    assert all(not packs.tensors for packs in _packs(model)) and _packs(model)[0].budget.used == 0


def test_a_trained_weight_is_not_packed_and_gets_its_gradient():
    model = _model(pack="copy")
    _run(model)
    model[0].weight.requires_grad_()
    model(_x()).sum().backward()
    assert not _packs(model)[0].tensors and bool(model[0].weight.grad.any())


def test_merging_leaves_nothing_behind():
    model, x = _model(pack="copy"), _x()
    _run(model)
    before = model(x).detach()
    hlk.merge_heterolora(model)
    assert not hasattr(model[0], "_heterolora")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_auto_stops_at_its_limit(monkeypatch):
    sizes = [torch.ops.heterolora_kernels.cpu_packed_bytes(module.weight, True) for module in _model()]
    monkeypatch.setattr(packing, "available_memory", lambda device: int(sizes[0] / packing.AUTO_SHARE) + 8)
    model, plain = _model(pack="auto"), _model(pack="off")
    assert _same(_run(model), _run(plain))
    assert [bool(packs.tensors) for packs in _packs(model)] == [True, False]
    assert _packs(model)[0].budget.used == sizes[0]


def test_auto_packs_nothing_where_the_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(packing, "available_memory", lambda device: None)
    model = _model(pack="auto")
    _run(model)
    assert all(not packs.tensors for packs in _packs(model))


def test_off_takes_nothing():
    assert not PackBudget("off").take(1, torch.device("cpu"))


def test_the_reference_backend_packs_nothing():
    model = _model(pack="copy")
    with hlk.use_backend("reference"):
        _run(model)
    assert all(not packs.tensors for packs in _packs(model))


def test_another_backend_in_between_is_followed():
    model = _model(pack="copy")
    expected = _run(model)
    with hlk.use_backend("reference"):
        _run(model)
    assert _same(_run(model), expected)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_nothing_of_a_call_without_memory_is_kept(conv1d, monkeypatch):
    monkeypatch.setattr(functional, "_no_biases", {})
    model, expected = _model(conv1d=conv1d), _run(_model(conv1d=conv1d))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(_run(model)[0], FakeTensor)
    assert not any(packs.tensors for packs in _packs(model))
    assert _same(_run(model), expected) and all(packs.tensors for packs in _packs(model))


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="pack must be one of"):
        hlk.HeteroLoraConfig(pack="always")


# ---- the ledger's rows of accumulated gradients ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_statistics_of_all_paths_in_one_pass(dtype):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    ranks = (0, 1, 13, 64)
    lora_A, grad_A = [draw(r, 37) for r in ranks], [draw(r, 37) for r in ranks]
    lora_B, grad_B = [draw(21, r) for r in ranks], [draw(21, r, scale=1e-3) for r in ranks]
    grad_A[2] = grad_A[2].t().contiguous().t()  # a gradient may lie the other way round
    rows = backends.extra("cpu", "row_statistics")(lora_A, lora_B, grad_A, grad_B)
    expected = torch.cat([row_statistics(*(t.double() for t in tensors)) for tensors in zip(lora_A, lora_B, grad_A, grad_B)])
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-9)


def test_row_statistics_names_what_does_not_fit():
    fused = backends.extra("cpu", "row_statistics")
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"grad_B\[0\] must be \[4, 2\]"):
        fused([a], [b], [a], [torch.ones(4, 3)])
    with pytest.raises(TypeError, match=r"grad_A\[0\] must be torch.float32"):
        fused([a], [b], [a.bfloat16()], [b])
    with pytest.raises(ValueError, match="one entry per path"):
        fused([a], [b], [a], [])
