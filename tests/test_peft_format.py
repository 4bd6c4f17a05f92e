"""What is written here PEFT's own code reads, and computes the same."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import (
    make_model,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
)
from fuzzing import fuzz
from helpers_errors import assert_models_agree
from helpers_peft import HEADED, PLAIN, build, load_with_peft, lora_layers, outputs, written
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import matching
from heterolora_kernels.peft_format import exact_pattern, exact_targets
from heterolora_kernels.save_and_load import peft_config
from heterolora_kernels.state import state_of

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

TASKS = {**{name: entry[0] for name, entry in HEADED.items()}, **PLAIN}


@torch.no_grad()
def train_heads(model: nn.Module, names=("classifier", "score", "qa_outputs")) -> None:
    """Move what is trainable outside the paths, as training would."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.add_(0.2)


def allocated(name: str, **options) -> tuple[nn.Module, hlk.RankSearch]:
    """A patched model in which some paths are off, some partly on."""
    model = patch(build(name), shortcuts=(), **{"r": 4, "lora_alpha": 8, **options})
    train_heads(model)
    search = hlk.RankSearch(model)
    first, second, third, *_, last = search.paths
    search.apply({first: 0, second: 1, third: [False, True, False, True], last: [True, False, True, True]})
    return model, search


# ---- written here, read by PEFT ----


