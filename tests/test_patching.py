"""What is selected, what is refused, what is trainable, and how a patch is undone, merged and switched off."""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
import transformers
from families import (
    HIDDEN,
    INNER,
    LAYERS,
    assert_restored,
    make_inputs,
    make_model,
    make_patched,
    patch,
    reference_backend,  # noqa: F401
    snapshot,
)
from torch import nn
from torch.optim import optimizer as torch_optimizer

import heterolora_kernels as hlk
from heterolora_kernels import patching
from heterolora_kernels.state import state_of

Q, V, DOWN = (f"model.layers.{{}}.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def paths_of(model: nn.Module) -> set[str]:
    return {name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")}


def shapes_of(model: nn.Module) -> dict[str, int]:
    """``{path: rank}``."""
    return {name.removesuffix(".lora_A"): p.shape[0] for name, p in model.named_parameters() if name.endswith(".lora_A")}


def every(name: str) -> set[str]:
    return {name.format(i) for i in range(LAYERS)}


class Mlp(nn.Module):
    """A small model that is no transformer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)
        self.classifier = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def forward(self, x):
        return self.classifier(self.second(torch.tanh(self.first(x))))


# ---- which modules ----

SELECTIONS = {
    "suffixes": (dict(target_modules=["q_proj", "v_proj"]), every(Q) | every(V)),
    "longer_suffix": (dict(target_modules=["layers.1.self_attn.q_proj"]), {Q.format(1)}),
    "whole_name": (dict(target_modules=[DOWN.format(2)]), {DOWN.format(2)}),
    "regex": (dict(target_modules=r".*\.layers\.[02]\.self_attn\.[qv]_proj"),
              {Q.format(0), Q.format(2), V.format(0), V.format(2)}),
    "exclude_suffix": (dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]), every(Q)),
    "exclude_regex": (dict(target_modules=["q_proj"], exclude_modules=r".*layers\.0\..*"), every(Q) - {Q.format(0)}),
    "rank_zero": (dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 0}), every(Q)),
    "the_head_by_name": (dict(target_modules=["lm_head"]), {"lm_head"}),
}


@pytest.mark.parametrize(("options", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_selection(options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths_of(patch(make_model("llama"), shortcuts=(), **options)) == expected


def test_suffix_matches_whole_parts_of_names_only():
    model = Mlp()
    model.my_first = nn.Linear(2, 2)
    assert paths_of(patch(model, shortcuts=(), target_modules=["first"])) == {"first"}


def test_all_linear_leaves_out_output_embeddings_and_heads_with_all_below():
    assert paths_of(patch(Mlp(), shortcuts=())) == {"first", "second"}
    model = patch(make_model("llama"), shortcuts=())
    assert len(paths_of(model)) == 7 * LAYERS and "lm_head" not in paths_of(model)
    config = transformers.RobertaConfig(vocab_size=61, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
                                        num_attention_heads=4, num_labels=3)
    model = patch(transformers.RobertaForSequenceClassification(config), shortcuts=())
    assert len(paths_of(model)) == 6 and not any("classifier" in name for name in paths_of(model))
    assert model.classifier.dense.weight.requires_grad and model.classifier.out_proj.bias.requires_grad


def test_ranks_alphas_and_patterns():
    model = patch(make_model("llama"), shortcuts=("residual_1",), r=4, lora_alpha=8, shortcut_r=None, shortcut_alpha=6,
                  target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 5},
                  alpha_pattern={V.format(0): 3})
    paths = state_of(model).paths
    assert shapes_of(model) == {name: path.r for name, path in paths.items()}
    assert paths[Q.format(0)].r == 4 and paths[Q.format(1)].r == 2 and paths[V.format(2)].r == 5
    assert paths[Q.format(0)].scaling == 2 and paths[Q.format(1)].scaling == 4
    assert paths[V.format(0)].scaling == 3 / 5 and paths[V.format(1)].scaling == 8 / 5
    assert paths["model.layers.0.residual_1"].r == 4 and paths["model.layers.0.residual_1"].scaling == 6 / 4


def test_rslora_divides_by_the_root():
    x, model = torch.randn(4, 5), Mlp()
    base = model.first(x)
    patch(model, shortcuts=(), r=4, lora_alpha=6, use_rslora=True)
    delta = 6 / 2 * (x @ model.first.lora_A.t() @ model.first.lora_B.t())
    torch.testing.assert_close(model.first(x), base + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_matches_nothing_is_named(pattern):
    with pytest.raises(ValueError, match=f"{pattern}.*nowhere"):
        patch(make_model("llama"), **{pattern: {"nowhere": 2}})


@pytest.mark.parametrize("target", [["nowhere"], "nowhere.*"], ids=["list", "regex"])
def test_target_that_matches_nothing_is_an_error(target):
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_modules.*nowhere.*q_proj"):
        patch(model, target_modules=target)
    assert_restored(model, before)


def test_one_of_many_targets_that_matches_nothing_is_warned_about():
    with pytest.warns(UserWarning, match="nowhere"):
        model = patch(make_model("llama"), shortcuts=(), target_modules=["q_proj", "nowhere"])
    assert paths_of(model) == every(Q)


def test_rank_zero_everywhere_is_an_error():
    with pytest.raises(ValueError, match="rank_pattern"):
        patch(make_model("llama"), shortcuts=(), target_modules=["q_proj"], rank_pattern={"q_proj": 0})


def test_conv1d_equals_the_transposed_linear():
    model = make_patched("gpt2", shortcuts=())
    conv, x = model.transformer.h[0].mlp.c_fc, torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert tuple(conv.lora_A.shape) == (3, HIDDEN) and tuple(conv.lora_B.shape) == (INNER, 3)
    expected = x @ (conv.weight + 2 * (conv.lora_B @ conv.lora_A).t()) + conv.bias
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    found, = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-10, atol=1e-12)


# ---- what cannot be adapted ----


class Experts(nn.Module):
    """Experts as transformers 5 holds them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 5, 6))
        self.router = nn.Linear(5, 4)


