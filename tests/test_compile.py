"""torch.compile around a patched model: one graph, which follows every change of ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import heterolora_kernels as hlk

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 8]])


def _llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def _patched(build=_llama, **options):
    torch.manual_seed(0)
    return hlk.apply_heterolora(build(), hlk.HeteroLoraConfig(r=4, shortcuts="all", init_B="kaiming_uniform", **options))


def _compiled(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def _gradients(call, model):
    model.zero_grad()
    call(input_ids=IDS).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_same(model, compiled):
    expected, got = _gradients(model, model), _gradients(compiled, model)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("build", [_llama, _gpt2], ids=["llama", "gpt2"])
def test_first_forward_may_be_the_compiled_one(build):
    model = _patched(build)
    compiled, counter = _compiled(model)
    _gradients(compiled, model)
    assert counter.frame_count == 1
    _assert_same(model, compiled)


def test_new_ranks_recompile_nothing():
    model = _patched()
    search = hlk.RankSearch(model)
    compiled, counter = _compiled(model)
    _gradients(compiled, model)
    for ranks in (0, 3, 1, 4):
        search.apply({name: ranks for name in search.paths[::2]})
        _assert_same(model, compiled)
    assert counter.frame_count == 1


def test_a_loaded_state_recompiles_nothing_and_is_followed():
    model = _patched()
    other = _patched()
    hlk.RankSearch(other).apply({"model.layers.0.self_attn.v_proj": 1, "model.layers.1.shortcut_ffn": 0})
    compiled, counter = _compiled(model)
    _gradients(compiled, model)
    model.load_state_dict(copy.deepcopy(other.state_dict()))
    _assert_same(model, compiled)
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(input_ids=IDS).logits, other(IDS).logits)


def test_statistics_are_counted_by_a_compiled_model():
    model = _patched()
    compiled, counter = _compiled(model)
    with hlk.collect_statistics(model) as expected:
        _gradients(model, model)
    with hlk.collect_statistics(model) as got:
        _gradients(compiled, model)
    for path, columns in expected.table().items():
        for name, value in columns.items():
            torch.testing.assert_close(got.table()[path][name], value, rtol=1e-4, atol=1e-8)
    graphs = counter.frame_count
    _gradients(compiled, model)
    with hlk.collect_statistics(model):
        _gradients(compiled, model)
    assert counter.frame_count <= graphs + 1  # one without statistics, one with them


def test_a_compiled_model_is_refused_with_the_order():
    with pytest.raises(ValueError, match="apply_heterolora first"):
        hlk.apply_heterolora(torch.compile(_llama(), backend="eager"), hlk.HeteroLoraConfig())
