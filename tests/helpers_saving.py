"""Models to be saved, and what is compared of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import assert_restored, make_inputs, make_model, patch
from families import snapshot as modules_of
from helpers_search import same_bits, snapshot, trainable
from torch import nn

import heterolora_kernels as hlk

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


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and (first == second or first != first and second != second)
