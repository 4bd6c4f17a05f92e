"""Ctrl-C at any moment of a public call: the state is the one before or the one after, and the call can be repeated."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings

import pytest
import torch
from families import make_inputs, make_model, patch
from faults import difference, state_of_everything
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.undo import keeps_modes

#: Interrupts of each call.
COUNT = 30 * int(os.environ.get("FUZZ_EFFORT", "1"))


def plain() -> tuple:
    return (make_model("llama"),)


def patched() -> tuple:
    return (patch(make_model("llama"), shortcuts=()),)


def changed() -> tuple:
    model, = patched()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(2.0)
    return (model,)


def searching() -> tuple:
    model = patch(make_model("llama"), shortcuts="all", search="dynamic", interval=1, budget=0.5)
    search = hlk.RankSearch(model)
    search.start()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            model(**make_inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            search.step()
        model(**make_inputs()).loss.backward()
        optimizer.step()
    return model, search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    hlk.save_adapter(*patched(), folder)
    return folder


def apply(model: nn.Module) -> None:
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=3, search="off"))


def ranks(model: nn.Module, search) -> None:
    search.apply({name: index % 3 for index, name in enumerate(search.paths)})


CALLS = {
    "apply": (plain, lambda folder: apply), "remove": (patched, lambda folder: hlk.remove_heterolora),
    "load": (plain, lambda folder: lambda model: hlk.load_adapter(model, folder)),
    "load_patched": (changed, lambda folder: lambda model: hlk.load_adapter(model, folder)),
    "step": (searching, lambda folder: lambda model, search: search.step()), "ranks": (searching, lambda folder: ranks),
    "merge": (patched, lambda folder: hlk.merge_heterolora),
}


def summary(model: nn.Module, search=None) -> dict:
    """What has to be wholly the one or the other; objects by what they hold, so that two runs can be compared."""
    state = model.__dict__.get("_heterolora_state")
    found = {"types": [(name, type(m).__qualname__, hasattr(type(m), "_heterolora_key"), sorted(m.__dict__)) for name, m in
                       model.named_modules()],
             "tensors": {name: (t.detach().clone(), t.requires_grad) for name, t in (
                 *model.named_parameters(remove_duplicate=False), *model.named_buffers())},
             "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]}
    if state is not None:
        found["patch"] = [sorted(state.paths), state.switches.enabled, state.step_hooks.pending_resets(), state.step_hooks.driven]
    if search is not None:
        found["search"] = search.state_dict()
    return found


def interrupted(call, subjects: tuple, after: float) -> bool:
    """Whether SIGALRM, which stands for SIGINT, came in time."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*subjects)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


@pytest.mark.parametrize("name", CALLS)
def test_wholly_before_or_wholly_after(name, folder):
    make, call_of = CALLS[name]
    call, moments = call_of(folder), random.Random(name)
    subjects = make()
    before, begun = summary(*subjects), time.perf_counter()
    call(*subjects)
    duration, after = time.perf_counter() - begun, summary(*subjects)
    assert difference(before, after)
    came, neither = 0, []
    for _ in range(COUNT):
        subjects = make()
        came += interrupted(call, subjects, max(1e-5, moments.random() * duration * 1.2))
        assert torch.is_grad_enabled()
        found = summary(*subjects)
        is_before, is_after = (difference(found, each) is None for each in (before, after))
        if not is_before and not is_after:
            neither.append((difference(found, before), difference(found, after)))
        if is_before:
            # Again, and it is done: once.
            call(*subjects)
            assert difference(summary(*subjects), after) is None
    assert came > COUNT // 4
    assert neither == []


def test_autograd_is_put_back():
    calls = []

    @keeps_modes
    @torch.no_grad()
    def fails():
        calls.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(True)
        raise KeyboardInterrupt

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            with pytest.raises(KeyboardInterrupt):
                fails()
            assert torch.is_grad_enabled() is mode
    assert calls == [False, False]


def test_nothing_of_a_model_hangs_on_the_summary():
    model, search = searching()
    assert difference(state_of_everything(model, search), state_of_everything(model, search)) is None
