"""What torch.compile makes of a patched model with its own code generator: the numbers of the eager model, whatever the ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
from families import adapter_gradients
from helpers_search import make_llama
from helpers_trainer import make_trainer, texts
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback

pytestmark = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 8]])
SIZES = dict(vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)


def make_decoder() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def make_encoder() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=8, hidden_dropout_prob=0.0,
                                      attention_probs_dropout_prob=0.0))


def gradients(call, model, seed: int = 3) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    call(input_ids=IDS).logits.square().mean().backward()
    return adapter_gradients(model)


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-12,
                                   msg=lambda text, name=name: f"{name}: {text}")


CASES = {"decoder": (make_decoder, "cpu"), "encoder": (make_encoder, "reference")}


@pytest.mark.parametrize("case", CASES)
def test_compiled_model_equals_the_eager_one(case):
    make, backend = CASES[case]
    if backend not in hlk.available_backends():
        backend = "reference"
    torch._dynamo.reset()
    # The generator of torch, and not inductor's own: the same masks as the eager model's.
    with hlk.use_backend(backend), torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(0)
        model = hlk.apply_heterolora(make(), hlk.HeteroLoraConfig(
            r=4, shortcuts="all", init_B="kaiming_uniform", lora_dropout=0.3)).train()
        search, counter = hlk.RankSearch(model), CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for ranks in (4, 1, 0):
            search.apply({name: ranks for name in search.paths[::2]})
            expected = gradients(model, model)
            assert any(value.any() for value in expected.values())
            assert_close(gradients(compiled, model), expected)
        assert counter.frame_count == 1
        for ranks in (4, 2):
            search.apply({name: ranks for name in search.paths[1::2]})
            with hlk.collect_statistics(model) as expected:
                gradients(model, model)
            with hlk.collect_statistics(model) as found:
                gradients(compiled, model)
            found = found.table()
            for path, columns in expected.table().items():
                assert_close(found[path], columns)
        assert counter.frame_count == 2
        # One key a call, one mask for the forward and the backward.
        first, again, other = (gradients(compiled, model, seed) for seed in (3, 3, 4))
        assert_close(again, first)
        assert any(not torch.allclose(other[name], value) for name, value in first.items())


def test_a_model_compiled_in_place_masks_forward_and_backward_alike():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 5))
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=3, init_B="kaiming_uniform", lora_dropout=0.5))
    search, x = hlk.RankSearch(model), torch.randn(6, 9)
    model.compile(fullgraph=True)
    keys, graphs = set(), set()
    for ranks in (3, 2):
        search.apply({name: ranks for name in search.paths})
        model.zero_grad()
        model(x).square().sum().backward()
        graphs.add(counters["stats"]["unique_graphs"])
        for path in model._heterolora_state.paths.values():
            rows = (path.lora_A * path.lora_A.grad).sum(1), (path.lora_B * path.lora_B.grad).sum(0)
            torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-3 * float(rows[0].abs().max()))
            keys.add(float(rows[0].abs().sum()))
    # Every call draws a mask of its own.
    assert len(keys) == 4 and len(graphs) == 1


def test_trainer_compiles_and_chooses_the_ranks_of_the_uncompiled_run(tmp_path):
    # Without code generation, whose numbers are tested above: it takes most of a minute.
    def train(compiled: bool):
        torch._dynamo.reset()
        counters.clear()
        model = make_llama(layers=1, shortcuts=(), interval=2, num_batches=1, warmup=1, seed=1)
        callback = HeteroLoraCallback()
        trainer = make_trainer(tmp_path / str(compiled), model, texts(32), callback, max_steps=8, torch_compile=compiled,
                               torch_compile_backend="aot_eager" if compiled else None)
        trainer.train()
        return callback.search.history, model, counters["stats"]["unique_graphs"]

    expected, plain, _ = train(False)
    found, model, graphs = train(True)
    assert [entry["ranks"] for entry in found] == [entry["ranks"] for entry in expected] and len(found) == 5
    assert len({tuple(entry["ranks"].values()) for entry in found}) > 1
    # One with statistics, one without them.
    assert 1 <= graphs <= 2
    for (name, value), other in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=name)
