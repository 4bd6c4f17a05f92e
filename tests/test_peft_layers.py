"""PEFT's LoRA layers on the fused op: they compute what PEFT's do, and stay PEFT's in everything else."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from families import (  # noqa: F401 - reference_backend is a fixture
    HIDDEN,
    assert_gradients_close,
    assert_restored,
    loss_and_gradients,
    make_inputs,
    make_model,
    reference_backend,
    snapshot,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import Trainer, TrainingArguments

import heterolora_kernels as hlk
from heterolora_kernels import peft_layers
from heterolora_kernels.ops.rng import draw_rng, dropout_keep, dropout_scale

LINEARS = 21  # three layers of q, k, v, o, gate, up, down


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options})


def wrapped(family="llama", dtype=torch.float64, adapters=("default",), **options):
    """A tiny PEFT model in eval mode, every lora_B drawn."""
    model = get_peft_model(make_model(family, dtype), lora(**options), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, lora(**{"r": 2, "lora_alpha": 5, **options}))
    model.base_model.set_adapter(list(adapters))
    return model.eval()


@contextmanager
def calls(monkeypatch):
    """Counts the calls of the op, by what it had to compute."""
    counts = {"linears": 0, "delta": 0}

    def counted(name, call, *args, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)

    with monkeypatch.context() as patch:
        for name in counts:
            call = getattr(peft_layers, f"call_{name}")
            patch.setattr(peft_layers, f"call_{name}", functools.partial(counted, name, call))
        yield counts


def quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hlk.accelerate_peft(model)


def assert_same(fused, plain, tolerance=1e-12):
    inputs = make_inputs()
    (loss,), gradients = loss_and_gradients(fused, inputs)
    (expected,), expected_gradients = loss_and_gradients(plain, inputs)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert_gradients_close(gradients, expected_gradients, tolerance)


def scaled(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.5)


CASES = {
    "llama": (dict(), None, LINEARS),
    "gpt2_conv1d": (dict(family="gpt2"), None, 12),
    "bert_bias": (dict(family="bert", target_modules=["query", "dense"]), None, 13),
    "rank_and_alpha_pattern": (dict(rank_pattern={"q_proj": 1, "down_proj": 8}, alpha_pattern={"v_proj": 2}), None, LINEARS),
    "rslora": (dict(use_rslora=True), None, LINEARS),
    "scale": (dict(), scaled, LINEARS),
    "two_active": (dict(adapters=("default", "second")), None, LINEARS),
    "second_active": (dict(adapters=("default", "second")), lambda model: model.set_adapter("second"), LINEARS),
    "dropout_in_eval": (dict(lora_dropout=0.3), None, LINEARS),
    "modules_to_save": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), None, 3),
    "trained_base": (dict(target_modules=["q_proj"]), lambda model: model.requires_grad_(True), 3),
    "lora_bias": (dict(target_modules=["c_fc"], family="gpt2", lora_bias=True), None, 0),
    "dora": (dict(use_dora=True), None, 0),
    "scale_of_no_float32": (dict(r=3, lora_alpha=1), None, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_peft(case, monkeypatch):
    options, change, fused_layers = CASES[case]
    plain = wrapped(**options)
    if change is not None:
        change(plain)
    fused = quietly(copy.deepcopy(plain))
    with calls(monkeypatch) as counts:
        assert_same(fused, plain)
    # Of the copy alone.
    assert counts == {"linears": fused_layers, "delta": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [True, False], ids=["float32_adapters", "adapters_of_the_base"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_error_on_cpu_is_bounded_by_that_of_peft(dtype, adapters, autocast, monkeypatch):
    if "cpu" not in hlk.available_backends():
        pytest.skip("the package was built without its compiled kernels")
    if autocast and dtype == torch.float16:
        pytest.skip("autocast to bfloat16 needs nothing of float16")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(37, 29), nn.Tanh(), nn.Linear(29, 11, bias=False)).to(dtype)
    plain = get_peft_model(base, lora(target_modules=["0", "2"]))
    plain.add_adapter("second", lora(target_modules=["0", "2"], r=3))
    plain.base_model.set_adapter(["default", "second"])
    if not adapters:
        plain.to(dtype)
    truth, fused = copy.deepcopy(plain).double(), hlk.accelerate_peft(copy.deepcopy(plain))
    x, seed = torch.randn(3, 21, 37).to(dtype), torch.randn(3, 21, 11)

    def run(model, dtype):
        own = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            out = model(own)
        out.backward(seed.to(out.dtype))
        return [out, own.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    with hlk.use_backend("cpu"), calls(monkeypatch) as counts:
        found = run(fused, dtype)
    assert counts["linears"] == 2
    for i, (value, own, true) in enumerate(zip(found, run(plain, dtype), run(truth, torch.float64))):
        assert value.dtype == own.dtype
        size = true.abs().max()
        error, yardstick = ((t.double() - true).abs().max() / size for t in (value, own))
        slack = 0.25 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
        assert error <= (2 if i == 0 else 3) * yardstick + slack, f"{i}: {error:.3g}, PEFT {yardstick:.3g}"


def test_dropout_is_that_of_the_op_and_adapters_share_its_mask():
    model = get_peft_model(nn.Sequential(nn.Linear(13, 7)).double(), lora(target_modules=["0"], lora_dropout=0.4))
    model.add_adapter("second", lora(target_modules=["0"], lora_dropout=0.4, r=2))
    model.base_model.set_adapter(["default", "second"])
    hlk.accelerate_peft(model).train()
    layer = model.base_model.model[0]
    x = torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = model(x)
    torch.manual_seed(3)
    keep = dropout_keep(draw_rng(x.device), 6, 13, 0, 0.4).reshape(2, 3, 13)
    assert 0 < keep.sum() < keep.numel()
    dropped = torch.where(keep, x * dropout_scale(0.4), 0.0)
    expected = layer.base_layer(x)
    for name in ("default", "second"):
        expected = expected + layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](dropped))
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert len(parameters) == 5
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (out, expected))):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_different_dropouts_run_as_peft_in_training_alone(monkeypatch):
    model = wrapped(adapters=("default",), target_modules=["q_proj"], lora_dropout=0.4)
    model.add_adapter("second", lora(target_modules=["q_proj"], lora_dropout=0.2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(UserWarning, match=r"^0 of 3 .*3: active adapters differ in lora_dropout"):
        hlk.accelerate_peft(model.train())
    plain = hlk.restore_peft(copy.deepcopy(model))
    outs = []
    with calls(monkeypatch) as counts:
        for each in (model, plain):
            torch.manual_seed(5)
            outs.append(each(**make_inputs()).logits)
        assert torch.equal(*outs) and counts["linears"] == 0
        model.eval()(**make_inputs())
        assert counts["linears"] == 3


def test_what_peft_changes_later_is_followed(monkeypatch, tmp_path):
    fused, plain = (wrapped(adapters=("default", "second"), target_modules=["q_proj", "v_proj"]) for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    hlk.accelerate_peft(fused)
    inputs = make_inputs()

    def both(change, fused_layers, tolerance=1e-12):
        for model in (fused, plain):
            torch.manual_seed(11)
            change(model)
        with calls(monkeypatch) as counts, torch.no_grad():
            torch.testing.assert_close(fused(**inputs).logits, plain(**inputs).logits, rtol=tolerance, atol=tolerance)
        assert counts["linears"] == fused_layers

    both(lambda model: None, 6)
    both(lambda model: model.set_adapter("second"), 6)
    both(lambda model: model.base_model.set_adapter(["second", "default"]), 6)
    both(lambda model: model.add_adapter("third", lora(r=1, target_modules=["q_proj", "o_proj"])), 6)
    # Layers that came with the third run PEFT's forward, until they are asked for too; v_proj has none of it.
    both(lambda model: model.set_adapter("third"), 3)
    with pytest.warns(UserWarning, match="6 of 9 LoRA layers run on the fused op; .*3: no adapter is active"):
        hlk.accelerate_peft(fused)
    both(lambda model: None, 6)
    both(lambda model: model.delete_adapter("third"), 6)
    both(lambda model: model.save_pretrained(tmp_path), 6)
    both(lambda model: model.load_adapter(tmp_path / "second", "loaded"), 6)
    both(lambda model: model.set_adapter("loaded"), 6)
    both(lambda model: model.merge_adapter(), 0)
    both(lambda model: model.unmerge_adapter(), 6)
    both(lambda model: model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "mixed", combination_type="cat"), 6)
    both(lambda model: model.set_adapter("mixed"), 6)
    with fused.disable_adapter(), plain.disable_adapter():
        both(lambda model: None, 0)
    both(lambda model: None, 6)
    names = ["__base__", "default"]
    assert torch.equal(fused(**inputs, adapter_names=names).logits, plain(**inputs, adapter_names=names).logits)
    bare, expected = fused.merge_and_unload(), plain.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in bare.modules())
    torch.testing.assert_close(bare(**inputs).logits, expected(**inputs).logits, rtol=1e-12, atol=1e-12)


def test_packed_weights_follow_merging():
    if "cpu" not in hlk.available_backends():
        pytest.skip("the package was built without its compiled kernels")
    plain = get_peft_model(nn.Sequential(nn.Linear(64, 48)).bfloat16(), lora(target_modules=["0"]))
    fused = hlk.accelerate_peft(copy.deepcopy(plain))
    x, layer = torch.randn(40, 64).bfloat16(), fused.base_model.model[0]
    with hlk.use_backend("cpu"):
        fused(x)
        assert layer._heterolora_fusion.packs.tensors
        # One value, which no sample of the weight would show.
        for model in (fused, plain):
            other = model.base_model.model[0].base_layer.weight.data
            model.merge_adapter()
            other[5, 7] += 4.0
            model.unmerge_adapter()
        torch.testing.assert_close(fused(x), plain(x), rtol=2e-2, atol=2e-2)
        packs = layer._heterolora_fusion.packs
        assert packs.tensors and packs.budget.used == sum(t.numel() for t in packs.tensors)
        fused.to(torch.float32)
        assert not packs.tensors and packs.budget.used == 0


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(use_reentrant):
    plain = wrapped(lora_dropout=0.5).train()
    fused = hlk.accelerate_peft(plain)
    checkpointed = copy.deepcopy(fused)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    results = []
    for model in (checkpointed, fused):
        torch.manual_seed(2)
        results.append(loss_and_gradients(model, make_inputs()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert_gradients_close(results[0][1], results[1][1], 1e-12)


def test_copies_pickles_and_files_are_those_of_peft(tmp_path):
    plain = wrapped(target_modules=["q_proj", "v_proj"])
    fused = hlk.accelerate_peft(copy.deepcopy(plain))
    inputs = make_inputs()
    fused(**inputs)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(stream, weights_only=False)):
        assert all(isinstance(m, peft_layers.FusedLora) for m in copied.modules() if isinstance(m, Linear))
        assert torch.equal(copied(**inputs).logits, fused(**inputs).logits)
    assert list(fused.state_dict()) == list(plain.state_dict()) and str(fused) == str(plain)
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "fused"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    # The targets are a set, whose copy may be written in another order.
    one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "fused"))
    assert one.keys() == other.keys()
    assert all(value == other[key] or sorted(value) == sorted(other[key]) for key, value in one.items())
    loaded = hlk.accelerate_peft(PeftModel.from_pretrained(make_model("llama", torch.float64), tmp_path / "fused"))
    assert torch.equal(loaded(**inputs).logits, fused(**inputs).logits)


def test_restore_gives_back_the_very_same_modules():
    model = wrapped()
    before = snapshot(model)
    hlk.accelerate_peft(model)
    loss_and_gradients(model, make_inputs())
    assert hlk.restore_peft(model) is model
    assert_restored(model, before)
    assert_restored(hlk.restore_peft(model), before)


def test_summary_counts_what_keeps_the_forward_of_peft():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(5, HIDDEN), nn.Conv1d(3, 3, 1)
            self.first, self.second, self.hooked = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, ids):
            return self.hooked(self.second(self.first(self.conv(self.embed(ids)))))

    torch.manual_seed(0)
    plain = get_peft_model(Net(), lora(target_modules=["embed", "conv", "first", "second", "hooked"]))
    plain.base_model.model.hooked.lora_A["default"].register_forward_hook(lambda module, args, out: 2 * out)
    fused = copy.deepcopy(plain)
    with pytest.warns(UserWarning) as caught:
        hlk.accelerate_peft(fused)
    assert [str(warning.message) for warning in caught] == [
        "2 of 5 LoRA layers run on the fused op; the others keep PEFT's forward (1: Embedding layer, 1: Conv1d layer, "
        "1: hooks on an adapter)"]
    ids = torch.tensor([[0, 3, 4]])
    torch.testing.assert_close(fused(ids), plain(ids), rtol=1e-5, atol=1e-5)


def test_hooks_on_the_base_layer_run(monkeypatch):
    plain = get_peft_model(nn.Sequential(nn.Linear(9, 7)).double(), lora(target_modules=["0"]))
    plain.base_model.model[0].base_layer.register_forward_hook(lambda module, args, out: out.tanh())
    fused, x = hlk.accelerate_peft(copy.deepcopy(plain)), torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    with calls(monkeypatch) as counts:
        found = torch.autograd.grad(fused(x).square().sum(), [x, *(p for p in fused.parameters() if p.requires_grad)])
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *(p for p in plain.parameters() if p.requires_grad)])
    assert counts == {"linears": 0, "delta": 1}
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_call_depends_on_the_default_device():
    model = hlk.accelerate_peft(get_peft_model(nn.Sequential(nn.Linear(9, 7)).double(), lora(target_modules=["0"])))
    x = torch.randn(2, 9, dtype=torch.float64)
    with torch.device("meta"):
        out = model(x)
    assert torch.equal(out, model(x))


def test_vectors_of_a_call_without_memory_are_not_kept():
    model = hlk.accelerate_peft(get_peft_model(nn.Sequential(nn.Linear(9, 7)), lora(target_modules=["0"])))
    model.add_adapter("second", lora(target_modules=["0"], r=3))
    model.set_adapter("second")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model(torch.randn(2, 9)), FakeTensor)
    assert type(model(torch.randn(2, 9))) is torch.Tensor


def test_wrong_input_has_the_error_of_peft():
    plain = get_peft_model(nn.Sequential(nn.Linear(9, 7)), lora(target_modules=["0"]))
    errors = []
    for model in (plain, hlk.accelerate_peft(copy.deepcopy(plain))):
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(2, 9, dtype=torch.float64))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_model_without_peft_is_refused():
    with pytest.raises(ValueError, match="model has no LoRA layer of PEFT"):
        hlk.accelerate_peft(make_model("llama"))
    with pytest.raises(TypeError, match="model must be"):
        hlk.accelerate_peft("llama")


@pytest.mark.parametrize("accelerate", [False, True], ids=["plain", "accelerated"])
def test_patching_a_model_of_peft_is_refused_until_its_adapters_are_off(accelerate):
    model = wrapped(target_modules=["q_proj"])
    if accelerate:
        hlk.accelerate_peft(model)
    with pytest.raises(ValueError, match=r"model has adapters of PEFT.*unload\), or merge them"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig(search="off"))
    base = hlk.apply_heterolora(model.merge_and_unload(), hlk.HeteroLoraConfig(search="off"))
    assert sum(hasattr(module, "lora_A") for module in base.modules()) == LINEARS


def test_compiled_model_is_one_graph():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)), lora(target_modules=["0", "2"]))
    plain, x = copy.deepcopy(model), torch.randn(5, 9)
    compiled = torch.compile(hlk.accelerate_peft(model), backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), plain(x)
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_trainer_trains_as_with_peft(tmp_path):
    data = [{name: value[0] for name, value in make_inputs(seed, 1, padding=False).items()} for seed in range(8)]
    trained = []
    for accelerate in (False, True):
        model = wrapped(dtype=torch.float32, target_modules=["q_proj", "down_proj"])
        if accelerate:
            hlk.accelerate_peft(model)
        arguments = TrainingArguments(str(tmp_path / str(accelerate)), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
                                      learning_rate=1e-2, report_to="none", disable_tqdm=True, gradient_checkpointing=True)
        Trainer(model, arguments, train_dataset=data).train()
        trained.append(load_file(tmp_path / str(accelerate) / "checkpoint-3" / "adapter_model.safetensors"))
    assert trained[0].keys() == trained[1].keys()
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-4, atol=1e-4)
