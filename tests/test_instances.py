"""Instances whose class was changed: what others see of them, copies, pickles, accelerate's hooks."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import accelerate
import pytest
import torch
from families import (
    assert_gradients_close,
    assert_restored,
    layers_of,
    loss_and_gradients,
    make_inputs,
    make_model,
    make_patched,
    patch,
    reference_backend,  # noqa: F401
    snapshot,
)
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.instances import check_swappable, generated_class, is_swapped, restore_class, swap_class

FEW = pytest.mark.parametrize("name", ["llama", "gemma2", "opt_norm_first", "gpt2", "bert"])


class Doubles:
    """A mixin for the tests."""

    def patched_forward(self, base_forward, *args, **kwargs):
        return 2 * base_forward(self, *args, **kwargs)


class Base(nn.Module):
    """The base's docstring."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x, *, scale: float = 1.0):
        return x * self.weight * scale


def save_and_load(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load, lambda m: pickle.loads(pickle.dumps(m))],
                                 ids=["deepcopy", "torch_save", "pickle"])


# ---- the generated class ----


def test_generated_class_looks_like_its_base():
    cls = generated_class(Doubles, Base)
    assert cls is not Base and issubclass(cls, Base)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, attribute) == getattr(Base, attribute)
    assert inspect.signature(cls.forward) == inspect.signature(Base.forward)
    assert generated_class(Doubles, Base) is cls


@FEW
def test_patched_model_has_the_names_and_signatures_of_the_base(name):
    base, model = make_model(name), make_patched(name, torch.float32)
    modules = dict(model.named_modules())
    changed = 0
    for path, module in base.named_modules():
        found = modules[path]
        changed += is_swapped(found)
        assert isinstance(found, type(module))
        assert (type(found).__name__, type(found).__module__) == (type(module).__name__, type(module).__module__)
        assert inspect.signature(type(found).forward) == inspect.signature(type(module).forward)
    assert changed > len(layers_of(model, name))


def test_swap_and_restore():
    module, x = Base(), torch.ones(3)
    before = snapshot(module)
    check_swappable("module", module)
    swap_class(module, Doubles)
    assert is_swapped(module) and torch.equal(module(x, scale=3.0), 6 * module.weight)
    restore_class(module)
    assert not is_swapped(module) and torch.equal(module(x), module.weight)
    assert_restored(module, before)


def test_other_instances_keep_their_class():
    module, other = Base(), Base()
    swap_class(module, Doubles)
    assert type(other) is Base and torch.equal(other(torch.ones(3)), other.weight)


# ---- copies ----


@FEW
@COPIES
def test_copy_gives_the_same_logits_and_gradients(name, copied):
    model, inputs = make_patched(name), make_inputs()
    _, expected = loss_and_gradients(model, inputs)
    twin = copied(model)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    _, gradients = loss_and_gradients(twin, inputs)
    assert_gradients_close(gradients, expected, tolerance=0.0)


@FEW
@COPIES
def test_copy_is_independent_of_the_original(name, copied):
    model, inputs = make_patched(name), make_inputs()
    before = model(**inputs).logits
    twin = copied(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0)
    loss_and_gradients(twin, inputs)
    optimizer.step()
    with hlk.disable_adapter(twin):
        assert torch.equal(before, model(**inputs).logits)
    assert not torch.equal(before, twin(**inputs).logits)
    hlk.remove_heterolora(model)
    _, gradients = loss_and_gradients(twin, inputs)
    assert all(gradient.any() for gradient in gradients.values())


@FEW
@COPIES
def test_removal_works_on_the_copy(name, copied):
    base, inputs = make_model(name, torch.float64), make_inputs()
    model = make_patched(name)
    before = model(**inputs).logits
    twin = hlk.remove_heterolora(copied(model))
    assert [type(m) for m in twin.modules()] == [type(m) for m in base.modules()]
    assert list(twin.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in twin.parameters())
    assert torch.equal(twin(**inputs).logits, base(**inputs).logits)
    assert torch.equal(before, model(**inputs).logits)


@COPIES
def test_copy_keeps_inactive_paths_frozen(copied):
    model, inputs = make_patched("llama"), make_inputs()
    off = "model.layers.1.mlp.down_proj"
    hlk.RankSearch(model).apply({off: 0})
    twin = copied(model)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    parameters = dict(twin.named_parameters())
    before = parameters[f"{off}.lora_B"].detach().clone()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    loss_and_gradients(twin, inputs)
    parameters[f"{off}.lora_B"].grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(parameters[f"{off}.lora_B"], before)


@COPIES
def test_copy_collects_its_own_statistics(copied):
    model, inputs = make_patched("llama"), make_inputs()
    with hlk.collect_statistics(model) as ledger:
        twin = copied(model)
        with hlk.collect_statistics(twin) as own:
            loss_and_gradients(twin, inputs)
        assert not any(column.any() for columns in ledger.table().values() for column in columns.values())
    assert all(columns["grad_B_sq"].all() for columns in own.table().values())


@COPIES
def test_copy_made_with_statistics_on_after_a_forward(copied):
    model, inputs = make_patched("llama"), make_inputs()
    with hlk.collect_statistics(model):
        loss_and_gradients(model, inputs)
        twin = copied(model)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)


# ---- forwards in the instance ----


