"""What a patched model holds: between a forward and its backward, and after a thousand steps."""

from __future__ import annotations

import gc
import tracemalloc

import peft
import pytest
import torch
from helpers_search import make_net, net_batch, trainable
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import heterolora_kernels as hlk
from bench.memory import held_bytes
from heterolora_kernels.ops.schema import padded_rank

TOKENS, HIDDEN, INNER, LAYERS, RANK = 256, 64, 160, 2, 8


def make_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
                                         num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    # As in every layer but the first of a deep model, gradients are wanted of x too.
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model.to(dtype).train()


def held_by(model: nn.Module) -> int:
    ids = torch.randint(32, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))

    def forward():
        return model(input_ids=ids).logits

    forward().float().sum().backward()
    return held_bytes(forward, [*model.parameters(), *model.buffers(), *packs_of(model)])


def packs_of(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for module in model.modules():
        packs = getattr(getattr(module, "_heterolora", None), "packs", None)
        found += packs.tensors if packs is not None else []
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_a_step_are_what_the_gradients_need(dtype, dropout):
    frozen = held_by(make_llama(dtype).requires_grad_(False))
    ours = held_by(hlk.apply_heterolora(make_llama(dtype), hlk.HeteroLoraConfig(r=RANK, lora_dropout=dropout,
                                                                                init_B="kaiming_uniform")))
    theirs = held_by(peft.get_peft_model(make_llama(dtype), peft.LoraConfig(
        r=RANK, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)))
    # x of q, k and v; of o; of gate and up; of down.
    widths, linears = (HIDDEN, HIDDEN, HIDDEN, INNER), 7
    hidden = LAYERS * linears * TOKENS * padded_rank(RANK) * dtype.itemsize
    sources = LAYERS * sum(widths) * TOKENS * dtype.itemsize
    masks = LAYERS * sum(widths) * TOKENS // 8 if dropout else 0
    vectors = LAYERS * linears * 128  # scalings, gates, keys
    assert frozen < ours <= frozen + sources + hidden + masks + vectors
    # PEFT casts x of every linear to its adapters' dtype, and with dropout keeps each one's own x and mask.
    inputs = LAYERS * (6 * HIDDEN + INNER) * TOKENS
    copies = inputs * 4 if dropout or dtype != torch.float32 else 0
    assert ours <= theirs - copies + sources + vectors


def test_a_thousand_steps_with_reallocations_hold_no_more_than_two_hundred():
    model = make_net(interval=4, num_batches=2, warmup=1)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    search, batches = hlk.RankSearch(model, optimizer), [net_batch(i) for i in range(3)]
    search.start()

    def train(steps: int) -> tuple[int, int]:
        for step in range(steps):
            optimizer.zero_grad()
            model(**batches[step % 3]).loss.backward()
            optimizer.step()
            search.step()
        reallocations = len(search.history)
        search.history.clear()
        gc.collect()
        assert reallocations >= steps // 4
        return tracemalloc.get_traced_memory()[0], len(gc.get_objects())

    tracemalloc.start()
    try:
        train(100)
        (before, objects), (after, found) = train(100), train(800)
    finally:
        tracemalloc.stop()
    # One object of each of the 200 reallocations would be seen; Python's own tables grow in large steps.
    assert found - objects < 100
    assert after - before < 100_000
