"""Activation checkpointing, layerdrop, and what is left when a forward ends: sources reach the right recompute, or nothing."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref

import pytest
import torch
from families import (
    FAMILIES,
    LAYERS,
    EagerTwin,
    assert_gradients_close,
    every_checkpointed,
    layers_of,
    loss_and_gradients,
    loss_of,
    make_inputs,
    make_model,
    make_patched,
    patch,
    reference_backend,  # noqa: F401
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import heterolora_kernels as hlk

# Deprecated in the newest transformers 5 by a method that the oldest does not have.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning",
                                        "ignore:None of the inputs have requires_grad:UserWarning")

reentrancy = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
#: Which layers are checkpointed.
CHECKPOINTED = {"every": (0, 1, 2), "even": (0, 2), "odd": (1,)}
which_layers = pytest.mark.parametrize("layers", CHECKPOINTED.values(), ids=CHECKPOINTED)
forwards = pytest.mark.parametrize("batches", [1, 2], ids=["one_forward", "two_forwards"])


def batches_of(count: int) -> list[dict]:
    return [make_inputs(1), make_inputs(2, batch=3, length=5)][:count]


def turn_on(model: nn.Module, family, use_reentrant: bool, layers=(0, 1, 2)) -> nn.Module:
    """Checkpoint ``layers`` of a model in train mode."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for i, layer in enumerate(layers_of(model, family)):
        layer.gradient_checkpointing = i in layers
    return model


class Calls:
    """Counts the calls of one child of every layer, recomputes included."""

    def __init__(self, model: nn.Module, family):
        self.counts = [0] * len(layers_of(model, family))
        for i, layer in enumerate(layers_of(model, family)):
            layer.get_submodule(family.f).register_forward_hook(functools.partial(self._count, i))

    def _count(self, i: int, *ignored) -> None:
        self.counts[i] += 1


@functools.cache
def without_checkpointing(name: str, batches: int, dropout: float = 0.0):
    model = make_patched(name, lora_dropout=dropout).train()
    torch.manual_seed(11)
    return loss_and_gradients(model, *batches_of(batches))


def captured(model: nn.Module) -> list:
    """What a layer, a group of linears or a carrier still holds."""
    held = []
    for module in model.modules():
        state = module.__dict__.get("_heterolora")
        held += [value for value in vars(state._running.now()).values() if value] if hasattr(state, "_running") else []
        held += [group.layer.now().turns or None for group in getattr(state, "groups", ())]
        carriers = module.__dict__.get("_heterolora_carriers", ())
        held += [carrier._running.now().f for carrier in carriers]
        assert all(carrier._running.now().depth == 0 for carrier in carriers)
    return [tensor for tensor in held if tensor is not None]


@every_checkpointed
@reentrancy
@forwards
@which_layers
def test_gradients_equal_those_without_checkpointing(family, use_reentrant, batches, layers):
    expected_losses, expected = without_checkpointing(family.name, batches)
    model = turn_on(make_patched(family), family, use_reentrant, layers)
    calls = Calls(model, family)
    losses, gradients = loss_and_gradients(model, *batches_of(batches))
    assert calls.counts == [batches * (2 if i in layers else 1) for i in range(LAYERS)]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert_gradients_close(gradients, expected)
    assert captured(model) == []


@every_checkpointed
@reentrancy
def test_gradients_equal_the_eager_twin(family, use_reentrant):
    base = make_model(family, torch.float64)
    model = turn_on(make_patched(family), family, use_reentrant)
    _, gradients = loss_and_gradients(model, *batches_of(2))
    _, expected = EagerTwin(base, model, family).loss_and_gradients(*batches_of(2))
    assert_gradients_close(gradients, expected)


@every_checkpointed
@reentrancy
@forwards
def test_dropout_masks_are_replayed(family, use_reentrant, batches):
    _, expected = without_checkpointing(family.name, batches, dropout=0.3)
    _, undropped = without_checkpointing(family.name, batches)
    model = turn_on(make_patched(family, lora_dropout=0.3), family, use_reentrant)
    calls = Calls(model, family)
    torch.manual_seed(11)
    _, gradients = loss_and_gradients(model, *batches_of(batches))
    assert calls.counts == [2 * batches] * LAYERS
    assert_gradients_close(gradients, expected)
    assert any((gradients[name] - undropped[name]).abs().max() > 1e-3 * undropped[name].abs().max() for name in gradients)


