"""The native format bit for bit, merged models, what shortcuts are worth, and folders that are damaged or belong elsewhere."""

from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
import transformers
from families import (
    assert_restored,
    make_inputs,
    make_model,
    make_patched,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
)
from families import snapshot as modules_of
from helpers_search import (
    adapter,
    build,
    caught,
    make_net,
    net_batch,
    path_names,
    same_bits,
    snapshot,
    train,
    train_step,
    trainable,
)
from safetensors.torch import load_file, save_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import files, save_and_load
from heterolora_kernels.save_and_load import write_native
from heterolora_kernels.state import state_of

BERT = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
            max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)).to(dtype).eval()


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return classifier(dtype) if name == "classifier" else make_model(name, dtype)


@torch.no_grad()
def trained(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """Patched, every trainable parameter moved, and some paths off or partly on."""
    model = patch(base(name, dtype), **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    search = hlk.RankSearch(model)
    first, second, third, *_, last = search.paths
    search.apply({first: 0, second: 1, third: [False, True, True], last: 0})
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**{name: value for name, value in make_inputs().items() if name != "labels"}).logits


def assert_untouched(model: nn.Module, call, match: str, error=ValueError) -> None:
    """The call raises, and the model is what it was: objects, modules, values."""
    before, values = modules_of(model), snapshot(model)
    with pytest.raises(error, match=match):
        call()
    assert_restored(model, before)
    assert same_bits(snapshot(model), values)


# ---- there and back ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "opt_norm_last", "classifier"])
@pytest.mark.parametrize("into", ["plain", "patched"])
def test_everything_comes_back_bit_for_bit(name, into, tmp_path):
    model = trained(name, lora_dropout=0.1)
    hlk.save_adapter(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter.safetensors", "heterolora.json"]
    loaded = base(name) if into == "plain" else patch(base(name), lora_dropout=0.1, seed=8)
    assert hlk.load_adapter(loaded, tmp_path / "adapter") is loaded
    assert same_bits(snapshot(loaded), snapshot(model))
    assert torch.equal(outputs(loaded), outputs(model)) and not torch.equal(outputs(model), outputs(base(name)))
    assert hlk.RankSearch(loaded).paths == hlk.RankSearch(model).paths
    flags, expected = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (loaded, model))
    assert flags == expected
    if into == "plain":
        assert state_of(loaded).config == state_of(model).config


def test_inactive_paths_are_saved_too(tmp_path):
    model = trained("llama")
    expected = {name: value for name, value in snapshot(model).items() if "lora_" in name}
    hlk.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert same_bits(saved, expected) and len(expected) == 3 * len(path_names(model))


@pytest.mark.parametrize("format", ["native", "peft"])
def test_every_file_is_as_readable_as_any_other(format, tmp_path):
    (tmp_path / "any").touch()
    hlk.save_adapter(trained("llama", shortcuts=()), tmp_path / "adapter", format)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "adapter").iterdir()
             if format != "merged" or "json" in path.name}
    assert modes and set(modes.values()) == {(tmp_path / "any").stat().st_mode}


def test_heads_are_saved_with_their_buffers(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(5, 5), "score": nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))})
    fresh = copy.deepcopy(model)
    patch(model, shortcuts=())
    model["score"](model["body"](torch.randn(6, 5)))
    hlk.save_adapter(model, tmp_path)
    saved = json.loads((tmp_path / "heterolora.json").read_text())["heads"]
    assert saved["score.1.num_batches_tracked"] == {"dtype": "int64", "shape": []} and saved["score.0.weight"]["shape"] == [4, 5]
    assert same_bits(snapshot(hlk.load_adapter(fresh, tmp_path)), snapshot(model))