@pytest.mark.parametrize("name", TASKS)
def test_peft_computes_what_the_patched_model_computes(name, tmp_path):
    model, search = allocated(name)
    hlk.save_adapter(model, tmp_path / "adapter", "peft")
    loaded = load_with_peft(name, tmp_path / "adapter")
    expected = outputs(model)
    assert (expected - outputs(build(name))).norm() > 0.01 * expected.norm()
    assert_models_agree(loaded, model, outputs, expected)
    paths = state_of(model).paths
    assert lora_layers(loaded) == {path: (rank, paths[path].scaling) for path, rank in search.ranks.items() if rank}
    assert written(tmp_path / "adapter")["task_type"] == TASKS[name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bert_bare"])
def test_uniform_adapter_for_servers(name, tmp_path):
    model, search = allocated(name, alpha_pattern={"layer.1.output.dense" if "bert" in name else "1.mlp.down_proj": 3}
                              if name != "gpt2" else {})
    hlk.save_adapter(model, tmp_path / "adapter", "vllm")
    config, tensors = written(tmp_path / "adapter"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["modules_to_save"] is None and config["bias"] == "none" and not config["use_rslora"] and not config["use_dora"]
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {4}
    assert len(tensors) == 2 * sum(rank > 0 for rank in search.ranks.values())
    torch.testing.assert_close(outputs(load_with_peft(name, tmp_path / "adapter")), outputs(model), rtol=1e-5, atol=1e-5)


def test_uniform_rank_is_the_largest_that_is_active(tmp_path):
    model, search = allocated("llama")
    search.apply({path: min(rank, 2) for path, rank in search.ranks.items()})
    hlk.save_adapter(model, tmp_path, "vllm")
    assert written(tmp_path)["r"] == written(tmp_path)["lora_alpha"] == 2


def test_uniform_adapter_refuses_trained_heads_unless_dropped(tmp_path):
    model, _ = allocated("bert_sequence")
    with pytest.raises(ValueError, match=r"beside adapters \(classifier.weight, ...\): vLLM refuses.*drop_heads"):
        hlk.save_adapter(model, tmp_path / "adapter", "vllm")
    assert not (tmp_path / "adapter").exists()
    hlk.save_adapter(model, tmp_path / "adapter", "vllm", drop_heads=True)
    with torch.no_grad():
        # As trained, but for the base's head.
        for parameter in model.classifier.parameters():
            parameter.sub_(0.2)
    torch.testing.assert_close(outputs(load_with_peft("bert_sequence", tmp_path / "adapter")), outputs(model), rtol=1e-5,
                               atol=1e-5)


def test_heads_can_be_left_out_of_a_peft_adapter(tmp_path):
    model, _ = allocated("llama_sequence")
    hlk.save_adapter(model, tmp_path, "peft", drop_heads=True)
    assert written(tmp_path)["modules_to_save"] is None and written(tmp_path)["task_type"] is None
    assert not any("score" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    load_with_peft("llama_sequence", tmp_path)


@pytest.mark.parametrize(("name", "task", "head"), [
    ("bert_sequence", "SEQ_CLS", "classifier"), ("llama_sequence", "SEQ_CLS", "score"), ("gpt2_token", "TOKEN_CLS", "classifier"),
    ("bert_question", "QUESTION_ANS", "qa_outputs")])
def test_frozen_heads_that_peft_expects_with_the_task_are_saved(name, task, head, tmp_path):
    model, _ = allocated(name, modules_to_save=(), exclude_modules=[head])
    hlk.save_adapter(model, tmp_path, "peft")
    assert written(tmp_path)["task_type"] == task and written(tmp_path)["modules_to_save"] == [head]
    assert_models_agree(load_with_peft(name, tmp_path), model, outputs)


@pytest.mark.parametrize("name", ["bert_sequence", "llama_sequence"])
def test_adapted_heads_that_peft_expects_with_the_task(name, tmp_path):
    model, _ = allocated(name, modules_to_save=())
    hlk.save_adapter(model, tmp_path, "peft")
    # With the task PEFT would save the head, and with that not adapt it.
    assert written(tmp_path)["task_type"] is None and written(tmp_path)["modules_to_save"] is None
    assert_models_agree(load_with_peft(name, tmp_path), model, outputs)


def test_adapters_of_sixteen_bits_stay_so(tmp_path):
    model = patch(make_model("llama", torch.bfloat16), shortcuts=(), adapter_dtype="bfloat16")
    for format in ("peft", "vllm"):
        hlk.save_adapter(model, tmp_path / format, format)
        tensors = load_file(tmp_path / format / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_float32_adapters_over_a_bfloat16_base(tmp_path):
    model = patch(make_model("llama", torch.bfloat16), shortcuts=())
    hlk.save_adapter(model, tmp_path, "peft")
    loaded = peft.PeftModel.from_pretrained(make_model("llama", torch.bfloat16), str(tmp_path)).eval()
    exact = patch(make_model("llama", torch.bfloat16).double(), shortcuts=())
    own, other, truth = (outputs(m).double() for m in (model, loaded, exact))
    assert (own - truth).norm() <= 2 * (other - truth).norm()
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(tensor, own[name.removeprefix("base_model.model.").removesuffix(".weight")])


class Tricky(nn.Module):
    """Names that end in, or almost spell, other names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 5)
        self.my = nn.ModuleDict({"first": nn.Linear(5, 5), "a": nn.ModuleDict({"first": nn.Linear(5, 5)})})
        self.a = nn.ModuleDict({"b": nn.Linear(5, 5), "first": nn.Linear(5, 5)})
        self.a_b = nn.Linear(5, 5)
        self.axb = nn.Linear(5, 5)
        self.score = nn.Linear(5, 5)
        self.my_score = nn.Linear(5, 5)

    def linears(self) -> dict[str, nn.Module]:
        """Also inside PEFT's wrappers, where the names of modules are others."""
        return {name: self.get_submodule(name) for name in ("first", "my.first", "my.a.first", "a.b", "a.first", "a_b", "axb",
                                                             "my_score", "score")}

    def forward(self, x):
        for module in self.linears().values():
            x = torch.tanh(module(x)) + x
        return x


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
RANKS = {
    "suffix_alone": {"first": 3}, "longer_alone": {"my.first": 2}, "middle": {"a.first": 1, "my.a.first": 3},
    "one_off": {"first": 3, "my.a.first": 2, "a.first": 1}, "dots": {"first": 1, "a.b": 3, "a_b": 1, "axb": 2}, "default_among": {
        "first": 2, "my.first": 4, "a.first": 4, "my.a.first": 1, "a.b": 4}, "everything": {
        "first": 4, "my.first": 1, "my.a.first": 2, "a.b": 4, "a.first": 3, "a_b": 4, "axb": 4},
}


def tricky(ranks: dict[str, int], **options) -> nn.Module:
    model = Tricky()
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=4, lora_alpha=6, search="off", modules_to_save=options.pop("heads", ()),
                                                     target_modules=["first", "b", "a_b", "axb"], **options))
    open_adapters(model, scale=1.0)
    hlk.RankSearch(model).apply({path: ranks.get(path, 0) for path in state_of(model).paths})
    return model


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("format", ["peft", "vllm"])
def test_names_that_end_in_other_names(ranks, format, tmp_path):
    model = tricky(ranks)
    hlk.save_adapter(model, tmp_path, format)
    loaded = peft.PeftModel.from_pretrained(Tricky(), str(tmp_path)).eval()
    assert {name: rank for name, (rank, _) in lora_layers(loaded).items()} == (
        ranks if format == "peft" else dict.fromkeys(ranks, max(ranks.values())))
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-6)
    again = hlk.load_adapter(Tricky(), tmp_path)
    torch.testing.assert_close(again(X), model(X), rtol=1e-6, atol=1e-6)
    assert state_of(again).paths.keys() == ranks.keys()


def test_heads_whose_names_end_other_names(tmp_path):
    model = tricky({"first": 2}, heads=("score",))
    train_heads(model)
    hlk.save_adapter(model, tmp_path, "peft")
    loaded = peft.PeftModel.from_pretrained(Tricky(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-6)


NAMES = st.lists(st.text("ab._", min_size=1, max_size=6).filter(lambda name: re.fullmatch(r"[^.]+(\.[^.]+)*", name)),
                 min_size=1, max_size=7, unique=True)


@fuzz(200)
@given(NAMES, st.data())
def test_patterns_give_every_module_its_own_value(names, data):
    values = {name: data.draw(st.integers(1, 3)) for name in names}
    pattern = exact_pattern(values, 2)
    for name, value in values.items():
        assert pattern.get(get_pattern_key(pattern.keys(), name), 2) == value
        assert matching.pattern_value(name, pattern, 2) == value
    assert all(value == 2 or name in pattern for name, value in values.items())


@fuzz(200)
@given(NAMES, st.data())
def test_targets_select_exactly_the_modules(names, data):
    wanted = [name for name in names if data.draw(st.booleans())] or names[:1]
    targets = exact_targets(wanted, names)
    config = peft.LoraConfig(target_modules=targets)
    assert [name for name in names if check_target_module_exists(config, name)] == [name for name in names if name in wanted]
    assert [name for name in names if matching.matches(name, targets)] == [name for name in names if name in wanted]


def test_names_with_characters_of_regular_expressions():
    values = {"a+b": 1, "ab": 2, "a(b": 3, "(a)b": 1}
    pattern = exact_pattern(values, 5)
    assert {name: matching.pattern_value(name, pattern, 5) for name in values} == values


def test_config_of_the_present_allocation(tmp_path):
    model, search = allocated("bert_sequence", lora_dropout=0.25)
    search.apply({path: 0 for path in search.paths if ".2." in path})
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(model)))
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    fresh = peft.get_peft_model(build("bert_sequence"), config)
    paths = state_of(model).paths
    assert lora_layers(fresh) == {path: (rank, paths[path].scaling) for path, rank in search.ranks.items() if rank}
    assert config.lora_dropout == 0.25 and "classifier" in config.modules_to_save
    # Ready to be trained.
    trained = [name for name, parameter in fresh.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)


def test_config_of_nothing_is_refused():
    model, search = allocated("llama")
    search.apply(dict.fromkeys(search.paths, 0))
    with pytest.raises(ValueError, match="no LoRA path is active"):
        peft_config(model)


# ---- what cannot be written ----


def test_a_path_in_a_head_is_refused(tmp_path):
    model = patch(build("bert_sequence"), shortcuts=(), target_modules=["query", "classifier"])
    for format in ("peft", "vllm"):
        with pytest.raises(ValueError, match="classifier"):
            hlk.save_adapter(model, tmp_path / "adapter", format)
    assert not (tmp_path / "adapter").exists()


def test_a_head_tied_to_an_adapted_module_is_refused(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    patch(model, shortcuts=(), target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="'lm_head.weight', which is tied to the head 'model.embed_tokens.weight' and has an "
                                         "adapter"):
        hlk.save_adapter(model, tmp_path, "peft")