@reentrancy
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_backward_first", "last_backward_first"])
def test_backwards_in_any_order(use_reentrant, order):
    family = FAMILIES["llama"]
    _, expected = without_checkpointing("llama", 2)
    model = turn_on(make_patched(family), family, use_reentrant)
    losses = [loss_of(model, batch) for batch in batches_of(2)]
    for i in order:
        losses[i].backward()
    assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected)


@reentrancy
def test_forward_without_grad_between_forward_and_backward(use_reentrant):
    family = FAMILIES["llama"]
    _, expected = without_checkpointing("llama", 1)
    model = turn_on(make_patched(family), family, use_reentrant)
    loss = loss_of(model, batches_of(1)[0])
    with torch.no_grad(), hlk.disable_adapter(model):
        model(**make_inputs(5))
    loss.backward()
    assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected)


@every_checkpointed
@reentrancy
def test_statistics_are_counted_once(family, use_reentrant):
    def table(model):
        with hlk.collect_statistics(model) as ledger:
            loss_and_gradients(model, *batches_of(2))
        return ledger.table()

    expected = table(make_patched(family).train())
    found = table(turn_on(make_patched(family), family, use_reentrant))
    assert found.keys() == expected.keys()
    for path, columns in expected.items():
        for column, values in columns.items():
            assert values.abs().max() > 0, (path, column)
            torch.testing.assert_close(found[path][column], values, rtol=1e-5, atol=1e-6 * values.abs().max().item(),
                                       msg=lambda text, key=(path, column): f"{key}: {text}")


# ---- a checkpoint around the layer, from outside ----


class Outside(nn.Module):
    """A layer with a checkpoint around its call, as users and torch's checkpoint_wrapper put it."""

    def __init__(self, layer: nn.Module, use_reentrant: bool):
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def __getattr__(self, name: str):
        # Some models read attributes of their layers (attention_type).
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["layer"], name)

    def forward(self, *args, **kwargs):
        return checkpoint(functools.partial(self.layer, **kwargs), *args, use_reentrant=self.use_reentrant)


@every_checkpointed
@reentrancy
def test_checkpoint_around_every_layer_raises(family, use_reentrant):
    model = make_patched(family).train()
    model.enable_input_require_grads()
    layers = layers_of(model, family)
    for i in range(LAYERS):
        layers[i] = Outside(layers[i], use_reentrant)
    loss = loss_of(model, make_inputs())
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


@reentrancy
@pytest.mark.parametrize("wrapped", [(0,), (1,), (2,), (0, 2)], ids=["first", "middle", "last", "both_ends"])
def test_checkpoint_around_some_layers_raises_or_is_right(use_reentrant, wrapped):
    model = make_patched("llama").train()
    model.enable_input_require_grads()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i in wrapped:
        model.model.layers[i] = Outside(model.model.layers[i], use_reentrant)
    try:
        loss_of(model, make_inputs()).backward()
    except RuntimeError as error:
        assert "gradient_checkpointing_enable" in str(error)
        return
    assert_gradients_close(dict(zip(names, (p.grad for p in parameters))), without_checkpointing("llama", 1)[1])


@reentrancy
def test_checkpoint_around_every_layer_is_right_without_shortcut_ffn(use_reentrant):
    shortcuts = ("residual_1", "residual_2", "shortcut_sa")
    _, expected = loss_and_gradients(make_patched("llama", shortcuts=shortcuts).train(), make_inputs())
    model = make_patched("llama", shortcuts=shortcuts).train()
    model.enable_input_require_grads()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i in range(LAYERS):
        model.model.layers[i] = Outside(model.model.layers[i], use_reentrant)
    loss_of(model, make_inputs()).backward()
    assert_gradients_close({name: p.grad for name, p in parameters.items()}, expected)


def test_layer_called_outside_its_model_raises():
    model = make_patched("llama")
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    positions = model.model.rotary_emb(hidden, torch.arange(3)[None])
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.shortcut_ffn"):
        model.model.layers[1](hidden, position_embeddings=positions)


# ---- nothing is left ----


