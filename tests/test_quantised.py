"""Quantised bases: they compute their output themselves, the paths and the statistics join it."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import warnings
import weakref

import pytest
import torch
from families import reference_backend  # noqa: F401 - a fixture
from helpers_search import VOCAB, fill_B, llama_batch, path_names
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import heterolora_kernels as hlk
from heterolora_kernels import peft_layers
from heterolora_kernels.callback import HeteroLoraCallback
from heterolora_kernels.layers import PatchedQuantised
from heterolora_kernels.state import state_of

HIDDEN, LINEARS, PATHS = 64, 14, 21


def make_llama(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False, initializer_range=0.2)).to(dtype)


def patched(model, **config):
    config = {"r": 3, "lora_alpha": 6, "shortcuts": "all", "shortcut_r": 2, "search": "off", **config}
    return fill_B(hlk.apply_heterolora(model, hlk.HeteroLoraConfig(**config)))


def replace_linears(model, quantised):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantised(module))
    return model


# ---- a quantised linear without rounding: what joins it is what joins the linear it stands for ----


class Int8Linear(nn.Module):
    """Weights as int8 steps of 1 / 64, as a layer of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("steps", (64 * linear.weight.detach()).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.steps.to(x.dtype) / 64).t()


def rounded(linear):
    with torch.no_grad():
        linear.weight.copy_((64 * linear.weight).round().clamp(-128, 127) / 64)
    return linear


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("mixed", [False, True], ids=["every_linear", "half_of_them"])
def test_everything_equals_that_of_the_unquantised_base(dropout, mixed):
    plain = replace_linears(make_llama(torch.float64), rounded)
    places = iter(range(LINEARS))
    # Half of them: q quantised, k not, and so on; together they still share one mask.
    model = replace_linears(copy.deepcopy(plain), lambda linear: linear if mixed and next(places) % 2 else Int8Linear(linear))
    results = []
    for each in (model, plain):
        patched(each, lora_dropout=dropout, adapter_dtype=torch.float64)
        quantised = [module for module in each.modules() if isinstance(module, PatchedQuantised)]
        assert len(quantised) == (each is model) * (LINEARS // 2 if mixed else LINEARS)
        torch.manual_seed(4)
        with hlk.collect_statistics(each) as ledger:
            logits = each.train()(**llama_batch(0)).logits
            logits.square().mean().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.requires_grad}
        assert all(grad.any() for grad in gradients.values())
        results.append((logits, gradients, ledger.table()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


# ---- the libraries ----


def _bitsandbytes(name, **options):
    def quantise(model):
        layer = getattr(importlib.import_module("bitsandbytes").nn, name)

        def quantised(linear):
            made = layer(linear.in_features, linear.out_features, bias=False, **options)
            made.load_state_dict(linear.state_dict())
            return made.to("cpu")

        return replace_linears(model, quantised)
    return quantise


def _torchao(model):
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(),
                           lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
    return model


def _hqq(model):
    hqq = importlib.import_module("hqq.core.quantize")
    return replace_linears(model, lambda linear: hqq.HQQLinear(
        linear, hqq.BaseQuantizeConfig(nbits=4, group_size=32), compute_dtype=torch.float32, device="cpu"))


LIBRARIES = {
    "bitsandbytes_4bit": ("bitsandbytes", _bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4")),
    "bitsandbytes_8bit": ("bitsandbytes", _bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
    "torchao_int8": ("torchao", _torchao),
    "hqq_4bit": ("hqq", _hqq),
}


@pytest.fixture(params=LIBRARIES)
def quantise(request):
    library, function = LIBRARIES[request.param]
    pytest.importorskip(library, reason=f"{library} is not installed")
    return function


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_library_trains_scores_and_comes_back(quantise, tmp_path):
    base, batch = quantise(make_llama()), llama_batch(0)
    types, before = [type(module) for module in base.modules()], base(**batch).logits.detach()
    model = hlk.apply_heterolora(base, hlk.HeteroLoraConfig(r=3, lora_alpha=6, shortcuts="all", search="off"))
    assert len(path_names(model)) == PATHS and torch.equal(model(**batch).logits, before)
    fill_B(model)
    with hlk.collect_statistics(model) as ledger:
        model(**batch).loss.backward()
    table = ledger.table()
    # Through every quantised base to the first layer: what ties forward, backward, scale and gate together.
    for name, path in state_of(model).paths.items():
        for lora, dim in ((path.lora_A, 1), (path.lora_B, 0)):
            torch.testing.assert_close((lora * lora.grad).sum(dim), table[name]["gate_grad"], rtol=1e-3, atol=1e-6)
        assert path.lora_A.dtype == torch.float32 and table[name]["gate_grad"].any()
    logits = model(**batch).logits.detach()
    assert torch.equal(copy.deepcopy(model)(**batch).logits, logits)
    hlk.save_adapter(model, tmp_path / "native")
    assert torch.equal(hlk.load_adapter(quantise(make_llama()), tmp_path / "native")(**batch).logits, logits)
    # What was trained on a quantised base may be served on the base that it was made from.
    full = hlk.load_adapter(make_llama(), tmp_path / "native")
    assert 0 < (full(**batch).logits - logits).abs().max() < 0.5 * logits.abs().max()
    with pytest.raises(ValueError, match="q_proj' is quantised.*to merge it there"):
        hlk.merge_heterolora(model, drop_shortcuts=True)
    search = hlk.RankSearch(model)
    with pytest.raises(ValueError, match="synflow needs the absolute values.*quantised"):
        search.score([batch], proxy="synflow")
    scores = search.score([batch], proxy="snip", score="probe")
    assert len(scores) == PATHS and all(score > 0 for score in scores.values())
    hlk.remove_heterolora(model)
    assert [type(module) for module in base.modules()] == types
    assert not any("lora" in name for name in base.state_dict())


def test_targets_may_be_named(quantise):
    model = patched(quantise(make_llama()), shortcuts=(), target_modules=["q_proj", "down_proj"])
    assert [name.rpartition(".")[2] for name in path_names(model)] == 2 * ["q_proj", "down_proj"]
    with hlk.disable_adapter(model):
        off = model(**llama_batch(0)).logits
    assert not torch.equal(off, model(**llama_batch(0)).logits)


def test_class_that_cannot_be_changed_is_refused_by_name():
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = make_llama()
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    with pytest.raises(ValueError, match=r"proj.*\[QLinear\]: cannot be patched: the class of a optimum.quanto"):
        patched(model)


# ---- under transformers, and PEFT ----


@pytest.fixture
def four_bit(tmp_path):
    """A model as transformers quantises it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make_llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)


def test_trainer_takes_a_quantised_model_with_our_adapters(four_bit, tmp_path):
    data = [{name: value[0] for name, value in llama_batch(seed, 1).items()} for seed in range(8)]

    def trainer(model, *callbacks):
        arguments = TrainingArguments(str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
                                      report_to="none", disable_tqdm=True, gradient_checkpointing=True)
        return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))

    with pytest.raises(ValueError, match="purely quantized"):
        trainer(four_bit)
    model = hlk.apply_heterolora(four_bit, hlk.HeteroLoraConfig(r=4, shortcuts="all", interval=2, budget=0.5))
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").exists()
    callback = HeteroLoraCallback()
    trainer(model, callback).train()
    assert len(callback.search.history) >= 2
    loaded = hlk.load_adapter(copy.deepcopy(hlk.remove_heterolora(copy.deepcopy(model))), tmp_path / "out" / "checkpoint-4")
    batch = llama_batch(3)
    torch.testing.assert_close(loaded.train()(**batch).logits, model.train()(**batch).logits)
    hlk.remove_heterolora(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model)


def test_a_quantised_model_that_is_dropped_is_gone_at_once_and_copies_save_themselves(tmp_path):
    model = make_llama()
    model.is_quantized = True
    patched(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.model.layers[0].self_attn.q_proj.lora_A.data.fill_(3.0)
        twin.save_pretrained(tmp_path)
        assert (load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.lora_A"] == 3.0).all()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["bitsandbytes_4bit", "torchao_int8"])
def test_peft_on_a_quantised_base_runs_on_the_op(kind, request, monkeypatch):
    if kind == "torchao_int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    base = request.getfixturevalue("four_bit") if kind == "bitsandbytes_4bit" else _torchao(make_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False))
        fused = hlk.accelerate_peft(copy.deepcopy(plain))
    calls, call = [], peft_layers.call_delta
    monkeypatch.setattr(peft_layers, "call_delta", lambda *args, **kwargs: (calls.append(1), call(*args, **kwargs))[1])
    results = []
    for model in (fused, plain):
        logits = model.train()(**llama_batch(0)).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert len(calls) == LINEARS
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_input_may_be_given_by_any_name():
    class Named(Int8Linear):
        def forward(self, input):
            return super().forward(input)

    model = patched(nn.Sequential(Named(nn.Linear(6, 5, bias=False))), shortcuts=())
    x = torch.randn(3, 6)
    assert torch.equal(model[0](input=x), model(x))


def test_base_without_a_backward_is_no_silent_loss_of_gradients():
    class Inference(Int8Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model = patched(replace_linears(make_llama(), Inference), shortcuts=())
    with torch.no_grad():
        model(**llama_batch(0))
    with pytest.raises(RuntimeError, match=r"base of 'model.layers.0.self_attn.o_proj' \(Inference\) gives no gradient"):
        model(**llama_batch(0))


def test_four_bits_learn_after_an_evaluation():
    """bitsandbytes packs weights for inference in an evaluation, and its packed linears have no backward."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    results = []
    for evaluate in (False, True):
        model = patched(LIBRARIES["bitsandbytes_4bit"][1](make_llama()))
        if evaluate:
            with torch.no_grad():
                model.eval()(**llama_batch(1))
        model.train()(**llama_batch(0)).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*results)
    base = hlk.remove_heterolora(model).eval()
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on processors with AVX-512 bf16 alone")
    with torch.no_grad():
        base(**llama_batch(1))
    with pytest.raises(ValueError, match="up_proj.*: bitsandbytes has packed its weight for inference"):
        patched(base)