def hook_all(model: nn.Module, family: str, how: str) -> nn.Module:
    """Give modules accelerate's hooks, which put a forward into their __dict__."""
    if how == "dispatch":
        return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    for module in [model, *layers_of(model, family), *layers_of(model, family)[1].modules()]:
        if not hasattr(module, "_old_forward"):
            accelerate.hooks.add_hook_to_module(
                module, accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=module is model))
    return model


HOW = pytest.mark.parametrize("how", ["dispatch", "every_module_of_a_layer"])


@FEW
@HOW
def test_model_with_accelerate_hooks_equals_the_unhooked(name, how):
    plain, inputs = make_patched(name), make_inputs()
    model = hook_all(make_model(name, torch.float64), name, how)
    hooked = [module for module in model.modules() if "forward" in module.__dict__]
    assert len(hooked) > 3
    before = model(**inputs).logits
    patch(model, open_B=False)
    assert torch.equal(before, model(**inputs).logits)
    hlk.remove_heterolora(model)
    patch(model)
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    _, expected = loss_and_gradients(plain, inputs)
    _, gradients = loss_and_gradients(model, inputs)
    # A member with a hook of accelerate runs alone, so that gradients of x are summed in another order.
    assert_gradients_close(gradients, expected, tolerance=1e-6 if name in ("llama", "gemma2") else 1e-12)


@FEW
@HOW
def test_removal_restores_accelerate_hooks(name, how):
    model, inputs = hook_all(make_model(name), name, how), make_inputs()
    logits, before = model(**inputs).logits, snapshot(model)
    patch(model)
    model(**inputs)
    hlk.remove_heterolora(model)
    assert_restored(model, before)
    assert torch.equal(logits, model(**inputs).logits)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits, model(**inputs).logits)


@HOW
def test_removal_works_after_accelerate_hooks_came_later(how):
    model, inputs = make_model("llama"), make_inputs()
    logits = model(**inputs).logits
    hook_all(patch(model), "llama", how)
    assert not torch.equal(logits, model(**inputs).logits)
    hlk.remove_heterolora(model)
    assert torch.equal(logits, model(**inputs).logits)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits, model(**inputs).logits)
    assert not any(is_swapped(module) for module in model.modules())
    patch(model)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_with_accelerate_hooks(use_reentrant):
    inputs = make_inputs()
    _, expected = loss_and_gradients(make_patched("llama").train(), inputs)
    model = patch(hook_all(make_model("llama", torch.float64), "llama", "dispatch")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, gradients = loss_and_gradients(model, inputs)
    assert_gradients_close(gradients, expected)


def wrap_forward(module: nn.Module) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    module.forward = forward


@pytest.mark.parametrize("target", ["model.layers.2", "model"])
def test_foreign_forward_in_the_instance_is_refused_by_name(target):
    model = make_model("llama")
    wrap_forward(model.get_submodule(target))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'{target}'".replace(".", r"\.")):
        patch(model)
    assert_restored(model, before)


def test_foreign_forward_elsewhere_does_not_matter():
    model, inputs = make_model("llama"), make_inputs()
    wrap_forward(model.model.norm)
    wrap_forward(model.lm_head)
    before = model(**inputs).logits
    assert torch.equal(before, patch(model, open_B=False)(**inputs).logits)


def test_foreign_forward_on_a_layer_is_refused_with_mask_groups_and_the_model_is_as_before():
    # Without shortcuts layers are patched for their mask groups alone.
    model = make_model("llama")
    wrap_forward(model.model.layers[1])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1"):
        patch(model, shortcuts=(), lora_dropout=0.1)
    assert_restored(model, before)


def test_bound_forward_in_the_instance_is_no_wrapper():
    # transformers 5.0 leaves one on every layer after output_hidden_states=True.
    model, inputs = make_model("llama"), make_inputs()
    for layer in model.model.layers:
        layer.forward = layer.forward
    logits, before = model(**inputs).logits, snapshot(model)
    patch(model, open_B=False)
    assert torch.equal(logits, model(**inputs).logits)
    hlk.remove_heterolora(model)
    assert_restored(model, before)
    assert torch.equal(make_patched("llama", torch.float32)(**inputs).logits, patch(model)(**inputs).logits)


def test_bound_forward_put_there_after_patching_does_not_outlive_the_patch():
    model, inputs = make_model("llama"), make_inputs()
    logits = model(**inputs).logits
    patch(model)
    for layer in model.model.layers:
        layer.forward = layer.forward
    hlk.remove_heterolora(model)
    assert torch.equal(logits, model(**inputs).logits)
    assert torch.equal(make_patched("llama", torch.float32)(**inputs).logits, patch(model)(**inputs).logits)


def test_a_subclass_of_the_generated_class_stays_patched():
    # What FSDP2 does: the instance gets a class derived from the one it has.
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2, init_B="kaiming_uniform"))
    x = torch.randn(4, 3)
    expected = model(x)
    model[0].__class__ = type("FSDPLinear", (type(model[0]),), {})
    assert torch.equal(model(x), expected)
    with hlk.disable_adapter(model):
        assert not torch.equal(model(x), expected)


def test_data_parallel_is_refused_with_what_to_use_instead():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()


def test_a_printed_model_shows_its_paths_and_their_active_rows():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2))
    hlk.RankSearch(model).apply({"0": 1})
    assert "Linear(in_features=3, out_features=2, bias=True, lora=1/2)" in repr(model)
