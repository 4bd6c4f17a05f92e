"""Folders that are damaged or belong to another model are refused by name, and a failure leaves everything as it was."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from families import (
    assert_restored,
    make_model,
    patch,
    reference_backend,  # noqa: F401
)
from families import snapshot as modules_of
from helpers_saving import BERT, assert_untouched, classifier, same, trained
from helpers_search import make_net, net_batch, same_bits, snapshot, train_step, trainable
from safetensors.torch import load_file, save_file
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import files, fingerprint
from heterolora_kernels.state import state_of

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
    "heads": (dict(modules_to_save=["model.norm"]), "in 1 points: head 'model.norm.weight' is only in the model"),
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
    real = fingerprint.check_base

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error("in the middle")
        return copy_(self, *args, **kwargs)

    def check(*args):
        # The last thing before anything is written.
        monkeypatch.setattr(torch.Tensor, "copy_", fail)
        real(*args)

    monkeypatch.setattr(fingerprint, "check_base", check)
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