class Router(nn.Linear):
    """A subclass that returns something else than a tensor."""

    def forward(self, x):
        return super().forward(x).topk(1)


def test_subclass_that_is_no_linear_is_refused_by_name():
    model = Mlp()
    model.second = Router(7, 3)
    before = snapshot(model)
    with pytest.raises(ValueError, match="second.*Router.*returns a topk.*exclude_modules"):
        patch(model, shortcuts=(), target_modules=["second"])
    assert_restored(model, before)
    assert paths_of(patch(model, shortcuts=(), exclude_modules=["second"])) == {"first"}


def test_module_that_is_no_linear_is_refused_by_name():
    with pytest.raises(ValueError, match="embed_tokens.*Embedding"):
        patch(make_model("llama"), target_modules=["embed_tokens"])


def test_multihead_attention_is_warned_about_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.warns(UserWarning, match=r"1\.out_proj.*MultiheadAttention"):
        patch(model, shortcuts=())
    assert paths_of(model) == {"0"}


def test_multihead_attention_asked_for_is_an_error():
    with pytest.raises(ValueError, match=r"1\.out_proj.*MultiheadAttention"):
        patch(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), shortcuts=(), target_modules=["out_proj"])


def test_linears_that_a_fast_path_reads_are_adapted_or_said_by_name():
    # In eval mode nn.TransformerEncoderLayer hands the weights of its linears to one op and never calls them.
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            patch(model, shortcuts=())
        except ValueError as error:
            assert "linear1" in str(error)
            return
    if any("linear1" in str(warning.message) for warning in caught):
        return
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.train()(x), rtol=1e-4, atol=1e-5)


def test_three_dimensional_experts_are_warned_about_by_name():
    model = nn.ModuleDict({"experts": Experts(), "conv": nn.Conv1d(3, 4, 2)})
    with pytest.warns(UserWarning, match="3-D") as caught:
        patch(model, shortcuts=())
    assert "experts" in str(caught[0].message) and "conv" not in str(caught[0].message)
    assert paths_of(model) == {"experts.router"}


def test_embeddings_of_three_dimensions_are_no_experts():
    model = Mlp()
    model.embeddings = nn.ParameterDict({"cls_token": nn.Parameter(torch.randn(1, 1, 5))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, shortcuts=())


def test_attributes_of_another_adapter_are_refused_by_name():
    model = Mlp()
    model.second.lora_A = nn.Parameter(torch.randn(1, 7))
    with pytest.raises(ValueError, match="'second'.*lora_A"):
        patch(model, shortcuts=())


def test_patching_twice_is_an_error():
    model = make_patched("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="already patched.*remove_heterolora"):
        patch(model)
    assert_restored(model, before)


@pytest.mark.parametrize("call", [hlk.remove_heterolora, hlk.merge_heterolora, hlk.print_trainable_parameters],
                         ids=["remove", "merge", "print"])
def test_model_that_is_not_patched_is_said(call):
    with pytest.raises(ValueError, match="not patched"):
        call(Mlp())


@pytest.mark.parametrize(("model", "config", "name"), [(3, hlk.HeteroLoraConfig(), "model"), (Mlp(), {}, "config")],
                         ids=["model", "config"])
def test_wrong_types_are_named(model, config, name):
    with pytest.raises(TypeError, match=name):
        hlk.apply_heterolora(model, config)


# ---- undone when it fails ----

FAILURES = {
    "swap_class": "swap_class", "layer": "LayerState", "adapter": "make_adapter", "shortcut": "ShortcutPath",
    "group": "LinearGroup", "ledger": "Ledger",
}


@pytest.mark.parametrize("name", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "keyboard_interrupt"])
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "accelerate_hooks"])
def test_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, name, error, hooked):
    model, inputs = make_model("gemma2"), make_inputs()
    if hooked:
        model = accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    list(model.parameters())[2].requires_grad_(False)
    logits, before, keys = model(**inputs).logits, snapshot(model), list(model.state_dict())
    hooks = set(torch_optimizer._global_optimizer_pre_hooks)
    real, calls, after = getattr(patching, name), [], {"swap_class": 9, "Ledger": 1, "LayerState": 1}.get(name, 4)

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise error("in the middle")
        return real(*args, **kwargs)

    monkeypatch.setattr(patching, name, fail)
    with pytest.raises(error, match="in the middle"):
        patch(model, lora_dropout=0.1)
    monkeypatch.undo()
    assert_restored(model, before)
    assert list(model.state_dict()) == keys
    # Those of models that other tests left may go at any time.
    assert set(torch_optimizer._global_optimizer_pre_hooks) <= hooks
    assert torch.equal(logits, model(**inputs).logits)
    patch(model)


