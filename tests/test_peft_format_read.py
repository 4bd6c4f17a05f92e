"""What PEFT wrote is read here and computes the same, or is refused by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from families import (
    HIDDEN,
    LAYERS,
    assert_restored,
    patch,
    reference_backend,  # noqa: F401
    snapshot,
)
from helpers_errors import assert_models_agree
from helpers_peft import build, load_with_peft, lora_layers, outputs, written
from safetensors.torch import load_file, save_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.peft_format import read_peft
from heterolora_kernels.state import state_of

peft = pytest.importorskip("peft", reason="peft is not installed")

# ---- written by PEFT, read here ----

PEFT_ADAPTERS = {
    "plain": ("llama", dict(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])),
    "patterns": ("llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"],
                               rank_pattern={"layers.1.self_attn.q_proj": 5, "q_proj": 2, r"^model\.layers\.0\.mlp\..*": 4},
                               alpha_pattern={r".*\.2\..*_proj": 3, "v_proj": 11})),
    "rslora": ("llama", dict(r=5, lora_alpha=7, use_rslora=True, target_modules="all-linear", rank_pattern={"v_proj": 2})),
    "regex": ("bert", dict(r=2, lora_alpha=3, target_modules=r".*\.1\..*(query|dense)")),
    "layers": ("llama", dict(r=2, lora_alpha=3, target_modules=["q_proj"], layers_to_transform=[0, 2])),
    "conv1d": ("gpt2", dict(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                            rank_pattern={"c_attn": 5})),
    "output_embedding": ("llama", dict(r=2, lora_alpha=3, target_modules=["q_proj", "lm_head"])),
    "classifier": ("bert_sequence", dict(r=3, lora_alpha=7, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "score": ("llama_sequence", dict(r=3, lora_alpha=7, target_modules=["q_proj"], task_type="SEQ_CLS")),
    "head_below": ("roberta_sequence", dict(r=3, target_modules=["query"], modules_to_save=["classifier"])),
    "norm_as_head": ("llama", dict(r=3, target_modules=["q_proj"], modules_to_save=["norm"])),
    "dropout": ("llama", dict(r=3, lora_alpha=7, lora_dropout=0.3, target_modules=["q_proj"])),
    "exclude": ("llama", dict(r=3, target_modules=["q_proj", "k_proj"], exclude_modules=["layers.1.self_attn.q_proj"])),
}


def made_by_peft(name: str, folder, **options) -> nn.Module:
    """A PEFT model with random weights, saved."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(name), peft.LoraConfig(**{"init_lora_weights": False, **options})).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(0.3)
        model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("case", PEFT_ADAPTERS)
@pytest.mark.parametrize("through", ["load_adapter", "init_from"])
def test_what_peft_saved_computes_the_same_here(case, through, tmp_path):
    name, options = PEFT_ADAPTERS[case]
    made = made_by_peft(name, tmp_path / "peft", **options)
    expected = outputs(made)
    if through == "load_adapter":
        model = hlk.load_adapter(build(name), tmp_path / "peft")
        assert state_of(model).config.lora_dropout == options.get("lora_dropout", 0.0)
    else:
        model = hlk.apply_heterolora(build(name), hlk.HeteroLoraConfig(init_from=tmp_path / "peft", r=7, search="off"))
    assert_models_agree(model, made, outputs, expected)
    assert (expected - outputs(build(name))).norm() > 0.01 * expected.norm()
    config, paths = state_of(model).config, state_of(model).paths
    assert config.init_from is None
    scalings = {n: (p.r, p.scaling) for n, p in paths.items()}
    assert scalings == {n: (r, scaling if through == "load_adapter" else pytest.approx(scaling, rel=1e-15))
                        for n, (r, scaling) in lora_layers(made).items()}
    # Alphas are the file's own where nothing has to be computed.
    assert through == "init_from" or "alpha_pattern" in options or not config.alpha_pattern
    # The config alone makes the same paths.
    again = state_of(hlk.apply_heterolora(build(name), config)).paths
    assert {n: (p.r, p.scaling) for n, p in again.items()} == scalings
    # And back again.
    hlk.save_adapter(model, tmp_path / "again", "peft")
    assert_models_agree(load_with_peft(name, tmp_path / "again"), made, outputs, expected)