def test_a_patched_model_keeps_its_parameters_and_its_compiled_graph(tmp_path):
    hlk.save_adapter(trained("llama"), tmp_path)
    model = patch(make_model("llama"))
    compiled = torch.compile(model, backend="eager")
    outputs(compiled)
    before = [id(parameter) for parameter in model.parameters()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert hlk.load_adapter(compiled, tmp_path) is compiled
        found = outputs(compiled)
    assert before == [id(parameter) for parameter in model.parameters()]
    torch.testing.assert_close(found, outputs(trained("llama")), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_can_be_saved(tmp_path):
    model = trained("llama")
    hlk.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert torch.equal(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(model))


def test_the_folder_holds_plain_json(tmp_path):
    model = patch(make_model("llama"), lora_alpha=1 / 3, r=3, adapter_dtype="float32", sites={
        "LlamaDecoderLayer": hlk.Site("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj")})
    hlk.save_adapter(model, tmp_path)

    def refuse(text):
        raise AssertionError(text)

    content = json.loads((tmp_path / "heterolora.json").read_text(), parse_constant=refuse)
    assert content["format"] == "heterolora" and content["package_version"] == hlk.__version__ and content["search"] is None
    path = content["paths"]["model.layers.1.self_attn.k_proj"]
    assert path == {"kind": "lora", "site": None, "r": 3, "scaling": 1 / 3 / 3, "in_features": 32, "out_features": 16, "rank": 3,
                    "active": "111"}
    assert content["paths"]["model.layers.1.shortcut_ffn"]["site"] == "shortcut_ffn"
    assert content["base"]["class"] == "LlamaForCausalLM"
    assert hlk.HeteroLoraConfig.from_dict(content["config"]) == state_of(model).config
    assert outputs(hlk.load_adapter(make_model("llama"), tmp_path)).shape


def test_the_file_of_tensors_may_have_another_name(tmp_path):
    model = trained("llama")
    write_native(model, tmp_path, weights_name="model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["heterolora.json", "model.safetensors"]
    assert torch.equal(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(model))


def test_native_is_read_where_both_formats_are(tmp_path):
    model = trained("llama", shortcuts=())
    hlk.save_adapter(model, tmp_path, "peft")
    with torch.no_grad():
        open_adapters(model, seed=11)
    hlk.save_adapter(model, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(os.listdir(tmp_path))
    assert torch.equal(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(model))


@pytest.mark.parametrize(("saved", "loaded"), [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float64, torch.float32)], ids=str)
def test_dtypes_of_base_and_adapters(saved, loaded, tmp_path):
    model = trained("llama", saved)
    hlk.save_adapter(model, tmp_path)
    other = hlk.load_adapter(make_model("llama", loaded), tmp_path)
    # Adapters under a base of 16 bits are float32.
    expected = loaded if loaded.itemsize >= 4 else torch.float32
    for path in path_names(model):
        for leaf in ("lora_A", "lora_B"):
            found = getattr(adapter(other, path), leaf)
            assert found.dtype == expected and torch.equal(found, getattr(adapter(model, path), leaf).to(expected))


# ---- the search ----

SEARCHES = {
    "in_step": {"interval": 3, "num_batches": 2}, "graded": {"interval": 3, "ranks": "graded", "score_decay": 0.5, "warmup": 1},
    "reset": {"interval": 2, "on_reactivate": "reset", "warmup": 1, "hysteresis": 0.1},
    "probe": {"interval": 3, "score": "probe", "proxy": "snip", "warmup": 1},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("steps", [5, 7, 8])
def test_a_loaded_search_goes_on_as_the_unbroken_one(options, steps, tmp_path):
    loader = [net_batch(90 + i) for i in range(2)]
    model, optimizer, search = build(dataloader=loader, **options)
    train(model, optimizer, search, steps)
    hlk.save_adapter(model, tmp_path, search=search)
    moments = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, search, 9, first=steps)
    other, other_optimizer, other_search = build(dataloader=loader, **options)
    hlk.load_adapter(other, tmp_path, search=other_search)
    other_optimizer.load_state_dict(moments)
    train(other, other_optimizer, other_search, 9, first=steps)
    assert [entry["ranks"] for entry in other_search.history] == [entry["ranks"] for entry in search.history]
    assert len(search.history) > 2 and len({str(entry["ranks"]) for entry in search.history}) > 1


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and (first == second or first != first and second != second)


def test_state_of_a_search_comes_back_bit_for_bit(tmp_path):
    model, optimizer, search = build(interval=4, num_batches=3, warmup=1, score_decay=0.3)
    # In the window of the second, scored reallocation.
    train(model, optimizer, search, 6)
    assert search.state_dict()["window"] is not None and search.history
    hlk.save_adapter(model, tmp_path, search=search)
    assert same(hlk.load_search_state(tmp_path), search.state_dict())


def test_a_search_that_is_not_there_is_said(tmp_path):
    model = make_net()
    hlk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="heterolora.json: field 'search' is null"):
        hlk.load_search_state(tmp_path)
    search = hlk.RankSearch(model)
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path, search=search), "search: .*heterolora.json holds no state")


