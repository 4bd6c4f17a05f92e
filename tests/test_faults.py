"""A failure at any line, an interrupt or a lack of memory, leaves the model, the search and the folder as they were."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from faults import difference, fail_everywhere, state_of_everything
from helpers_search import Net, fill_B, llama_batch, make_llama, make_net, net_batch, plain_llama
from test_atomic import contents
from torch import nn
from transformers.utils import logging

import heterolora_kernels as hlk
from heterolora_kernels.undo import put_back, structure_of, undone_on_failure, values_of


class Folder:
    """A folder as one of the things that must be as before."""

    def __init__(self, path):
        self.path = path

    def state_dict(self) -> dict:
        return contents(self.path.parent)


def assert_atomic(make, action, **options) -> None:
    failed, wrong = fail_everywhere(make, action, **options)
    assert failed > 20 and not wrong, "\n".join(wrong)


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return model


def make_patched_llama(**config) -> nn.Module:
    return with_gradients(make_llama(search="off", **config))


# ---- patching ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter in each format that can be loaded, of the Llama and of the Net."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_llama(shortcuts=("residual_1", "shortcut_ffn"))
    hlk.save_adapter(model, folder / "native", search=hlk.RankSearch(model))
    hlk.save_adapter(make_net(search="off"), folder / "peft", "peft")
    return folder


def test_apply(saved):
    config = hlk.HeteroLoraConfig(r=2, shortcuts="all", shortcut_r=2, lora_dropout=0.1)
    assert_atomic(lambda: (plain_llama(),), lambda model: hlk.apply_heterolora(model, config), share=0.2)


def test_apply_with_an_adapter_to_begin_with(saved):
    config = hlk.HeteroLoraConfig(r=2, init_from=saved / "peft", search="off")
    assert_atomic(lambda: (Net(),), lambda model: hlk.apply_heterolora(model, config), share=0.5)


def test_remove():
    assert_atomic(lambda: (make_patched_llama(lora_dropout=0.1),), hlk.remove_heterolora, share=0.5)


def test_merge_is_done_as_a_whole_or_not_at_all():
    merged = {name: value.clone() for name, value in hlk.merge_heterolora(make_net(search="off")).state_dict().items()}
    outcomes = set()

    def is_done(model) -> bool:
        outcomes.add(type(model.layers[0]) is nn.Linear)
        return "_heterolora_state" not in model.__dict__ and difference(merged, dict(model.state_dict())) is None

    assert_atomic(lambda: (with_gradients(make_net(search="off")),), hlk.merge_heterolora, is_done=is_done)
    assert outcomes == {True}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("format", ["native", "peft"])
def test_load(patched, format, saved):
    shortcuts = ("residual_1", "shortcut_ffn")

    def make():
        if format == "peft":
            return (with_gradients(make_net(search="off")) if patched else Net(),)
        if not patched:
            return (plain_llama(),)
        model = with_gradients(fill_B(make_llama(shortcuts=shortcuts), seed=8))
        search = hlk.RankSearch(model)
        search.apply({search.paths[0]: 1})
        return model, search

    def load(model, search=None):
        hlk.load_adapter(model, saved / format, search=search)

    subjects = make()
    load(*subjects)
    loaded = [each.state_dict() for each in subjects]

    def is_done(*subjects) -> bool:
        return difference(loaded, [each.state_dict() for each in subjects]) is None

    assert_atomic(make, load, share=0.1 if format == "native" else 0.3, is_done=is_done)


@pytest.mark.parametrize("format", ["native", "peft", "vllm", "merged"])
def test_save(format, tmp_path):
    logging.disable_progress_bar()
    folder = Folder(tmp_path / "adapter")
    hlk.save_adapter(make_net(search="off"), folder.path)

    def make():
        model = make_llama(shortcuts=(), layers=1)
        search = hlk.RankSearch(model)
        search.apply({search.paths[0]: 1, search.paths[1]: 0})
        return with_gradients(model), search, folder

    def save(model, search, folder):
        hlk.save_adapter(model, folder.path, format, search=search if format == "native" else None)

    before = folder.state_dict()

    def is_done(*subjects) -> bool:
        # The new folder stood in its place already: each run replaces it again.
        now = folder.state_dict()
        return now != before and not any("/" not in name and name.startswith(".") for name in now)

    # A first save fills the folder; what failed later leaves what it wrote, whole.
    assert_atomic(make, save, share=0.4, is_done=is_done)


# ---- searching ----


def searching(started: bool, **config):
    def make():
        model = make_net(**config).eval()
        with_gradients(model)
        search = hlk.RankSearch(model, dataloader=[net_batch(i) for i in range(3)])
        if started:
            search.start()
            for _ in range(3):
                search.step()
        torch.manual_seed(5)
        random.seed(5)
        return model, search
    return make


ALLOCATIONS = {
    "static": (False, dict(search="static", score="probe"), hlk.RankSearch.start),
    "first": (False, dict(on_reactivate="reset"), hlk.RankSearch.start),
    "warmup": (True, dict(on_reactivate="reset", warmup=9), hlk.RankSearch.step),
    "probe": (True, dict(score="probe", warmup=1, score_decay=0.5, hysteresis=0.1, on_reactivate="reset"), hlk.RankSearch.step),
    "graded": (True, dict(score="probe", warmup=1, ranks="graded"), hlk.RankSearch.step),
    "counts": (True, dict(interval=9, warmup=9), hlk.RankSearch.step),
    "window_opens": (False, dict(warmup=0, interval=1), hlk.RankSearch.start),
}


@pytest.mark.parametrize("case", ALLOCATIONS)
def test_reallocation(case):
    started, config, action = ALLOCATIONS[case]
    share = 0.2 if config.get("score") == "probe" else 1.0
    assert_atomic(searching(started, **config), lambda model, search: action(search), share=share)


def test_reallocation_from_the_statistics_of_training():
    def make():
        model = make_net(warmup=0, interval=2, num_batches=2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        search = hlk.RankSearch(model, optimizer)
        search.start()
        for step in range(2):
            model(**net_batch(step)).loss.backward()
            optimizer.step()
            if step == 0:
                search.step()
        assert search._window.steps == 2
        return model, search

    assert_atomic(make, lambda model, search: search.step())


@pytest.mark.parametrize("proxy", ["grad_norm", "fisher", "synflow"])
def test_scoring(proxy):
    assert_atomic(searching(True, mode="combined"), lambda model, search: search.score(proxy=proxy, score="probe"), share=0.3)


def test_ranks_by_hand_and_by_a_state():
    make = searching(False, on_reactivate="reset", score="probe", warmup=1)
    assert_atomic(make, lambda model, search: search.apply({name: 1 for name in search.paths}))
    _, other = searching(True, on_reactivate="reset", score="probe", warmup=1)()
    state = other.state_dict()
    assert_atomic(make, lambda model, search: search.load_state_dict(state))


def test_a_step_that_failed_can_be_taken_again():
    batches = [net_batch(0)]
    models = make_net(score="probe", warmup=1), make_net(score="probe", warmup=1)
    search, broken = (hlk.RankSearch(model, dataloader=batches) for model in models)
    for each in (search, broken):
        each.start()
        for _ in range(3):
            each.step()
    target, before = batches[0]["target"], state_of_everything(models[1], broken)
    batches[0]["target"] = target * float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.step()
    assert difference(before, state_of_everything(models[1], broken)) is None
    batches[0]["target"] = target
    assert search.step() and broken.step()
    assert difference(search.state_dict(), broken.state_dict()) is None


def test_a_forward_that_is_interrupted_holds_nothing():
    model = make_llama()

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**llama_batch(0))
    handle.remove()
    for layer in model.model.layers:
        state = layer._heterolora
        assert not any(vars(state._running.now()).values())
        assert state.carrier._running.now().f is None and all(not group.layer.now().turns for group in state.groups)
    torch.testing.assert_close(model(**llama_batch(0)).loss, make_llama()(**llama_batch(0)).loss)


# ---- what puts things back ----


@pytest.mark.parametrize("body_fails", [False, True], ids=["well", "failure"])
@pytest.mark.parametrize("context", [put_back, undone_on_failure])
def test_undo_runs_once_and_again_if_it_is_interrupted(context, body_fails):
    calls = []

    def undo():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if body_fails or context is put_back else nullcontext(), context(undo):
        if body_fails:
            raise MemoryError
    assert len(calls) == (2 if body_fails or context is put_back else 0)


def test_structure_and_values_come_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before, structure, values = state_of_everything(model), structure_of(model), values_of(model.state_dict().values())
    model[0].register_forward_hook(print)
    model[0].weight.requires_grad_(False)
    model[1].extra, model[0].__class__ = 3, type("Other", (nn.Linear,), {})
    model[0].weight.data.add_(1)
    model[0].register_parameter("more", nn.Parameter(torch.ones(2)))
    model[1].running_mean = torch.ones(3)
    del model[1].eps
    assert difference(before, state_of_everything(model)) is not None
    structure()
    values()
    assert difference(before, state_of_everything(model)) is None
