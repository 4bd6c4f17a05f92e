"""PEFT's own code reads what is written here, and computes the same; what it writes is read here, and computes the same."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import transformers
from families import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCAB,
    assert_restored,
    make_inputs,
    make_model,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
    snapshot,
)
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import planning
from heterolora_kernels.peft_format import exact_pattern, exact_targets, read_peft
from heterolora_kernels.save_and_load import peft_config
from heterolora_kernels.state import state_of

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

_COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
               num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
#: Models with heads, and the task that is written for PEFT: qa_outputs is adapted, which PEFT does not do under its task.
HEADED = {
    "bert_sequence": ("SEQ_CLS", "BertForSequenceClassification", "BertConfig", {**_COMMON, **_NO_DROPOUT, "num_labels": 3}),
    "roberta_sequence": ("SEQ_CLS", "RobertaForSequenceClassification", "RobertaConfig", {**_COMMON, **_NO_DROPOUT}),
    "llama_sequence": ("SEQ_CLS", "LlamaForSequenceClassification", "LlamaConfig", {**_COMMON, "num_labels": 3}),
    "gpt2_token": ("TOKEN_CLS", "GPT2ForTokenClassification", "GPT2Config",
                   dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=64,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, classifier_dropout=0.0)),
    "bert_question": (None, "BertForQuestionAnswering", "BertConfig", {**_COMMON, **_NO_DROPOUT}),
    "bert_bare": ("FEATURE_EXTRACTION", "BertModel", "BertConfig", {**_COMMON, **_NO_DROPOUT}),
}
PLAIN = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": None, "opt_norm_first": "CAUSAL_LM", "gemma2": "CAUSAL_LM"}
TASKS = {**{name: entry[0] for name, entry in HEADED.items()}, **PLAIN}


def build(name: str, seed: int = 0) -> nn.Module:
    """The base: the same whenever it is built."""
    if name in PLAIN:
        return make_model(name, seed=seed)
    _, model, config, options = HEADED[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.config.use_cache = False
    return model.eval()


def inputs() -> dict:
    return {name: value for name, value in make_inputs().items() if name != "labels"}


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    """Whatever floating tensors the model gives, flat."""
    result = model(**inputs())
    return torch.cat([value.flatten() for value in result.values() if isinstance(value, torch.Tensor)])


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


def load_with_peft(name: str, folder) -> nn.Module:
    with warnings.catch_warnings():
        # Keys that are missing or not expected, layers of another layout.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(build(name), str(folder)).eval()


def lora_layers(model: nn.Module) -> dict[str, tuple[int, float]]:
    """``{module: (rank, scaling)}`` of a PEFT model."""
    return {name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def written(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# ---- written here, read by PEFT ----


@pytest.mark.parametrize("name", TASKS)
def test_peft_computes_what_the_patched_model_computes(name, tmp_path):
    model, search = allocated(name)
    hlk.save_adapter(model, tmp_path / "adapter", "peft")
    loaded = load_with_peft(name, tmp_path / "adapter")
    expected = outputs(model)
    assert (expected - outputs(build(name))).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-6, atol=1e-6)
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
    with pytest.raises(ValueError, match=r"heads \(classifier.weight, ...\): vLLM refuses.*drop_heads"):
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
    torch.testing.assert_close(outputs(load_with_peft(name, tmp_path)), outputs(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_sequence", "llama_sequence"])
def test_adapted_heads_that_peft_expects_with_the_task(name, tmp_path):
    model, _ = allocated(name, modules_to_save=())
    hlk.save_adapter(model, tmp_path, "peft")
    # With the task PEFT would save the head, and with that not adapt it.
    assert written(tmp_path)["task_type"] is None and written(tmp_path)["modules_to_save"] is None
    torch.testing.assert_close(outputs(load_with_peft(name, tmp_path)), outputs(model), rtol=1e-6, atol=1e-6)


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
        assert planning._pattern_value(name, pattern, 2) == value
    assert all(value == 2 or name in pattern for name, value in values.items())


@fuzz(200)
@given(NAMES, st.data())
def test_targets_select_exactly_the_modules(names, data):
    wanted = [name for name in names if data.draw(st.booleans())] or names[:1]
    targets = exact_targets(wanted, names)
    config = peft.LoraConfig(target_modules=targets)
    assert [name for name in names if check_target_module_exists(config, name)] == [name for name in names if name in wanted]
    assert [name for name in names if planning._matches(name, targets)] == [name for name in names if name in wanted]


def test_names_with_characters_of_regular_expressions():
    values = {"a+b": 1, "ab": 2, "a(b": 3, "(a)b": 1}
    pattern = exact_pattern(values, 5)
    assert {name: planning._pattern_value(name, pattern, 5) for name in values} == values


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


def test_a_head_tied_to_something_else_is_refused(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    patch(model, shortcuts=(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="'lm_head.weight' is the same parameter as 'model.embed_tokens.weight'"):
        hlk.save_adapter(model, tmp_path, "peft")


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
    torch.testing.assert_close(outputs(model), expected, rtol=1e-6, atol=1e-6)
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
    torch.testing.assert_close(outputs(load_with_peft(name, tmp_path / "again")), expected, rtol=1e-6, atol=1e-6)


def test_what_peft_saved_can_be_loaded_into_a_patched_model(tmp_path):
    expected = outputs(made_by_peft("bert_sequence", tmp_path, r=3, lora_alpha=7, target_modules=["query"], task_type="SEQ_CLS"))
    model = patch(build("bert_sequence"), shortcuts=(), r=3, lora_alpha=7, target_modules=["query"])
    search = hlk.RankSearch(model)
    search.apply({search.paths[0]: 1})
    parameters = [id(parameter) for parameter in model.parameters()]
    assert hlk.load_adapter(model, tmp_path) is model
    torch.testing.assert_close(outputs(model), expected, rtol=1e-6, atol=1e-6)
    assert set(search.ranks.values()) == {3} and [id(parameter) for parameter in model.parameters()] == parameters


def test_shortcuts_and_search_come_from_the_config(tmp_path):
    expected = outputs(made_by_peft("llama", tmp_path, r=3, lora_alpha=7, target_modules=["q_proj"], rank_pattern={"1": 2}))
    model = hlk.apply_heterolora(build("llama"), hlk.HeteroLoraConfig(
        init_from=tmp_path, r=5, shortcuts="all", shortcut_alpha=4, use_rslora=True, search="dynamic", interval=3,
        lora_dropout=0.1, target_modules=["v_proj"], rank_pattern={"v_proj": 2}, exclude_modules=["q_proj"]))
    state = state_of(model)
    # lora_B of a shortcut begins at 0.
    torch.testing.assert_close(outputs(model), expected, rtol=1e-6, atol=1e-6)
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
        torch.testing.assert_close(outputs(hlk.load_adapter(build("llama"), tmp_path)), outputs(model), rtol=1e-6, atol=1e-6)


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
    "kasa_config": {"beta": 1.0}, "velora_config": {"num_groups": 2}, "monteclora_config": {"a": 1}, "ensure_weight_tying": True,
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
    expected = outputs(load_with_peft("llama", adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 7}))
    torch.testing.assert_close(outputs(hlk.load_adapter(build("llama"), adapter)), expected, rtol=1e-6, atol=1e-6)


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
    expected, base = outputs(load_with_peft("llama", adapter)), build("llama")
    changed_tensors(adapter, lambda t: t.update({
        "base_model.model.lm_head.weight": base.lm_head.weight.detach().clone(),
        A0.replace("lora_A.weight", "base_layer.weight"): base.model.layers[0].self_attn.q_proj.weight.detach().clone()}))
    torch.testing.assert_close(outputs(hlk.load_adapter(build("llama"), adapter)), expected, rtol=1e-6, atol=1e-6)


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