def test_what_peft_saved_can_be_loaded_into_a_patched_model(tmp_path):
    made = made_by_peft("bert_sequence", tmp_path, r=3, lora_alpha=7, target_modules=["query"], task_type="SEQ_CLS")
    model = patch(build("bert_sequence"), shortcuts=(), r=3, lora_alpha=7, target_modules=["query"])
    search = hlk.RankSearch(model)
    search.apply({search.paths[0]: 1})
    parameters = [id(parameter) for parameter in model.parameters()]
    assert hlk.load_adapter(model, tmp_path) is model
    assert_models_agree(model, made, outputs)
    assert set(search.ranks.values()) == {3} and [id(parameter) for parameter in model.parameters()] == parameters


def test_shortcuts_and_search_come_from_the_config(tmp_path):
    made = made_by_peft("llama", tmp_path, r=3, lora_alpha=7, target_modules=["q_proj"], rank_pattern={"1": 2})
    model = hlk.apply_heterolora(build("llama"), hlk.HeteroLoraConfig(
        init_from=tmp_path, r=5, shortcuts="all", shortcut_alpha=4, use_rslora=True, search="dynamic", interval=3,
        lora_dropout=0.1, target_modules=["v_proj"], rank_pattern={"v_proj": 2}, exclude_modules=["q_proj"]))
    state = state_of(model)
    # lora_B of a shortcut begins at 0.
    assert_models_agree(model, made, outputs)
    lora = {path.name for path in state.paths.values() if path.site is None}
    assert lora == {f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)}
    assert len(state.paths) == LAYERS + 4 * LAYERS - 1
    shortcut = state.paths["model.layers.1.shortcut_sa"]
    assert shortcut.r == 5 and shortcut.scaling == 4 / 5**0.5
    config = state.config
    assert (config.search, config.interval, config.lora_dropout, config.use_rslora) == ("dynamic", 3, 0.1, True)
    path = state.paths["model.layers.0.self_attn.q_proj"]
    assert path.r == 3 and path.scaling == pytest.approx(7 / 3, rel=1e-15)


@pytest.mark.parametrize(("asked", "expected"), [(None, ("classifier",)), (["pooler"], ("pooler", "classifier"))],
                         ids=["default", "more"])
def test_heads_of_the_adapter_join_those_of_the_config(asked, expected, tmp_path):
    made_by_peft("bert_sequence", tmp_path, r=3, target_modules=["query"], task_type="SEQ_CLS")
    model = hlk.apply_heterolora(build("bert_sequence"), hlk.HeteroLoraConfig(init_from=tmp_path, modules_to_save=asked))
    assert state_of(model).config.heads == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".")[-2] for name in trainable} == {"classifier"} | ({"dense"} if asked else set())


