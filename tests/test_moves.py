"""Whatever else is done with a model: meta device, default device, offloading, from_pretrained, tying, inference mode, export."""

from __future__ import annotations

import copy
import io

import accelerate
import pytest
import torch
import transformers
from families import loss_and_gradients, make_inputs, make_model, patch
from helpers_search import llama_batch, path_names, plain_llama
from torch import nn

import heterolora_kernels as hlk


def patched(model=None, **config) -> nn.Module:
    return hlk.apply_heterolora(plain_llama() if model is None else model, hlk.HeteroLoraConfig(
        **{"r": 3, "shortcuts": "all", "shortcut_r": 2, "init_B": "kaiming_uniform", "interval": 2, **config}))


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**llama_batch(0, size=8)).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(model: nn.Module, other: nn.Module) -> None:
    (loss, gradients), (expected, wanted) = step(model), step(other)
    assert loss == expected and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


# ---- models without tensors ----


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(plain_llama().config)


def on_meta_and_patched_there() -> nn.Module:
    with torch.device("meta"):
        return patched(transformers.LlamaForCausalLM(plain_llama().config), seed=9)


def without_weights() -> nn.Module:
    with accelerate.init_empty_weights():
        return transformers.LlamaForCausalLM(plain_llama().config)


def without_weights_and_patched_there() -> nn.Module:
    with accelerate.init_empty_weights():
        return patched(transformers.LlamaForCausalLM(plain_llama().config), seed=9)


EMPTY = [on_meta, on_meta_and_patched_there, without_weights, without_weights_and_patched_there]


@pytest.mark.parametrize("make", EMPTY)
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_model_without_tensors_is_patched_and_loaded(make, assign):
    source = patched()
    search = hlk.RankSearch(source)
    search.apply({name: 1 for name in search.paths[::2]})
    model = make()
    if not hasattr(model, "_heterolora_state"):
        patched(model, seed=9)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(source.state_dict()), strict=True, assign=assign)
    # Buffers that no state dict holds.
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    assert_same_step(model, source)
    for each in (model, source):
        hlk.RankSearch(each).apply({name: 2 for name in search.paths})
    assert_same_step(model, source)


def test_nothing_depends_on_the_default_device(tmp_path):
    def run(device):
        model, batches = plain_llama(), [llama_batch(i) for i in range(2)]

        def loss_fn(model, batch):
            with torch.device("cpu"):
                return model(**batch).loss

        with torch.device(device):
            patched(model, warmup=1, num_batches=2, score="probe")
            search = hlk.RankSearch(model, dataloader=batches, loss_fn=loss_fn)
            search.start()
            for _ in range(2):
                search.step()
            scores = [search.score(proxy=proxy) for proxy in ("constant", "grad_norm", "fisher")]
            with hlk.collect_statistics(model):
                loss_fn(model, batches[0]).backward()
            hlk.save_adapter(model, tmp_path / device, search=search)
            hlk.load_adapter(model, tmp_path / device, search=search)
            search.load_state_dict(search.state_dict())
            search.apply({search.paths[0]: 1, search.paths[1]: [True, False, True]})
            for ranks in ("graded", "binary"):
                hlk.remove_heterolora(model)
                patched(model, ranks=ranks)
                hlk.RankSearch(model).start()
        return search.history, scores, {name: value.clone() for name, value in model.state_dict().items()}

    (history, scores, tensors), (expected, wanted, values) = run("meta"), run("cpu")
    assert history == expected and scores == wanted
    assert all(torch.equal(tensors[name], values[name]) for name in values)


# ---- transformers and accelerate ----


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}],
                         ids=["plain", "device_map", "bfloat16"])
def test_a_model_from_a_folder_is_patched(options, tmp_path):
    plain_llama().save_pretrained(tmp_path)
    model = patched(transformers.LlamaForCausalLM.from_pretrained(tmp_path, **options))
    expected = plain_llama().eval()
    for module in expected.modules():  # buffers stay float32
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(options.get("dtype", torch.float32))
    assert_same_step(model, patched(expected))


def test_a_patched_model_that_is_saved_by_transformers_loads_as_the_base(tmp_path):
    patched().save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(**llama_batch(0)).logits, plain_llama().eval()(**llama_batch(0)).logits)


def test_an_offloaded_model_is_refused_by_name_and_left_alone():
    model = plain_llama().eval()
    before = model(**llama_batch(0)).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"model\.layers\.\*.*offloaded by accelerate"):
        patched(model)
    assert torch.equal(model(**llama_batch(0)).logits, before)


