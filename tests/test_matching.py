"""Names select what they select in PEFT: held against PEFT's own functions."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers
from families import make_model
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.heads import Heads
from heterolora_kernels.matching import is_excluded, is_target, pattern_value
from heterolora_kernels.state import state_of

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

_PARTS = ["model", "layers", "h", "encoder", "0", "1", "10", "self_attn", "q_proj", "proj", "mlp", "experts", "norm", "lm_head",
          "a_b"]
names = st.lists(st.sampled_from(_PARTS), min_size=1, max_size=6).map(".".join)
entries = st.one_of(names, st.sampled_from(["q_proj", "proj", "layers.1.self_attn.q_proj", "self_attn.q_proj", "norm", "0",
                                            "1.mlp"]))
regexes = st.one_of(entries, st.sampled_from([r".*\.0\..*", r".*(q|a)_.*", r"model\.layers\.[01]\.[a-z_]*", r".*proj",
                                              r"^model.*norm"]))


@fuzz(300)
@given(name=names, targets=st.one_of(st.lists(entries, min_size=1, max_size=3), regexes),
       excluded=st.one_of(st.none(), st.lists(entries, max_size=2), regexes), heads=st.one_of(st.none(), st.lists(entries,
                                                                                                                  max_size=2)),
       layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 10), max_size=3)),
       pattern=st.one_of(st.none(), st.sampled_from(["layers", "h"]), st.lists(st.sampled_from(["layers", "h", "experts"]),
                                                                               max_size=2)))
def test_targets_are_those_of_peft(name, targets, excluded, heads, layers, pattern):
    if isinstance(targets, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    theirs = check_target_module_exists(peft.LoraConfig(
        target_modules=targets, exclude_modules=excluded, modules_to_save=heads, layers_to_transform=layers,
        layers_pattern=pattern), name)
    ours = hlk.HeteroLoraConfig(target_modules=targets, exclude_modules=excluded, modules_to_save=heads,
                                layers_to_transform=layers,
                                layers_pattern=pattern)
    assert is_excluded(name, ours) == isinstance(theirs, _ExcludedModule)
    if not is_excluded(name, ours):
        assert is_target(name, ours) == bool(theirs)


@fuzz(300)
@given(name=names, keys=st.lists(regexes, max_size=4, unique=True))
def test_the_first_pattern_that_matches_counts(name, keys):
    pattern = {key: index for index, key in enumerate(keys)}
    assert pattern_value(name, pattern, -1) == pattern.get(get_pattern_key(pattern.keys(), name), -1)


def test_names_of_other_characters_match_themselves():
    assert pattern_value("a+b", {"a+b": 3}, 1) == 3


MODELS = {"llama": lambda: make_model("llama"), "gpt2": lambda: make_model("gpt2"), "bert": lambda: make_model("bert")}
HEADS = {"llama": [["norm"], ["lm_head", "model.norm"], ["layers.1.input_layernorm"], ["embed_tokens"], ["layernorm"]],
         "gpt2": [["ln_1"], ["wte"], ["h.0.ln_2", "ln_f"]], "bert": [["LayerNorm"], ["decoder"], ["0.output.LayerNorm"]]}


@pytest.mark.parametrize("name, entries", [(name, entries) for name, lists in HEADS.items() for entries in lists],
                         ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_heads_are_those_of_peft(name, entries, tmp_path):
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(MODELS[name](), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=entries))
        ours = hlk.apply_heterolora(MODELS[name](), hlk.HeteroLoraConfig(r=2, target_modules=targets, modules_to_save=entries,
                                                                         search="off"))
    wrapped = {module.removeprefix("base_model.model.") for module, m in theirs.named_modules()
               if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    assert state_of(ours).heads.modules == wrapped
    trained = {re.sub(r"\.modules_to_save\.default", "", n.removeprefix("base_model.model.")) for n,
               p in theirs.named_parameters()
               if p.requires_grad and "lora_" not in n}
    # A tied parameter has one name there and here.
    assert {id(p) for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n} == {
        id(ours.get_parameter(n)) for n in trained}


@pytest.mark.parametrize("layers, pattern", [([0, 2], None), (1, "layers"), ([1], ["h", "layers"]), ([], None)])
def test_layers_to_transform(layers, pattern):
    config = dict(r=2, target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=layers,
                  layers_pattern=pattern)
    theirs = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**config))
    expected = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if isinstance(m,
                                                                                                           peft.tuners.lora.LoraLayer)}
    ours = hlk.apply_heterolora(make_model("llama"), hlk.HeteroLoraConfig(**config, search="off"))
    assert state_of(ours).paths.keys() == expected
    assert hlk.HeteroLoraConfig.from_dict(state_of(ours).config.to_dict()) == state_of(ours).config


@pytest.mark.parametrize("options, named", [
    (dict(layers_to_transform=[0]), "layers_to_transform needs target_modules to be a list"),
    (dict(layers_to_transform=["0"], target_modules=["a"]), "layers_to_transform must be an int or a list"),
    (dict(layers_to_transform=1.5, target_modules=["a"]), "layers_to_transform must be"),
    (dict(layers_pattern="h", target_modules=["a"]), "layers_pattern needs layers_to_transform"),
    (dict(layers_pattern=[1], layers_to_transform=0, target_modules=["a"]), "layers_pattern must be"),
    (dict(layers_pattern="(", layers_to_transform=0, target_modules=["a"]), "layers_pattern: '\\(' is no regular expression"),
])
def test_wrong_layers_are_named(options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        hlk.HeteroLoraConfig(**options)


def test_heads_hold_what_lies_below_them():
    model = nn.ModuleDict({"pre_classifier": nn.Linear(2, 2), "body": nn.ModuleDict({"dense": nn.Linear(2, 2)})})
    heads = Heads(model, ("classifier", "body", "nothing"))
    assert heads.entries == ("classifier", "body") and heads.modules == {"pre_classifier", "body"}
    assert heads.has("body.dense.weight") and heads.has("pre_classifier.bias") and not heads.has("weight")


def test_a_head_of_distilbert_comes_back(tmp_path):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                                           max_position_embeddings=64,
                                           dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(search="off", init_B="kaiming_uniform"))
    assert state_of(model).heads.modules == {"pre_classifier", "classifier"}
    with torch.no_grad():
        model.pre_classifier.weight.add_(0.3)
    ids = torch.randint(3, 61, (2, 7))
    hlk.save_adapter(model, tmp_path, "peft")
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(transformers.DistilBertForSequenceClassification(config).eval(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