# ---- what is trainable ----


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


@pytest.mark.parametrize(("heads", "expected"), [
    (None, {f"classifier.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}),
    ((), set()),
    (["second"], {"second.weight"}),
], ids=["default", "none", "by_name"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable_before", "frozen_before"])
def test_modules_to_save_stay_trainable_and_nothing_else(heads, expected, frozen):
    model = Mlp().requires_grad_(not frozen)
    before = snapshot(model)
    patch(model, shortcuts=(), target_modules=["first"], modules_to_save=heads)
    assert trainable(model) == expected
    assert model.first.lora_A.requires_grad and model.first.lora_B.requires_grad
    assert_restored(hlk.remove_heterolora(model), before)


def test_modules_to_save_that_match_nothing_are_named():
    with pytest.raises(ValueError, match="modules_to_save.*nowhere"):
        patch(Mlp(), shortcuts=(), modules_to_save=["nowhere"])


def test_heads_keep_what_they_learnt():
    model = patch(Mlp(), shortcuts=())
    with torch.no_grad():
        model.classifier[0].weight.fill_(2.0)
    assert (hlk.remove_heterolora(model).classifier[0].weight == 2).all()


DTYPES = {
    "float32_base": (torch.float32, None, torch.float32), "float64_base": (torch.float64, None, torch.float64),
    "bfloat16_base": (torch.bfloat16, None, torch.float32), "float16_base": (torch.float16, None, torch.float32),
    "asked_for": (torch.float32, torch.bfloat16, torch.bfloat16), "by_name": (torch.float64, "float32", torch.float32),
}


@pytest.mark.parametrize(("base", "asked", "expected"), DTYPES.values(), ids=DTYPES)
def test_dtype_of_the_adapters(base, asked, expected):
    model = patch(make_model("llama", base), adapter_dtype=asked)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}
    assert model(**make_inputs()).logits.dtype == base


def test_adapter_dtype_that_no_forward_takes_is_refused_when_patching():
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match="adapter_dtype.*float64"):
        patch(model, adapter_dtype="float64")
    assert_restored(model, before)


def test_print_trainable_parameters(capsys):
    model = patch(Mlp(), shortcuts=(), r=4, modules_to_save=())
    hlk.RankSearch(model).apply({"first": 1})
    hlk.print_trainable_parameters(model)
    # 4 * (5 + 7 + 7 + 3 + 3 + 4 + 4 + 2) = 140 beside a base of 5*7 + 7 + 7*3 + 3*4 + 4 + 4*2 + 2 = 89; 3 * (5 + 7) are off.
    assert capsys.readouterr().out == ("trainable params: 140 || all params: 229 || trainable%: 61.1354 || "
                                       "active params: 104\n")


def test_lora_A_does_not_depend_on_the_other_paths():
    def values(**options):
        return {name: p for name, p in make_patched("llama", **options).named_parameters() if name.endswith("lora_A")}

    everything = values(seed=3)
    for options in (dict(shortcuts=()), dict(target_modules=["v_proj"], r=3), dict(target_modules=(), shortcuts="shortcut_sa")):
        some = values(seed=3, **options)
        assert 0 < len(some) < len(everything)
        assert all(torch.equal(p, everything[name]) for name, p in some.items())
    assert len({p.sum().item() for p in everything.values()}) == len(everything)
    assert not any(torch.equal(p, everything[name]) for name, p in values(seed=4).items())


@pytest.mark.parametrize("init", ["zeros", "kaiming_uniform"])
def test_initial_adapters(init):
    model = patch(make_model("llama"), open_B=False, init_B=init)
    for name, p in model.named_parameters():
        if name.endswith("lora_A"):
            assert 0 < p.abs().max() <= p.shape[1] ** -0.5
        elif name.endswith("lora_B"):
            assert not p.any() if init == "zeros" else 0 < p.abs().max() <= p.shape[1] ** -0.5


# ---- merge, disable ----


@pytest.mark.parametrize("name", ["llama", "opt_norm_first", "gpt2", "bert"])
def test_merge_equals_the_adapter(name):
    model, inputs = make_patched(name, shortcuts=()), make_inputs()
    first, second = list(state_of(model).paths)[:2]
    hlk.RankSearch(model).apply({first: [True, False, True], second: 0})
    expected, base = model(**inputs).logits, make_model(name, torch.float64)
    ids = {key: id(p) for key, p in base.named_parameters()}
    assert hlk.merge_heterolora(model) is model
    assert list(model.state_dict()) == list(base.state_dict()) and len(ids) == len(list(model.parameters()))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-11, atol=1e-12)
    assert not torch.equal(expected, base(**inputs).logits)
    merged, original = model.state_dict(), base.state_dict()
    assert torch.equal(merged[f"{second}.weight"], original[f"{second}.weight"])
    assert not torch.equal(merged[f"{first}.weight"], original[f"{first}.weight"])


def test_merge_refuses_active_shortcuts_unless_dropped():
    model, inputs = make_patched("llama"), make_inputs()
    before, parameters = model(**inputs).logits, {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="11 active shortcuts.*drop_shortcuts"):
        hlk.merge_heterolora(model)
    assert torch.equal(before, model(**inputs).logits)
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    expected = make_patched("llama", shortcuts=())(**inputs).logits
    hlk.merge_heterolora(model, drop_shortcuts=True)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-11, atol=1e-12)