def test_ways_to_draw_first_weights_that_leave_the_base_alone(tmp_path):
    for init in ("gaussian", True, "orthogonal"):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
        model = peft.get_peft_model(build("llama"), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        model.save_pretrained(str(tmp_path))
        assert_models_agree(hlk.load_adapter(build("llama"), tmp_path), model, outputs)


# ---- what cannot be read ----


def edited(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def everything(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(model: nn.Module, call, match: str, error=ValueError) -> None:
    """The call raises, and the model is what it was, bit for bit."""
    before, values = snapshot(model), everything(model)
    with pytest.raises(error, match=match):
        call()
    assert_restored(model, before)
    after = everything(model)
    assert after.keys() == values.keys() and all(torch.equal(after[name], values[name]) for name in values)


def assert_unreadable(folder, match: str, name: str = "llama", error=ValueError) -> None:
    model = build(name)
    assert_refused(model, lambda: hlk.load_adapter(model, folder), match, error)
    assert_refused(model, lambda: hlk.apply_heterolora(model, hlk.HeteroLoraConfig(init_from=folder)), match, error)


REFUSED_FIELDS = {
    "use_dora": True, "lora_bias": True, "bias": "lora_only", "peft_type": "LOHA", "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["mlp.experts"], "trainable_token_indices": [1, 2], "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1}, "use_qalora": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0}, "velora_config": {"num_groups": 2}, "monteclora_config": {"a": 1},
    "init_lora_weights": "pissa_niter_4", "a_field_of_the_future": 1,
}


@pytest.fixture
def adapter(tmp_path):
    made_by_peft("llama", tmp_path / "adapter", r=3, lora_alpha=7, target_modules=["q_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_what_is_not_computed_here_is_refused_by_the_name_of_its_field(name, adapter):
    edited(adapter, **{name: REFUSED_FIELDS[name]})
    assert_unreadable(adapter, f"adapter_config.json: field '{name}'")


WRONG_FIELDS = {
    "r": [None, "8", 2.5, 0, -1, True, [], 4], "lora_alpha": [None, "8", 0, -1, float("nan"), float("inf"), {}],
    "lora_dropout": ["0.1", 1, -0.1, []], "use_rslora": ["yes", 1], "peft_type": [None, 3],
    "rank_pattern": [[], "a", {"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": "2"}, {"(": 3}],
    "alpha_pattern": [[], {"q_proj": None}, {"q_proj": 0}, {"(": 3}], "modules_to_save": ["classifier", {}, [3], [""]],
    "bias": [None, 3], "init_lora_weights": ["loftq", 3, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values])
def test_wrong_values_are_refused_by_the_name_of_their_field(name, value, adapter):
    edited(adapter, **{name: value})
    assert_unreadable(adapter, f"(field '{name}'|fields 'r' and 'rank_pattern')")


def test_missing_fields_are_named(adapter):
    for name in ("peft_type", "r", "lora_alpha"):
        content = written(adapter)
        (adapter / "adapter_config.json").write_text(json.dumps({key: content[key] for key in content if key != name}))
        assert_unreadable(adapter, f"adapter_config.json: field '{name}' is missing")
        (adapter / "adapter_config.json").write_text(json.dumps(content))


def test_fields_that_are_optional_may_be_missing(adapter):
    made = load_with_peft("llama", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 7}))
    assert_models_agree(hlk.load_adapter(build("llama"), adapter), made, outputs)


def changed_tensors(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB")
WRONG_TENSORS = {
    "no_half": (lambda t: t.pop(B0), "'model.layers.0.self_attn.q_proj.lora_B' is missing"),
    "rank": (lambda t: t.update({A0: t[A0][:2], B0: t[B0][:, :2]}), "rank 3"),
    "halves": (lambda t: t.update({B0: t[B0][:, :2]}), "rank 3"),
    "width": (lambda t: t.update({A0: t[A0][:, :7]}), r"'model.layers.0.self_attn.q_proj.lora_A' has shape \[3, 7\]"),
    "dimensions": (lambda t: t.update({A0: t[A0][None]}), "must be a floating matrix"),
    "integers": (lambda t: t.update({A0: t[A0].long()}), "must be a floating matrix"),
    "module": (lambda t: t.update({A0.replace(".0.", ".7."): t.pop(A0), B0.replace(".0.", ".7."): t.pop(B0)}),
               r"model.layers.7.self_attn.q_proj.lora_A"),
    "no_linear": (lambda t: t.update({A0.replace("self_attn.q_proj", "input_layernorm"): t.pop(A0),
                                      B0.replace("self_attn.q_proj", "input_layernorm"): t.pop(B0)}), "input_layernorm"),
    "embedding": (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A0].clone()}),
                  "'model.embed_tokens.lora_embedding_A' is neither LoRA"),
    "magnitude": (lambda t: t.update({A0.replace("lora_A.weight", "lora_magnitude_vector"): t[B0][:, 0].clone()}),
                  "lora_magnitude_vector' is neither LoRA"),
    "other_base": (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(HIDDEN)}),
                   "'model.norm.weight' is neither LoRA.*other values"),
    "nothing": (lambda t: t.clear(), "no LoRA adapter"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_named(case, adapter):
    change, match = WRONG_TENSORS[case]
    changed_tensors(adapter, change)
    assert_unreadable(adapter, match)


def test_tensors_that_do_not_fit_a_patched_model_are_named(adapter):
    model = patch(build("llama"), shortcuts=(), r=3, lora_alpha=7, target_modules=["q_proj"])
    for case in ("other_base", "width"):
        hlk.load_adapter(model, adapter)
        content = (adapter / "adapter_model.safetensors").read_bytes()
        changed_tensors(adapter, WRONG_TENSORS[case][0])
        assert_refused(model, lambda: hlk.load_adapter(model, adapter), "other values|in_features of path")
        (adapter / "adapter_model.safetensors").write_bytes(content)


def test_base_weights_that_the_adapter_repeats_are_taken_for_what_they_are(adapter):
    made, base = load_with_peft("llama", adapter), build("llama")
    changed_tensors(adapter, lambda t: t.update({
        "base_model.model.lm_head.weight": base.lm_head.weight.detach().clone(),
        A0.replace("lora_A.weight", "base_layer.weight"): base.model.layers[0].self_attn.q_proj.weight.detach().clone()}))
    assert_models_agree(hlk.load_adapter(build("llama"), adapter), made, outputs)


HEAD = "base_model.model.classifier"
WRONG_HEADS = {
    "missing": (lambda t: t.pop(f"{HEAD}.bias"), "'classifier.bias' is missing"),
    "shape": (lambda t: t.update({f"{HEAD}.bias": torch.zeros(4)}), r"'classifier.bias' has shape \[4\]"),
    "unknown": (lambda t: t.update({f"{HEAD}.extra.weight": torch.zeros(4)}), "'classifier.extra.weight' is not in the model"),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_heads_that_do_not_fit_are_named(case, tmp_path):
    made_by_peft("bert_sequence", tmp_path, r=3, target_modules=["query"], task_type="SEQ_CLS")
    change, match = WRONG_HEADS[case]
    changed_tensors(tmp_path, change)
    assert_unreadable(tmp_path, match, "bert_sequence")


def test_a_head_tied_in_the_model_is_refused(tmp_path):
    made_by_peft("llama", tmp_path, r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_refused(model, lambda: hlk.load_adapter(model, tmp_path), "'lm_head.weight' is the same parameter")
    patch(model, shortcuts=(), target_modules=["q_proj"], modules_to_save=["lm_head"], r=3)
    assert_refused(model, lambda: hlk.load_adapter(model, tmp_path), "'lm_head.weight' is the same parameter")


def test_pickles_are_not_read(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_unreadable(adapter, "adapter_model.bin is a pickle")


def test_missing_files_are_named(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert_unreadable(adapter, "adapter_model.safetensors is missing", error=FileNotFoundError)


def test_files_that_were_cut_off_are_named(adapter):
    model, config, weights = build("llama"), adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    before = everything(model)
    for path, step in ((config, 1), (weights, 97)):
        content = path.read_bytes()
        for length in (*range(0, len(content), step), *range(max(0, len(content) - 9), len(content))):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=f"{path.name} is no"):
                read_peft(adapter)
        for length in (0, 5, len(content) - 1):
            path.write_bytes(content[:length])
            assert_refused(model, lambda: hlk.load_adapter(model, adapter), f"{path.name} is no")
        path.write_bytes(content)
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(model).items())
    assert len(state_of(hlk.load_adapter(model, adapter)).paths) == LAYERS


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
def test_a_failure_while_writing_leaves_the_model_as_it_was(error, tmp_path, monkeypatch):
    made_by_peft("bert_sequence", tmp_path, r=3, target_modules=["query"], task_type="SEQ_CLS")
    model, copy, calls = build("bert_sequence"), torch.Tensor.copy_, []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == first + 3:
            raise error("in the middle")
        return copy(self, *args, **kwargs)

    hlk.remove_heterolora(hlk.load_adapter(build("bert_sequence"), tmp_path))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *args, **kwargs: calls.append(1) or copy(self, *args, **kwargs))
    hlk.apply_heterolora(build("bert_sequence"), hlk.HeteroLoraConfig(target_modules=["query"], r=3))
    # Only what comes after patching belongs to the adapter.
    first = len(calls)
    calls.clear()
    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    assert_refused(model, lambda: hlk.load_adapter(model, tmp_path), "in the middle", error)
    assert len(calls) > first
