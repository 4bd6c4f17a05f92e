"""A layer whose three linears form a group, and what is compared of it."""

from __future__ import annotations

import pytest
import torch
from families import open_adapters
from torch import Tensor, nn

import heterolora_kernels as hlk
from heterolora_kernels import layers as layers_module

K, SIZES = 29, {"q_proj": 21, "k_proj": 7, "v_proj": 13}


class LlamaDecoderLayer(nn.Module):
    """Three linears that read x, called as ``script`` says. The table of groups knows it by its name."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Module()
        for name, size in SIZES.items():
            self.self_attn.add_module(name, nn.Linear(K, size, bias=name != "k_proj"))
        self.script = in_turn

    def forward(self, x):
        return self.script(self, x)


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    return [getattr(layer.self_attn, name) for name in SIZES]


def in_turn(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(x) for linear in linears_of(layer))


def make_layer(dtype: torch.dtype = torch.float64, ranks=(3, 5, 9), seed: int = 0, change=None, **options) -> nn.Module:
    """A patched layer in a Sequential, with lora_B != 0. ``change``: what is done to the layer before it is patched."""
    torch.manual_seed(seed)
    layer = LlamaDecoderLayer().to(dtype)
    if change is not None:
        change(layer)
    model = nn.Sequential(layer)
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 3, "search": "off", "rank_pattern": dict(zip(SIZES, ranks)), **options}))
    open_adapters(model)
    return model


@pytest.fixture(name="ops")
def counted_ops(monkeypatch) -> list[int]:
    """How many linears each op of the test ran."""
    calls, real = [], layers_module.run_group

    def counted(backend, x, weights, *args):
        calls.append(len(weights))
        return real(backend, x, weights, *args)

    monkeypatch.setattr(layers_module, "run_group", counted)
    return calls


def make_x(rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def weighted(outs, seed: int = 2) -> Tensor:
    """A sum in which every element has a factor of its own."""
    generator = torch.Generator().manual_seed(seed)
    return sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outs)


def results(model: nn.Module, x: Tensor, used=(0, 1, 2), backwards: int = 1) -> tuple[list[Tensor], dict, Tensor]:
    """Outputs, gradients of the parameters and of x."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    outs = model(x)
    loss = weighted([outs[i] for i in used])
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    return [out.detach() for out in outs], {name: p.grad for name, p in model.named_parameters()}, x.grad


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name


def both(script=None, x=None, **options) -> tuple[nn.Module, nn.Module]:
    """The same layer with and without groups."""
    models = [make_layer(group=group, **options) for group in ("auto", "off")]
    for model in models:
        model[0].script = script or in_turn
    return models