def test_a_patched_model_can_be_offloaded():
    model = patched(shortcuts=()).eval()
    before = model(**llama_batch(0)).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(**llama_batch(0)).logits, before)


# ---- shared parameters and modules ----


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]], ids=["others", "the_tied_one"])
def test_tied_embeddings_stay_tied(targets):
    config = copy.deepcopy(plain_llama().config)
    config.tie_word_embeddings = True

    def make():
        torch.manual_seed(0)
        return patched(transformers.LlamaForCausalLM(config), shortcuts=(), target_modules=targets)

    def assert_tied(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight

    model, other = make(), make()
    for change in (copy.deepcopy, lambda m: m.bfloat16().float(), lambda m: m.to_empty(device="cpu"), hlk.remove_heterolora):
        model = change(model)
        assert_tied(model)
        if change is copy.deepcopy:
            assert_same_step(model, other)
        elif "_heterolora_state" in model.__dict__:
            model.load_state_dict(other.state_dict())
            assert_tied(model)
            with torch.no_grad():
                model.model.rotary_emb = copy.deepcopy(other.model.rotary_emb)
            assert_same_step(model, other)


class Twice(nn.Module):
    """One linear under two names, called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(8, 8)
        self.again = self.one

    def forward(self, x):
        return self.again(torch.tanh(self.one(x)))


def test_a_linear_that_is_used_twice_has_one_path_and_the_sum_of_both_gradients(tmp_path):
    model, x = hlk.apply_heterolora(Twice(), hlk.HeteroLoraConfig(r=3, init_B="kaiming_uniform")), torch.randn(20, 8)
    assert path_names(model) == ["one"]
    a, b = (getattr(model.one, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    out = model(x)
    with hlk.collect_statistics(model) as ledger:
        model(x).square().sum().backward()

    def linear(x):
        return x @ (model.one.weight + 16 / 3 * b @ a).t() + model.one.bias

    expected = linear(torch.tanh(linear(x)))
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.one.lora_A.grad, a.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.one.lora_B.grad, b.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ledger.table()["one"]["gate_grad"], (a * a.grad).sum(1).detach(), rtol=1e-3, atol=1e-2)
    hlk.save_adapter(model, tmp_path)
    assert torch.equal(hlk.load_adapter(Twice(), tmp_path)(x), out)
    hlk.remove_heterolora(model)
    assert type(model.one) is nn.Linear and model.again is model.one and not hasattr(model.one, "lora_A")


# ---- inference mode between steps ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inference_mode_between_steps_leaves_nothing_behind(family, backend):
    if backend not in hlk.available_backends():
        pytest.skip(f"the {backend} backend is not built")
    inputs = make_inputs(batch=4, length=9)  # rows enough for packed weights
    with hlk.use_backend(backend):
        model, other = (patch(make_model(family), lora_dropout=0.0).train() for _ in range(2))
        searches = [hlk.RankSearch(each) for each in (model, other)]
        for ranks in (3, 1, 2):
            for search in searches:
                search.apply({name: min(ranks, 2) for name in search.paths[::2]})
            with torch.inference_mode(), hlk.collect_statistics(model):
                model.eval()(**inputs)
                copy.deepcopy(model)
            results = [loss_and_gradients(each.train(), inputs) for each in (model, other)]
            assert torch.equal(results[0][0][0], results[1][0][0])
            assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
        with torch.inference_mode():
            model.load_state_dict(copy.deepcopy(other.state_dict()))
        assert loss_and_gradients(model, inputs)[0] == loss_and_gradients(other, inputs)[0]


# ---- torch.export ----


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_merged_model_is_exported(family):
    model = hlk.merge_heterolora(patch(make_model(family), shortcuts=())).eval()
    ids = make_inputs(padding=False)["input_ids"]
    assert torch.equal(torch.export.export(model, (ids,)).module()(ids).logits, model(ids).logits)


def test_a_patched_model_is_exported_saved_and_loaded():
    model = patched().eval()
    search = hlk.RankSearch(model)
    search.apply({name: 1 for name in search.paths[::2]})
    ids, file = llama_batch(0)["input_ids"], io.BytesIO()
    expected = model(ids).logits
    torch.export.save(torch.export.export(model, (ids,)), file)
    file.seek(0)
    # It stays what it was when it was exported, whatever becomes of the model.
    search.apply({name: 0 for name in search.paths})
    torch.testing.assert_close(torch.export.load(file).module()(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected)