def test_a_search_of_another_model_is_refused(tmp_path):
    model, search = make_net(), hlk.RankSearch(make_net())
    with pytest.raises(ValueError, match="search belongs to another model"):
        hlk.save_adapter(model, tmp_path / "adapter", search=search)
    assert not (tmp_path / "adapter").exists()
    hlk.save_adapter(model, tmp_path, search=hlk.RankSearch(model))
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path, search=search), "search belongs to another model")
    plain = hlk.remove_heterolora(make_net())
    assert_untouched(plain, lambda: hlk.load_adapter(plain, tmp_path, search=search), "search belongs to another model")
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path, search={}), "search must be a RankSearch", TypeError)


def train_plainly(model, steps: int) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    for step in range(steps):
        train_step(model, optimizer, net_batch(step))


@pytest.mark.parametrize(("search", "missed"), [("dynamic", "step"), ("static", "start")])
def test_a_search_that_was_never_driven_is_reported(search, missed, tmp_path):
    model = make_net(search=search)
    assert not caught(lambda: hlk.save_adapter(model, tmp_path))
    train_plainly(model, 2)
    messages = caught(lambda: hlk.save_adapter(model, tmp_path))
    assert len(messages) == 1 and f"2 optimizer steps were taken and search.{missed}() was never called" in messages[0]
    assert "HeteroLoraCallback" in messages[0]


def test_a_search_that_is_off_or_driven_is_not_reported(tmp_path):
    model = make_net(search="off")
    train_plainly(model, 2)
    assert not caught(lambda: hlk.save_adapter(model, tmp_path))
    model, optimizer, search = build()
    train(model, optimizer, search, 2)
    assert not caught(lambda: hlk.save_adapter(model, tmp_path))


# ---- merged ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt_norm_first", "classifier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_model_is_what_merging_gives(name, dtype, tmp_path):
    model = trained(name, dtype, shortcuts=())
    before, values, config = modules_of(model), snapshot(model), copy.deepcopy(model.config.__dict__)
    hlk.save_adapter(model, tmp_path / "merged", "merged")
    assert_restored(model, before)
    assert same_bits(snapshot(model), values) and model.config.__dict__ == config
    loaded = type(base(name)).from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    loaded.config.use_cache = False
    expected = outputs(model)
    merged = hlk.merge_heterolora(model)
    assert same_bits(snapshot(loaded), snapshot(merged))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert (outputs(loaded) - expected).norm() <= tolerance * expected.norm()


def test_merged_model_that_is_not_of_transformers(tmp_path):
    model = make_net(search="off")
    hlk.RankSearch(model).apply({"layers.1": 0, "layers.2": [True, False, False, True]})
    hlk.save_adapter(model, tmp_path, "merged")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert same_bits(load_file(tmp_path / "model.safetensors"), snapshot(hlk.merge_heterolora(model)))


def test_merged_model_with_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    config = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, tie_word_embeddings=True)).eval()
    patch(model, shortcuts=())
    hlk.save_adapter(model, tmp_path, "merged")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)


def test_files_of_an_earlier_merged_model_do_not_stay(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json",
                 "model_card.md"):
        (tmp_path / name).write_text("old")
    hlk.save_adapter(trained("llama", shortcuts=()), tmp_path, "merged")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors", "model_card.md",
                                            "tokenizer.json"]


