"""What leaving the shortcuts out of a saved adapter does, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from families import (
    assert_restored,
    make_inputs,
    make_model,
    patch,
    reference_backend,  # noqa: F401
)
from families import snapshot as modules_of
from helpers_errors import assert_models_agree
from helpers_saving import outputs, trained
from helpers_search import caught, same_bits, snapshot
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.state import state_of


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
    assert_models_agree(hlk.load_adapter(make_model("llama"), tmp_path), model, outputs)


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
