"""What optimizers may not touch, bit for bit; and the hooks that see to it."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from helpers_search import (
    NET_PATHS,
    Net,
    adapter,
    caught,
    fill_B,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    train_step,
    trainable,
)
from torch import nn
from torch.optim import optimizer as torch_optimizer
from transformers.optimization import Adafactor

import heterolora_kernels as hlk
from heterolora_kernels.freezing import remove_orphans

STEPS = 20
ELEMENTWISE = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, weight_decay=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
}
WHOLE = {**ELEMENTWISE, "adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, weight_decay=0.1,
                                                         beta1=0.9)}
HALF = [True, False, False, True]


def by_id(optimizers):
    return pytest.mark.parametrize("make_optimizer", [pytest.param(make, id=name) for name, make in optimizers.items()])


def frozen(value):
    """A copy that compares by bits."""
    return value.detach().clone().numpy().tobytes() if isinstance(value, torch.Tensor) else value


def bits_of(optimizer, *parameters):
    """Parameters and all that the optimizer keeps for them, step counts included."""
    return [(frozen(p), {key: frozen(value) for key, value in optimizer.state.get(p, {}).items()}) for p in parameters]


def pair(model, path):
    return adapter(model, path).lora_A, adapter(model, path).lora_B


def rows_of(model, optimizer, path, rows):
    """Those rows of lora_A, columns of lora_B, and of their elementwise state."""
    found = []
    for parameter, dim in zip(pair(model, path), (0, 1)):
        state = optimizer.state.get(parameter, {})
        tensors = [parameter, *(v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape)]
        found.append([frozen(tensor.index_select(dim, torch.tensor(rows))) for tensor in tensors])
    return found


def run(model, optimizer, steps=STEPS, first=0, search=None, set_to_none=False):
    for step in range(first, first + steps):
        train_step(model, optimizer, net_batch(step), search, set_to_none)


@by_id(WHOLE)
def test_inactive_path_and_its_state_keep_their_bits(make_optimizer):
    model = make_net(search="off")
    optimizer, search = make_optimizer(trainable(model)), hlk.RankSearch(model)
    run(model, optimizer, 3)
    search.apply({"layers.1": 0})
    before, active = bits_of(optimizer, *pair(model, "layers.1")), bits_of(optimizer, *pair(model, "layers.2"))
    run(model, optimizer, first=3)
    assert bits_of(optimizer, *pair(model, "layers.1")) == before and before[0][1]
    assert all(now[0] != then[0] for now, then in zip(bits_of(optimizer, *pair(model, "layers.2")), active))


@by_id(WHOLE)
def test_path_that_was_never_on_keeps_its_bits(make_optimizer):
    model = make_net(search="off")
    hlk.RankSearch(model).apply({"layers.1": 0})
    optimizer = make_optimizer(trainable(model))
    before = bits_of(optimizer, *pair(model, "layers.1"))
    run(model, optimizer)
    assert bits_of(optimizer, *pair(model, "layers.1")) == before


@by_id(WHOLE)
def test_path_switched_off_between_backward_and_step_keeps_its_bits(make_optimizer):
    model = make_net(search="off")
    optimizer, search = make_optimizer(trainable(model)), hlk.RankSearch(model)
    run(model, optimizer, 3)
    model(**net_batch(4)).loss.backward()
    before = bits_of(optimizer, *pair(model, "layers.1"))
    search.apply({"layers.1": 0})
    optimizer.step()
    assert bits_of(optimizer, *pair(model, "layers.1")) == before


@by_id(WHOLE)
def test_active_paths_train_as_with_the_inactive_ones_left_out(make_optimizer):
    results = []
    for leave_out in (False, True):
        model = make_net(search="off")
        hlk.RankSearch(model).apply({"layers.1": 0})
        held = [p for name, p in model.named_parameters() if p.requires_grad and not (leave_out and "layers.1." in name)]
        optimizer = make_optimizer(held)
        run(model, optimizer)
        results.append(bits_of(optimizer, *pair(model, "layers.0"), *pair(model, "layers.3")))
    assert results[0] == results[1]


@pytest.mark.parametrize("built", ["before-patching", "before-the-search", "after-apply"])
def test_it_does_not_matter_when_the_optimizer_is_built(built):
    torch.manual_seed(0)
    model = Net()
    if built == "before-patching":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    fill_B(hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=4, search="off")))
    if built == "before-patching":
        optimizer.add_param_group({"params": trainable(model)})
    if built == "before-the-search":
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    hlk.RankSearch(model).apply({"layers.1": 0})
    if built == "after-apply":
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    before = bits_of(optimizer, *pair(model, "layers.1"))
    run(model, optimizer)
    assert bits_of(optimizer, *pair(model, "layers.1")) == before


def test_inactive_shortcuts_keep_their_bits():
    model = make_llama(search="off")
    optimizer, search = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1), hlk.RankSearch(model)
    off = [path for path in search.paths if "shortcut_" in path]
    train_step(model, optimizer, llama_batch(0), set_to_none=False)
    search.apply({path: 0 for path in off})
    before = [bits_of(optimizer, *pair(model, path)) for path in off]
    for step in range(STEPS):
        train_step(model, optimizer, llama_batch(step), set_to_none=False)
    assert [bits_of(optimizer, *pair(model, path)) for path in off] == before and len(off) == 3


def test_statistics_of_inactive_paths_do_not_train_them():
    model = make_net(interval=50, num_batches=50, warmup=0)
    optimizer, search = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1), hlk.RankSearch(model)
    search.start()
    run(model, optimizer, 3, search=search)
    search.apply({"layers.1": 0, "layers.2": HALF})
    whole, rows = bits_of(optimizer, *pair(model, "layers.1")), rows_of(model, optimizer, "layers.2", [1, 2])
    run(model, optimizer, first=3, search=search)
    assert (bits_of(optimizer, *pair(model, "layers.1")), rows_of(model, optimizer, "layers.2", [1, 2])) == (whole, rows)


def test_path_that_is_switched_on_again_goes_on_where_it_stopped():
    model = make_net(search="off")
    optimizer, search = torch.optim.AdamW(trainable(model), lr=0.01), hlk.RankSearch(model)
    run(model, optimizer, 3)
    search.apply({"layers.1": 0})
    run(model, optimizer, 5, first=3)
    search.apply({"layers.1": 4})
    run(model, optimizer, 2, first=8)
    assert [int(optimizer.state[pair(model, path)[0]]["step"]) for path in ("layers.1", "layers.2")] == [5, 10]


@by_id(ELEMENTWISE)
@pytest.mark.parametrize("warm", [3, 0], ids=["state-exists", "state-is-made"])
def test_inactive_rows_and_their_state_keep_their_bits(make_optimizer, warm):
    model = make_net(search="off")
    optimizer, search = make_optimizer(trainable(model)), hlk.RankSearch(model)
    run(model, optimizer, warm)
    search.apply({"layers.1": HALF})
    # Where the first step makes the state, the rows are those after that step.
    run(model, optimizer, 0 if warm else 1, first=warm)
    inactive, active = rows_of(model, optimizer, "layers.1", [1, 2]), rows_of(model, optimizer, "layers.1", [0, 3])
    run(model, optimizer, first=warm + 1)
    assert rows_of(model, optimizer, "layers.1", [1, 2]) == inactive and len(inactive[0]) > 1
    assert all(now[0] != then[0] for now, then in zip(rows_of(model, optimizer, "layers.1", [0, 3]), active))


@by_id(WHOLE)
def test_inactive_rows_keep_their_weights(make_optimizer):
    model = make_net(search="off")
    optimizer, search = make_optimizer(trainable(model)), hlk.RankSearch(model)
    search.apply({"layers.1": HALF})
    before = [pair(model, "layers.1")[0][1:3].clone(), pair(model, "layers.1")[1][:, 1:3].clone()]
    run(model, optimizer)
    assert torch.equal(pair(model, "layers.1")[0][1:3], before[0])
    assert torch.equal(pair(model, "layers.1")[1][:, 1:3], before[1])


def test_state_of_inactive_rows_begins_at_zero():
    model = make_net(search="off")
    optimizer = torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9, weight_decay=0.1)
    hlk.RankSearch(model).apply({"layers.1": HALF})
    run(model, optimizer, 2)
    lora_A, lora_B = (optimizer.state[p]["momentum_buffer"] for p in pair(model, "layers.1"))
    assert not lora_A[1:3].any() and not lora_B[:, 1:3].any() and lora_A[0].all() and lora_B[:, 3].all()


def test_rows_switched_off_between_backward_and_step_keep_their_bits():
    model = make_net(search="off")
    optimizer, search = torch.optim.AdamW(trainable(model), lr=0.01), hlk.RankSearch(model)
    run(model, optimizer, 3)
    model(**net_batch(4)).loss.backward()
    before = rows_of(model, optimizer, "layers.1", [1, 2])
    search.apply({"layers.1": HALF})
    optimizer.step()
    assert rows_of(model, optimizer, "layers.1", [1, 2]) == before


def make_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(**net_batch(0)).loss
        loss.backward()
        return loss
    return closure


@pytest.mark.parametrize("rank", [0, HALF], ids=["whole-path", "rows"])
@pytest.mark.parametrize("as_keyword", [False, True], ids=["positional", "keyword"])
def test_a_closure_that_is_called_again_raises_with_an_inactive_path(as_keyword, rank):
    model = make_net(search="off")
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=2)
    hlk.RankSearch(model).apply({"layers.2": rank})
    before = bits_of(optimizer, *trainable(model))
    closure = make_closure(model, optimizer)
    with pytest.raises(RuntimeError, match=r"LBFGS.*closure.*layers\.2"):
        optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert bits_of(optimizer, *trainable(model)) == before


class Again(torch.optim.SGD):
    """Calls its closure twice, as nobody would guess."""

    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


def test_any_optimizer_that_calls_again_is_stopped():
    model = make_net(search="off")
    optimizer = Again(trainable(model), lr=0.1)
    hlk.RankSearch(model).apply({"layers.2": 0})
    before = bits_of(optimizer, *pair(model, "layers.2"))
    with pytest.raises(RuntimeError, match=r"Again.*closure more than once.*layers\.2"):
        optimizer.step(make_closure(model, optimizer))
    assert bits_of(optimizer, *pair(model, "layers.2")) == before


@pytest.mark.parametrize("rank", [0, HALF], ids=["whole-path", "rows"])
@pytest.mark.parametrize("as_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), lambda p: torch.optim.SGD(
    p, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_a_closure_that_is_called_once_trains_as_a_plain_step(make, as_keyword, rank):
    results = []
    for closed in (True, False):
        model = make_net(interval=1, budget=0.5)
        optimizer, search = make(trainable(model)), None
        search = hlk.RankSearch(model)
        search.start()
        search.apply({"layers.2": rank})
        off = bits_of(optimizer, *pair(model, "layers.2")) if rank == 0 else None
        for _ in range(3):
            closure = make_closure(model, optimizer)
            if not closed:
                closure()
            optimizer.step(**({"closure": closure} if as_keyword else {})) if as_keyword and closed else optimizer.step(
                *((closure,) if closed else ()))
        assert off is None or bits_of(optimizer, *pair(model, "layers.2")) == off
        results.append(bits_of(optimizer, *trainable(model)))
    assert results[0] == results[1]


class Averaging(torch.optim.Optimizer):
    """Slow weights every other step (Lookahead): moves what has no gradient."""

    def __init__(self, inner):
        self.inner, self.taken = inner, 0
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.taken += 1
        if self.taken % 2 == 0:
            for parameter, slow in self.slow.items():
                parameter.copy_(slow.lerp_(parameter, 0.5))


@pytest.mark.parametrize("rank", [0, HALF], ids=["whole-path", "rows"])
def test_rank_0_stays_behind_an_optimizer_that_averages(rank):
    model = make_net(interval=2, budget=0.5)
    optimizer = Averaging(torch.optim.AdamW(trainable(model), lr=0.05))
    search = hlk.RankSearch(model)
    search.start()
    for index in range(6):
        search.apply({"layers.2": rank if index >= 2 else HALF})
        before = [p.detach().clone() for p in pair(model, "layers.2")]
        model(**net_batch(index)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if index >= 2:
            on = model.layers[2].lora_mask
            assert torch.equal(model.layers[2].lora_A[~on], before[0][~on]) and torch.equal(model.layers[2].lora_B[:, ~on],
                                                                                           before[1][:, ~on])
    assert hlk.state.state_of(model).step_hooks.steps == 6


def test_two_optimizers_make_one_step_of_the_ledger():
    counted = []
    for split in (False, True):
        model = make_net(interval=4, budget=0.5, warmup=0, num_batches=3)
        kinds = [[p for n, p in model.named_parameters() if n.endswith(leaf)] for leaf in ("lora_A", "lora_B")]
        optimizers = [torch.optim.AdamW(kind, lr=0.01) for kind in kinds] if split else [
            torch.optim.AdamW([{"params": kind} for kind in kinds], lr=0.01)]
        search = hlk.RankSearch(model)
        search.start()
        for index in range(8):
            model(**net_batch(index)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            search.step()
        counted.append([(entry["batches"], entry["ranks"], entry["scores"]) for entry in search.history])
        assert hlk.state.state_of(model).step_hooks.steps == 8
    assert counted[0] == counted[1] and counted[0][-1][0] == 3


def test_an_averaged_copy_keeps_its_ranks():
    model = make_net(search="off")
    search, optimizer = hlk.RankSearch(model), torch.optim.SGD(trainable(model), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    search.apply({"layers.2": 0})
    before = [p.detach().clone() for p in pair(model, "layers.2")]
    for index in range(3):
        model(**net_batch(index)).loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(pair(averaged.module, "layers.2"), before))
    assert not bool(averaged.module.layers[2].lora_mask.any())
    expected = averaged.module(**net_batch(0)).loss
    with torch.no_grad():
        averaged.module.layers[2].lora_B.add_(1.0)
    assert torch.equal(averaged.module(**net_batch(0)).loss, expected)


def test_closure_with_everything_on_trains():
    model = make_net(search="off")
    hlk.RankSearch(model)
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=4)
    first = optimizer.step(make_closure(model, optimizer))
    assert model(**net_batch(0)).loss < first


def test_two_models_in_one_optimizer_do_not_disturb_each_other():
    models = [make_net(weights, search="off") for weights in range(2)]
    searches = [hlk.RankSearch(model) for model in models]
    optimizer = torch.optim.AdamW([p for model in models for p in trainable(model)], lr=0.01, weight_decay=0.1)
    searches[0].apply({"layers.1": 0})
    searches[1].apply({"layers.2": 0, "layers.3": HALF})
    off = [*pair(models[0], "layers.1"), *pair(models[1], "layers.2")]
    before = bits_of(optimizer, *off)
    others = bits_of(optimizer, *pair(models[1], "layers.1"), *pair(models[0], "layers.2"), *pair(models[0], "layers.3"))
    for step in range(5):
        optimizer.zero_grad(set_to_none=False)
        sum(model(**net_batch(step)).loss for model in models).backward()
        optimizer.step()
    now = bits_of(optimizer, *pair(models[1], "layers.1"), *pair(models[0], "layers.2"), *pair(models[0], "layers.3"))
    assert bits_of(optimizer, *off) == before and all(a[0] != b[0] for a, b in zip(now, others))


def test_a_step_of_another_models_optimizer_leaves_half_accumulated_gradients():
    model, other = make_net(search="off"), make_net(search="off")
    hlk.RankSearch(model).apply({"layers.1": 0})
    model(**net_batch(0)).loss.backward()
    grads = [p.grad for p in trainable(model)]
    run(other, torch.optim.SGD(trainable(other), lr=0.1), 2)
    assert all(p.grad is grad for p, grad in zip(trainable(model), grads))


def test_models_side_by_side_train_as_alone():
    def trained(beside):
        model = make_net(search="off")
        search, optimizer = hlk.RankSearch(model), torch.optim.AdamW(trainable(model), lr=0.01)
        search.apply({"layers.1": 0, "layers.2": HALF})
        other = make_net(1, search="off") if beside else None
        other_optimizer = torch.optim.AdamW(trainable(other), lr=0.01) if beside else None
        for step in range(5):
            run(model, optimizer, 1, first=step)
            if beside:
                hlk.RankSearch(other).apply({"layers.2": 0})
                run(other, other_optimizer, 1, first=step)
        return bits_of(optimizer, *trainable(model))

    assert trained(beside=False) == trained(beside=True)


@pytest.mark.parametrize("on_reactivate", ["keep", "reset"])
def test_the_hooks_take_time_in_proportion_to_the_paths(on_reactivate):
    def calls(count):
        model = hlk.apply_heterolora(nn.Sequential(*(nn.Linear(2, 2) for _ in range(count))),
                                     hlk.HeteroLoraConfig(r=1, on_reactivate=on_reactivate))
        search, optimizer, seen = hlk.RankSearch(model), torch.optim.SGD(trainable(model), lr=0.1), []
        for rank in (0, 1):
            search.apply(dict.fromkeys(search.paths, rank))
        sys.setprofile(lambda *event: seen.append(1))
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return len(seen)

    assert calls(40) < 2.5 * calls(20)


def hook_counts():
    gc.collect()
    remove_orphans()
    return len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)


def test_a_patched_model_has_one_hook_of_each_kind():
    before = hook_counts()
    model = make_net()
    assert hook_counts() == (before[0] + 1, before[1] + 1) and model is not None


def test_hooks_are_gone_after_remove():
    before = hook_counts()
    model = make_net()
    search = hlk.RankSearch(model)
    hlk.remove_heterolora(model)
    assert hook_counts() == before and search is not None


def test_hooks_are_gone_when_the_model_is():
    before = hook_counts()
    model = make_net(interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    search = hlk.RankSearch(model, optimizer)
    run(model, optimizer, 2, search=search)
    del model, optimizer, search
    assert hook_counts() == before


def test_a_model_may_go_while_an_optimizer_steps():
    """The garbage collector runs when it likes, also while torch walks through the hooks."""
    model, before = make_net(search="off"), hook_counts()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def collect(*args):
        gc.collect()

    hook = torch_optimizer.register_optimizer_step_pre_hook(collect)
    dead = make_net(search="off")
    dead.cycle, gone = dead, weakref.ref(dead)
    del dead
    try:
        run(model, optimizer, 1)
    finally:
        hook.remove()
    assert gone() is None and hook_counts() == before


def test_hooks_are_gone_when_patching_fails():
    before = hook_counts()
    model = Net()
    with pytest.raises(ValueError):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig(shortcuts="all"))
    assert hook_counts() == before


def test_optimizer_trains_everything_again_after_remove():
    model = make_net(search="off")
    hlk.RankSearch(model).apply({path: 0 for path in NET_PATHS})
    hlk.remove_heterolora(model)
    weights = [layer.weight for layer in model.layers]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    before = bits_of(optimizer, *weights)
    run(model, optimizer, 1)
    assert all(now[0] != then[0] for now, then in zip(bits_of(optimizer, *weights), before))


def test_deepcopy_has_hooks_of_its_own():
    before = hook_counts()
    model = make_net(search="off")
    twin = copy.deepcopy(model)
    assert hook_counts() == (before[0] + 2, before[1] + 2) and twin is not None
    del model
    assert hook_counts() == (before[0] + 1, before[1] + 1)


def test_deepcopy_freezes_by_its_own_masks_after_the_original_is_gone():
    model = make_net(search="off")
    hlk.RankSearch(model).apply({"layers.1": 0})
    twin = copy.deepcopy(model)
    hlk.RankSearch(twin).apply({"layers.1": 4, "layers.2": 0})
    del model
    gc.collect()
    optimizer = torch.optim.AdamW(trainable(twin), lr=0.01, weight_decay=0.1)
    before = bits_of(optimizer, *pair(twin, "layers.1"), *pair(twin, "layers.2"))
    run(twin, optimizer, 3)
    now = bits_of(optimizer, *pair(twin, "layers.1"), *pair(twin, "layers.2"))
    assert [a[0] == b[0] for a, b in zip(now, before)] == [False, False, True, True]


def test_deepcopy_and_original_do_not_share_ranks():
    model = make_net(search="off")
    search = hlk.RankSearch(model)
    search.apply({"layers.1": 0})
    assert search.ranks["layers.1"] == 0
    twin = hlk.RankSearch(copy.deepcopy(model))
    twin.apply({"layers.1": 3})
    assert (search.ranks["layers.1"], twin.ranks["layers.1"]) == (0, 3)


def test_deepcopy_does_not_remember_the_originals_rows():
    model = make_net(search="off")
    search = hlk.RankSearch(model)
    search.apply({"layers.1": 0})
    assert search.ranks["layers.1"] == 0
    # A search puts everything on; the copy's buffers have seen as many writes by then as the original's had.
    assert hlk.RankSearch(copy.deepcopy(model)).ranks["layers.1"] == 4


@pytest.mark.parametrize("config, steps, count", [
    pytest.param({}, 120, 1, id="once"),
    pytest.param({}, 49, 0, id="not-before-50"),
    pytest.param({}, 50, 1, id="at-50"),
    pytest.param({"search": "static"}, 60, 1, id="static"),
    pytest.param({"search": "off"}, 60, 0, id="off"),
])
def test_search_that_nobody_drives_is_reported(config, steps, count):
    model = make_net(**config)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    messages = caught(lambda: run(model, optimizer, steps))
    missed = "search.start()" if config.get("search") == "static" else "search.step()"
    assert len([m for m in messages if "HeteroLoraCallback" in m and missed in m]) == len(messages) == count


def test_search_that_is_stepped_is_not_reported():
    model = make_net(interval=20)
    optimizer, search = torch.optim.SGD(trainable(model), lr=0.01), hlk.RankSearch(model)
    assert caught(lambda: run(model, optimizer, 60, search=search)) == []


def test_steps_of_other_optimizers_are_not_counted():
    model, other = make_net(), make_net(search="off")
    optimizer = torch.optim.SGD(trainable(other), lr=0.0)
    assert caught(lambda: run(other, optimizer, 60)) == [] and model is not None