def test_merging_a_shared_weight_is_refused(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    patch(model, shortcuts=(), target_modules=["lm_head", "q_proj"])
    assert_untouched(model, lambda: hlk.save_adapter(model, tmp_path / "merged", "merged"), "shared")
    assert not (tmp_path / "merged").exists()


# ---- shortcuts that are left out ----


def relative_change(model: nn.Module, batches: list[dict]) -> tuple[float, list[float]]:
    """By another way: masks written, one forward each."""
    shortcuts = [path for path in state_of(model).paths.values() if path.site is not None]
    results, masks = [], [path.mask.clone() for path in shortcuts]
    for on in (True, False):
        for path, mask in zip(shortcuts, masks):
            path.mask.copy_(mask if on else torch.zeros_like(mask))
        with torch.no_grad():
            found = [model(**batch) for batch in batches]
        results.append((torch.cat([result.logits.flatten() for result in found]).double(),
                        None if found[0].loss is None else sum(float(result.loss) for result in found) / len(found)))
    for path, mask in zip(shortcuts, masks):
        path.mask.copy_(mask)
    (before, first), (after, second) = results
    return 100 * float((after - before).norm() / before.norm()), [first, second]


@pytest.mark.parametrize("format", ["peft", "vllm", "merged"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no_labels"])
def test_what_leaving_shortcuts_out_does_is_said(format, labels, tmp_path):
    model = trained("llama")
    with pytest.raises(ValueError, match=rf"format '{format}' cannot hold the 10 active shortcuts.*drop_shortcuts=True"):
        hlk.save_adapter(model, tmp_path / "adapter", format)
    assert not (tmp_path / "adapter").exists()
    batches = [make_inputs(seed) if labels else {"input_ids": make_inputs(seed)["input_ids"]} for seed in (1, 2)]
    change, losses = relative_change(model, batches)
    messages = caught(lambda: hlk.save_adapter(model, tmp_path / "adapter", format, drop_shortcuts=True, batches=iter(batches)))
    expected = f"left out 10 shortcuts: the outputs change by {change:.1f} % (relative L2)"
    assert change > 1
    assert messages == [f"{expected}, loss {losses[0]:.4f} -> {losses[1]:.4f}" if labels else expected]


def test_what_leaving_shortcuts_out_does_is_measured_on_random_ids(tmp_path):
    message, = caught(lambda: hlk.save_adapter(trained("llama"), tmp_path, "peft", drop_shortcuts=True))
    assert message.startswith("left out 10 shortcuts: the outputs change by ")
    assert message.endswith(" % (relative L2), measured on random token ids")
    assert 1 < float(message.split(" by ")[1].split(" %")[0]) < 200


def test_the_adapter_without_shortcuts_is_the_model_without_them(tmp_path):
    model = trained("llama")
    with pytest.warns(UserWarning, match="left out 10 shortcuts"):
        hlk.save_adapter(model, tmp_path, "peft", drop_shortcuts=True)
    for path in state_of(model).paths.values():
        if path.site is not None:
            path.mask.zero_()
    torch.testing.assert_close(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(model), rtol=1e-6, atol=1e-6)


class Pair(nn.Module):
    """One layer of a class of its own: nothing says what it takes."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.first(self.norm(x))
            return x + self.last(x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def pair() -> nn.Module:
    torch.manual_seed(1)
    return patch(Pair(), shortcuts=("shortcut_sa",), sites={"Layer": hlk.Site("norm", "last", "first", "last")})


def test_what_cannot_be_measured_is_said(tmp_path):
    message, = caught(lambda: hlk.save_adapter(pair(), tmp_path, "peft", drop_shortcuts=True))
    assert message == "left out 2 shortcuts: what this does to the outputs was not measured; give batches= to know"


def test_outputs_of_any_model_can_be_measured(tmp_path):
    batches = [{"x": torch.randn(3, 6)}]
    message, = caught(lambda: hlk.save_adapter(pair(), tmp_path, "merged", drop_shortcuts=True, batches=batches))
    assert 0 < float(message.split(" by ")[1].split(" %")[0])


@pytest.mark.parametrize("batches", [[{"x": torch.randn(3, 6)}], [{"x": torch.randn(3, 6)}, {"y": torch.randn(3, 6)}], [3], []],
                         ids=["measured", "fails", "no_dictionary", "empty"])
def test_measuring_leaves_no_trace(batches, tmp_path):
    model = pair().train()
    model.layers[1].eval()
    state = state_of(model)
    state.paths["layers.0.shortcut_sa"].mask[1] = False
    # A graph that waits for its backward, and half accumulated gradients.
    x = torch.randn(3, 6)
    model(x).sum().backward()
    waiting = model(x).square().sum()
    before, values, rng = modules_of(model), snapshot(model), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    derived = [module._heterolora.derived for module in state.linears]
    try:
        caught(lambda: hlk.save_adapter(model, tmp_path / "adapter", "peft", drop_shortcuts=True, batches=batches))
        failed = False
    except (TypeError, ValueError):
        failed = True
    assert failed == (len(batches) != 1 or batches == [3]) and failed != (tmp_path / "adapter").exists()
    assert_restored(model, before)
    assert same_bits(snapshot(model), values) and torch.equal(rng, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(module._heterolora.derived is kept for module, kept in zip(state.linears, derived))
    assert all((p.grad is None) if g is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    waiting.backward()


# ---- what cannot be saved ----


@pytest.mark.parametrize("format", ["native", "peft", "vllm", "merged"])
def test_what_is_not_patched_cannot_be_saved(format, tmp_path):
    with pytest.raises(ValueError, match="model is not patched"):
        hlk.save_adapter(make_model("llama"), tmp_path / "adapter", format)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("format", ["native", "peft", "vllm", "merged"])
def test_a_model_without_active_paths_has_no_adapter(format, tmp_path):
    model = make_patched("llama", torch.float32)
    search = hlk.RankSearch(model)
    search.apply(dict.fromkeys(search.paths, 0))
    with pytest.raises(ValueError, match="no path is active"):
        hlk.save_adapter(model, tmp_path / "adapter", format)
    search.apply({"model.layers.0.residual_1": 1})
    if format == "native":
        hlk.save_adapter(model, tmp_path / "adapter")
        return
    with pytest.raises(ValueError, match="no LoRA path is active"):
        hlk.save_adapter(model, tmp_path / "adapter", format, drop_shortcuts=True)
    assert not (tmp_path / "adapter").exists()


ARGUMENTS = {
    "format": (dict(format="gguf"), r"format must be one of \['native', 'peft', 'vllm', 'merged'\], got 'gguf'"),
    "search": (dict(format="peft", search=3), "search: format 'peft'"),
    "drop_shortcuts": (dict(drop_shortcuts=True), "drop_shortcuts: format 'native'"),
    "drop_heads": (dict(drop_heads=True), "drop_heads: format 'native'"),
    "drop_heads_merged": (dict(format="merged", drop_heads=True), "drop_heads: format 'merged'"),
}


@pytest.mark.parametrize(("options", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_mean_nothing_are_refused(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        hlk.save_adapter(make_net(), tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(save_and_load.distributed, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        hlk.save_adapter(make_net(), tmp_path / "adapter")
        assert (tmp_path / "adapter").exists() == (rank == 0)


# ---- what does not fit ----


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with hlk.use_backend("reference"):
        hlk.save_adapter(trained("llama"), folder)
    return folder


MISFITS = {
    "fewer_paths": (dict(target_modules=["q_proj"]), "in 18 points: path 'model.layers.0.mlp.down_proj' is not in the model"),
    "more_paths": (dict(shortcuts=("residual_1",)), "in 8 points: .*is not in the model; .*; ..."),
    "rank": (dict(rank_pattern={"layers.1.mlp.up_proj": 2}), "in 2 points: r of path 'model.layers.1.mlp.up_proj' is 2 in the "
             "model and 3 in the file; scaling of path"),
    "scaling": (dict(alpha_pattern={"layers.1.mlp.up_proj": 7}), "in 1 points: scaling of path 'model.layers.1.mlp.up_proj' is"),
    "heads": (dict(modules_to_save=["norm"]), "in 1 points: head 'model.norm.weight' is only in the model"),
}


@pytest.mark.parametrize(("options", "match"), MISFITS.values(), ids=MISFITS)
def test_a_patched_model_of_other_paths_is_refused(options, match, saved_llama):
    model = patch(make_model("llama"), **options)
    assert_untouched(model, lambda: hlk.load_adapter(model, saved_llama), match)


def test_shapes_that_do_not_fit_are_named(saved_llama):
    config = make_model("llama").config
    config.intermediate_size += 8
    torch.manual_seed(0)
    for model in (transformers.LlamaForCausalLM(config), patch(transformers.LlamaForCausalLM(config))):
        assert_untouched(model, lambda: hlk.load_adapter(model, saved_llama), "out_features of path 'model.layers.0.mlp.gate_pr")


def test_a_head_of_another_shape_is_named(tmp_path):
    hlk.save_adapter(trained("classifier"), tmp_path)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**BERT, "num_labels": 5}))
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path), r"head 'classifier.bias' has shape \[5\] in the model")


def test_another_kind_of_model_is_refused(saved_llama):
    for model in (make_model("gpt2"), nn.Sequential(nn.Linear(3, 3))):
        assert_untouched(model, lambda: hlk.load_adapter(model, saved_llama), "heterolora.json.* does not fit the model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_base_is_noticed(dtype, saved_llama):
    for patched in (False, True):
        model = make_model("llama", seed=1).to(dtype)
        model = patch(model) if patched else model
        assert_untouched(model, lambda: hlk.load_adapter(model, saved_llama), "another base: the weight of 'model.*base=False")
        hlk.load_adapter(model, saved_llama, check_base=False)


def test_one_bit_of_the_base_is_noticed_in_the_same_dtype(saved_llama):
    model = make_model("llama")
    weight = model.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    assert_untouched(model, lambda: hlk.load_adapter(model, saved_llama), "weight of 'model.layers.2.mlp.down_proj'")


def test_a_weight_that_is_a_head_may_have_changed(tmp_path):
    model = patch(classifier(), target_modules=["query", "classifier"], shortcuts=())
    with torch.no_grad():
        model.classifier.weight.add_(1)
    hlk.save_adapter(model, tmp_path)
    assert same_bits(snapshot(hlk.load_adapter(classifier(), tmp_path)), snapshot(model))


# ---- what is damaged ----


@pytest.fixture
def folder(tmp_path):
    """A small adapter with a head and the state of a search."""
    model = small()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    search = hlk.RankSearch(model, optimizer)
    for step in range(3):
        train_step(model, optimizer, net_batch(step), search)
    hlk.save_adapter(model, tmp_path / "adapter", search=search)
    return tmp_path / "adapter"


def small() -> nn.Module:
    return make_net(r=2, target_modules=["1", "2"], modules_to_save=["norm"], interval=2, num_batches=1)


def plain() -> nn.Module:
    return hlk.remove_heterolora(small())


def test_a_file_that_was_cut_off_anywhere_is_named(folder):
    file = folder / "heterolora.json"
    content = file.read_bytes()
    # Every byte of the beginning and the end; between them lie numbers like each other.
    for length in (*range(1500), *range(1500, len(content) - 500, 41), *range(len(content) - 500, len(content))):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="heterolora.json is no valid JSON"):
            hlk.load_search_state(folder)
    for length in (*range(0, len(content), 997), len(content) - 1):
        file.write_bytes(content[:length])
        for model in (plain(), small()):
            assert_untouched(model, lambda: hlk.load_adapter(model, folder), "heterolora.json is no valid JSON")


def test_tensors_that_were_cut_off_or_changed_anywhere_are_named(folder):
    file = folder / "adapter.safetensors"
    content = file.read_bytes()
    models = plain(), small()
    values = [snapshot(model) for model in models]
    places = range(0, len(content), 41)
    for damaged in (*(content[:place] for place in (*places, len(content) - 1)), content + b"\0",
                    *(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:] for place in places)):
        file.write_bytes(damaged)
        for model in models:
            with pytest.raises(ValueError, match="adapter.safetensors is not the file that field 'sha256' describes"):
                hlk.load_adapter(model, folder)
    assert all(same_bits(snapshot(model), before) for model, before in zip(models, values))
    # The same cuts where a sha256 goes with them.
    for place in places:
        file.write_bytes(content[:place])
        with pytest.raises(ValueError, match="adapter.safetensors is no valid safetensors file"):
            files.read_tensors(file)


def test_files_that_are_missing_are_named(folder, tmp_path):
    model = plain()
    for name in ("adapter.safetensors", "heterolora.json"):
        (folder / name).unlink()
        assert_untouched(model, lambda: hlk.load_adapter(model, folder), name, FileNotFoundError)
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path / "nowhere"), "no folder .*nowhere", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="heterolora.json is missing"):
        hlk.load_search_state(folder)


FOREIGN = {"nothing": "", "list": "[1]", "number": "3", "object": "{}", "deep": "[" * 100000, "bytes": b"\xff\xfe\x00",
           "format": '{"format": "other", "format_version": 1}', "version": '{"format": "heterolora", "format_version": 2}'}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(content, folder):
    (folder / "heterolora.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    model = plain()
    assert_untouched(model, lambda: hlk.load_adapter(model, folder), "heterolora.json")


def places_in(value, place=()) -> list[tuple]:
    """The place of every value in nested dictionaries and lists."""
    found = [place] if place else []
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places_in(entry, (*place, key))
    return found


def changed(content: dict, place: tuple, value, remove: bool = False) -> dict:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


WRONG = {"null": None, "number": -7, "half": 0.5, "text": "x", "list": [3], "object": {"x": 1}, "true": True, "huge": 10**30}


@pytest.mark.parametrize("wrong", [*WRONG, "missing"])
def test_wrong_values_anywhere_are_refused_by_name_or_mean_nothing(wrong, folder):
    file, values = folder / "heterolora.json", snapshot(plain())
    content = json.loads(file.read_text())
    # Of a list, the history say, its first entries; the paths are alike, and so are the base's weights.
    places = [place for place in places_in(content) if not any(isinstance(key, int) and key > 1 for key in place)
              and "layers.2" not in place]
    model, refused = plain(), 0
    for place in places:
        file.write_text(json.dumps(changed(content, place, WRONG.get(wrong), remove=wrong == "missing")))
        try:
            hlk.load_search_state(folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hlk.remove_heterolora(hlk.load_adapter(model, folder))
            model = plain()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(folder) in str(error), (place, error)
            assert same_bits(snapshot(model), values), place
    assert refused > 30


def test_tensors_come_from_the_same_folder_only(folder):
    file = folder / "heterolora.json"
    content = json.loads(file.read_text())
    for name in ("../adapter/adapter.safetensors", str(folder / "adapter.safetensors"), "..", ""):
        file.write_text(json.dumps(changed(content, ("weights", "file"), name)))
        model = plain()
        assert_untouched(model, lambda: hlk.load_adapter(model, folder), "'file' must be the name of a file in the same folder")


def rewrite(folder, change) -> None:
    """Change tensors, and the sha256 with them."""
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    content = json.loads((folder / "heterolora.json").read_text())
    content["weights"]["sha256"] = files.sha256_of(folder / "adapter.safetensors")
    (folder / "heterolora.json").write_text(json.dumps(content))


TENSORS = {
    "missing": (lambda t: t.pop("layers.1.lora_B"), "1 tensors are missing or not in heterolora.json: 'layers.1.lora_B'"),
    "more": (lambda t: t.update(other=torch.ones(1)), "1 tensors are missing or not in heterolora.json: 'other'"),
    "shape": (lambda t: t.update({"layers.1.lora_A": t["layers.1.lora_A"][:, :3]}), "'layers.1.lora_A' has shape"),
    "head": (lambda t: t.update({"norm.bias": torch.ones(2)}), "'norm.bias' has shape"),
    "mask": (lambda t: t["layers.1.lora_mask"].logical_not_(), "'layers.1.lora_mask' is not what field 'active'"),
}


@pytest.mark.parametrize(("change", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_the_json_does_not_speak_of_are_named(change, match, folder):
    rewrite(folder, change)
    model = plain()
    assert_untouched(model, lambda: hlk.load_adapter(model, folder), f"adapter.safetensors: .*{match}")


# ---- undone when it fails ----


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
@pytest.mark.parametrize("at", [1, 8, 11, 14])
def test_a_failure_while_writing_leaves_the_model_as_it_was(patched, error, at, folder, monkeypatch):
    model, calls, copy_ = small() if patched else plain(), [], torch.Tensor.copy_
    real = save_and_load._check_base

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error("in the middle")
        return copy_(self, *args, **kwargs)

    def check(*args):
        # The last thing before anything is written.
        monkeypatch.setattr(torch.Tensor, "copy_", fail)
        real(*args)

    monkeypatch.setattr(save_and_load, "_check_base", check)
    linears = state_of(model).linears if patched else []
    gates = [module._heterolora.derived.gate.clone() for module in linears]
    assert_untouched(model, lambda: hlk.load_adapter(model, folder), "in the middle", error)
    assert len(calls) > at
    assert all(torch.equal(module._heterolora.derived.gate, gate) for module, gate in zip(linears, gates))


def test_a_state_that_the_search_refuses_leaves_everything_as_it_was(folder):
    model = small()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    search = hlk.RankSearch(model, optimizer)
    train_step(model, optimizer, net_batch(7), search)
    gates = [module._heterolora.derived.gate.clone() for module in state_of(model).linears]
    state, ranks = search.state_dict(), search.ranks
    file = folder / "heterolora.json"
    content = json.loads(file.read_text())
    for place, value in ((("search", "version"), 1), (("search", "history"), 3), (("search", "generator"), None)):
        file.write_text(json.dumps(changed(content, place, value)))
        before, values = modules_of(model), snapshot(model)
        with pytest.raises(ValueError, match="heterolora.json: field 'search'"):
            hlk.load_adapter(model, folder, search=search)
        assert_restored(model, before)
        assert same_bits(snapshot(model), values) and same(search.state_dict(), state) and search.ranks == ranks
    assert all(map(torch.equal, gates, (module._heterolora.derived.gate for module in state_of(model).linears)))
    file.write_text(json.dumps(content))
    hlk.load_adapter(model, folder, search=search)
    assert same(search.state_dict(), hlk.load_search_state(folder))