def test_merge_takes_shortcuts_that_are_off():
    model = make_patched("llama")
    hlk.RankSearch(model).apply({p.name: 0 for p in state_of(model).paths.values() if p.site is not None})
    expected = model(**make_inputs()).logits
    torch.testing.assert_close(hlk.merge_heterolora(model)(**make_inputs()).logits, expected, rtol=1e-11, atol=1e-12)


def test_merge_refuses_tied_weights():
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    patch(model, shortcuts=(), target_modules=["lm_head", "q_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head.*shared.*embed_tokens"):
        hlk.merge_heterolora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merge_refuses_what_is_not_finite():
    model = make_patched("llama", shortcuts=())
    path = "model.layers.2.mlp.down_proj"
    model.get_submodule(path).lora_B.data[1, 1] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{path}.*not finite"):
        hlk.merge_heterolora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_norm_first", "gpt2", "bert"])
def test_disabled_adapter_is_the_base_bit_for_bit(name):
    model, inputs = make_patched(name, torch.float32), make_inputs()
    expected, on = make_model(name)(**inputs).logits, model(**inputs).logits
    with hlk.disable_adapter(model):
        assert torch.equal(expected, model(**inputs).logits)
        with hlk.disable_adapter(model):
            pass
        assert torch.equal(expected, model(**inputs).logits)
    assert torch.equal(on, model(**inputs).logits) and not torch.equal(on, expected)
    with pytest.raises(KeyboardInterrupt), hlk.disable_adapter(model):
        raise KeyboardInterrupt
    assert torch.equal(on, model(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "opt_norm_first", "gpt2", "bert"])
def test_reference_model_is_the_base_on_the_same_weights(name):
    model, inputs = make_patched(name, torch.float32).train(), make_inputs()
    on, hooks = model.eval()(**inputs).logits, set(torch_optimizer._global_optimizer_pre_hooks)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.train()
    reference = hlk.reference_model(model)
    assert model.training and not any(module.training for module in reference.modules())
    assert torch.equal(reference(**inputs).logits, make_model(name).eval()(**inputs).logits)
    assert torch.equal(model.eval()(**inputs).logits, on)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert set(torch_optimizer._global_optimizer_pre_hooks) <= hooks
    own = dict(model.named_parameters())
    assert all(parameter is own[key] and not parameter.requires_grad for key, parameter in reference.named_parameters())
    assert not [key for key in reference.state_dict() if "lora" in key]


def test_reference_model_keeps_heads_as_they_were():
    model = patch(make_model("llama"), modules_to_save=["lm_head"])
    reference = hlk.reference_model(model)
    before = reference.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(reference.lm_head.weight, before)
    assert model.lm_head.weight.requires_grad and not reference.lm_head.weight.requires_grad