@every_checkpointed
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_nothing_is_held_after_the_call(family, grad):
    model, seen = make_patched(family, lora_dropout=0.2).train(), []
    for layer, key in itertools.product(layers_of(model, family), ("h", "f")):
        layer.get_submodule(getattr(family, key)).register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0])))
    with torch.set_grad_enabled(grad):
        loss = loss_of(model, make_inputs())
    assert captured(model) == []
    del loss
    gc.collect()
    assert len(seen) == 2 * LAYERS and all(reference() is None for reference in seen)


@every_checkpointed
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["error", "keyboard_interrupt"])
@pytest.mark.parametrize("part", ["h", "f", "attention", "feed_forward"])
def test_nothing_is_held_after_an_exception(family, error, part):
    model, inputs = make_patched(family, lora_dropout=0.2), make_inputs()
    before = model(**inputs).logits

    def fail(module, args, output):
        raise error("stop")

    handle = layers_of(model, family)[1].get_submodule(getattr(family, part)).register_forward_hook(fail)
    with pytest.raises(error):
        model.train()(**inputs)
    assert captured(model) == []
    handle.remove()
    assert torch.equal(before, model.eval()(**inputs).logits)


@reentrancy
def test_nothing_is_held_after_an_exception_in_the_recompute(use_reentrant):
    family = FAMILIES["llama"]
    model = turn_on(make_patched(family), family, use_reentrant)
    loss = loss_of(model, make_inputs())

    def fail(module, args, output):
        raise ValueError("stop")

    # Early enough in the layer: non-reentrant recomputes stop once they have what was saved.
    handle = model.model.layers[1].post_attention_layernorm.register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        loss.backward()
    handle.remove()
    assert captured(model) == []
    _, gradients = loss_and_gradients(model, make_inputs())
    assert_gradients_close(gradients, without_checkpointing("llama", 1)[1])


def test_inner_model_can_be_called_alone():
    """The stack is the base model: heads and wrappers around it are not needed for the carrier."""
    model, inputs = make_patched("llama"), make_inputs()
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    found = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(found, expected)


# ---- OPT's layerdrop ----

SKIPPED = {"none": (), "first": (0,), "middle": (1,), "last": (2,), "first_two": (0, 1), "last_two": (1, 2)}


def skip(monkeypatch, layers) -> None:
    """Let torch.rand decide, as OPT's decoder does once for every layer, that ``layers`` are skipped."""
    real, draws = torch.rand, itertools.cycle([0.0 if i in layers else 1.0 for i in range(LAYERS)])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: real(*size, **options) * 0 + next(draws)
                        if size == ([],) else real(*size, **options))


def make_dropping(name: str) -> nn.Module:
    model = make_model(name, torch.float64).train()
    model.model.decoder.layerdrop = model.config.layerdrop = 0.5
    return model


@pytest.mark.parametrize("name", ["opt_norm_first", "opt_norm_last"])
@pytest.mark.parametrize("skipped", SKIPPED.values(), ids=SKIPPED)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_layerdrop_equals_the_eager_twin(monkeypatch, name, skipped, checkpointing):
    family = FAMILIES[name]
    base, model = make_dropping(name), patch(make_dropping(name))
    if checkpointing is not None:
        turn_on(model, family, checkpointing)
    calls = Calls(model, family)
    twin = EagerTwin(base, model, family)
    skip(monkeypatch, skipped)
    with torch.no_grad():
        model(**make_inputs())
    assert calls.counts == [0 if i in skipped else 1 for i in range(LAYERS)]
    losses, gradients = loss_and_gradients(model, make_inputs())
    expected_losses, expected = twin.loss_and_gradients(make_inputs())
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert_gradients_close(gradients, expected, may_be_zero=True)
    for i in range(1, LAYERS):
        gradient = gradients[f"{family.layers}.{i}.shortcut_ffn.lora_A"]
        is_off = i in skipped or i - 1 in skipped
        assert (gradient is None or not gradient.any()) == is_off
    assert captured(model) == []


def test_layerdrop_by_chance_runs():
    model = patch(make_dropping("opt_norm_first"))
    torch.manual_seed(0)
    for _ in range(8):
        loss = loss_of(model, make_inputs())
        assert torch.isfinite(loss)
        if loss.requires_grad:  # not where every layer was skipped
            loss.backward()
    assert captured(model) == []
