"""The native format bit for bit, the search that goes with it, merged models, and what cannot be saved."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
import transformers
from families import (
    assert_restored,
    make_model,
    make_patched,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
)
from families import snapshot as modules_of
from helpers_saving import assert_untouched, base, outputs, same, trained
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
from safetensors.torch import load_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import save_and_load
from heterolora_kernels.save_and_load import write_native
from heterolora_kernels.state import state_of

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
    hlk.save_adapter(model, tmp_path / "peft", "peft")
    with torch.no_grad():
        open_adapters(model, seed=11)
    hlk.save_adapter(model, tmp_path)
    # Somebody has put them beside each other.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "peft" / name).rename(tmp_path / name)
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
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json", "model_card.md"):
        (tmp_path / name).write_text("old")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    hlk.save_adapter(trained("llama", shortcuts=()), tmp_path, "merged")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors", "model_card.md",
                                            "pytorch_model.bin", "tokenizer.json"]


def test_merging_a_shared_weight_is_refused(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    patch(model, shortcuts=(), target_modules=["lm_head", "q_proj"])
    assert_untouched(model, lambda: hlk.save_adapter(model, tmp_path / "merged", "merged"), "shared")
    assert not (tmp_path / "merged").exists()


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
