"""RankSearch: when it reallocates, what it collects, what it remembers. Scores: test_scoring and test_proxies."""

import gc
import io
import json

import pytest
import torch
from helpers_search import (
    NET_PATHS,
    adapter,
    build,
    fill_B,
    is_collecting,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    same_bits,
    snapshot,
    train,
    train_step,
    trainable,
)
from torch.utils._python_dispatch import TorchDispatchMode

import heterolora_kernels as hlk
from heterolora_kernels.layers import Path


def mask_of(model, path):
    return adapter(model, path).lora_mask.tolist()


def on(ranks):
    return {path for path, rank in ranks.items() if rank}


LOADER = tuple(net_batch(seed) for seed in range(3))


@pytest.mark.parametrize("score", ["probe", "in_step"])
def test_dynamic_loop_reallocates_at_every_interval(score):
    model, optimizer, search = build(dataloader=LOADER, score=score, interval=3, warmup=1)
    search.start()
    train(model, optimizer, search, 10)
    assert [entry["step"] for entry in search.history] == [0, 3, 6, 9]


@pytest.mark.parametrize("score, expected", [("probe", ("probe", "exact", 3)), ("in_step", ("in_step", "streaming", 2))])
def test_history_says_what_the_scores_were_made_from(score, expected):
    model, optimizer, search = build(dataloader=LOADER, score=score, interval=2, warmup=1)
    search.start()
    train(model, optimizer, search, 2)
    last = search.history[-1]
    assert (last["score"], last["statistics"], last["batches"]) == expected


@pytest.mark.parametrize("score", ["probe", "in_step"])
def test_reallocation_keeps_the_best_scores(score):
    model, optimizer, search = build(dataloader=LOADER, score=score, interval=2, warmup=1)
    train(model, optimizer, search, 2)
    scores = search.history[-1]["scores"]
    assert on(search.ranks) == set(sorted(scores, key=scores.get)[2:])


@pytest.mark.parametrize("score", ["probe", "in_step"])
def test_dynamic_search_on_llama_with_shortcuts_keeps_the_budget(score):
    model = make_llama(layers=2, score=score, interval=2, warmup=1, mode="separated")
    search = hlk.RankSearch(model, dataloader=[llama_batch(0)])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for step in range(4):
        train_step(model, optimizer, llama_batch(step), search)
    shortcuts = {path for path in on(search.ranks) if path.rpartition(".")[2] in hlk.HeteroLoraConfig(shortcuts="all").shortcuts}
    assert (len(search.history), len(on(search.ranks) - shortcuts), len(shortcuts)) == (3, 14 // 4, round(7 / 4))


def test_static_search_allocates_once():
    model, optimizer, search = build(dataloader=LOADER, search="static")
    search.start()
    ranks = search.ranks
    train(model, optimizer, search, 6)
    assert len(search.history) == 1 and search.ranks == ranks and sorted(ranks.values()) == [0, 0, 4, 4]


def test_static_search_has_no_warmup():
    _, _, search = build(dataloader=LOADER, search="static")
    search.start()
    assert search.history[0]["warmup"] is False and search.history[0]["scores"] is not None


@pytest.mark.parametrize("config", [{"search": "static"}, {"search": "dynamic"}], ids=["static", "dynamic"])
def test_start_is_idempotent(config):
    _, _, search = build(dataloader=LOADER, **config)
    search.start()
    before = (search.ranks, len(search.history), search.state_dict()["generator"].tolist())
    search.start()
    assert (search.ranks, len(search.history), search.state_dict()["generator"].tolist()) == before


@pytest.mark.parametrize("config", [{"search": "static"}, {"search": "dynamic"}], ids=["static", "dynamic"])
def test_first_step_starts(config):
    model, optimizer, search = build(dataloader=LOADER, **config)
    train(model, optimizer, search, 1)
    assert [entry["step"] for entry in search.history] == [0] and len(on(search.ranks)) == 2


def test_step_says_whether_ranks_were_chosen():
    model, optimizer, search = build(interval=3, warmup=9)
    search.start()
    assert [search.step() for _ in range(7)] == [False, False, True, False, False, True, False]


def test_a_step_that_only_counts_looks_at_no_path(monkeypatch):
    model, optimizer, search = build(interval=6, num_batches=2, warmup=0)
    search.start()
    looked, looks, active_rows = [], [], Path.active_rows
    monkeypatch.setattr(Path, "active_rows", lambda path: looks.append(path) or active_rows(path))
    for step in range(12):
        train_step(model, optimizer, net_batch(step))
        looks.clear()
        search.step()
        looked += [step + 1] if looks else []
    # The window opens after the fourth.
    assert looked == [4, 5, 6, 10, 11, 12]

def test_search_off_never_reallocates():
    model, optimizer, search = build(search="off")
    search.start()
    train(model, optimizer, search, 10)
    assert search.history == [] and set(search.ranks.values()) == {4}


def test_search_off_can_score_and_apply():
    _, _, search = build(search="off")
    search.apply(search.allocate(search.score([net_batch(0)], proxy="grad_norm")))
    assert len(on(search.ranks)) == 2


@pytest.mark.parametrize("kind", ["dynamic", "static", "off"])
def test_building_a_search_puts_every_path_on(kind):
    model = make_net(search=kind)
    hlk.RankSearch(model).apply({path: 0 for path in NET_PATHS})
    hlk.RankSearch(model)
    assert all(all(mask_of(model, path)) for path in NET_PATHS)


def test_paths_are_lora_first_then_shortcuts():
    search = hlk.RankSearch(make_llama())
    shortcuts = [path.rpartition(".")[2] in hlk.HeteroLoraConfig(shortcuts="all").shortcuts for path in search.paths]
    assert shortcuts == sorted(shortcuts) and sum(shortcuts) == 7 and len(shortcuts) == 21


@pytest.mark.parametrize("mode", ["combined", "separated", "lora_only"])
@pytest.mark.parametrize("budget", [0.25, 0.34, 0.6])
def test_warmup_puts_every_path_on_once_before_any_twice(mode, budget):
    search = hlk.RankSearch(make_llama(mode=mode, budget=budget, interval=1, proxy="constant"))
    pools = {"lora": [path for path in search.paths if "_proj" in path]}
    if mode != "lora_only":
        pools["shortcut"] = [path for path in search.paths if "_proj" not in path]
    if mode == "combined":
        pools = {"all": search.paths}
    times = dict.fromkeys(search.paths, 0)
    search.start()
    while search.history[-1]["warmup"]:
        for path in on(search.history[-1]["ranks"]):
            times[path] += 1
        for names in pools.values():
            assert max(times[name] for name in names) <= 1 + min(times[name] for name in names)
        search.step()
        assert len(search.history) < 20
    assert all(times[name] for names in pools.values() for name in names)


def test_warmup_ends_where_a_pool_has_no_budget():
    # One shortcut beside 14 linears: round(0.25) = 0, so it can never be on.
    search = hlk.RankSearch(make_llama(mode="separated", shortcuts=["shortcut_ffn"], interval=1, proxy="constant"))
    for _ in range(12):
        search.step()
    assert search.history[-1]["warmup"] is False


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_explicit_warmup_counts_reallocations_and_start_is_the_first(warmup):
    model, optimizer, search = build(interval=2, warmup=warmup)
    search.start()
    train(model, optimizer, search, 14)
    assert [entry["warmup"] for entry in search.history] == [True] * warmup + [False] * (8 - warmup)


def test_default_warmup_lasts_until_every_path_was_on():
    model, optimizer, search = build(interval=2, budget=0.25)
    search.start()
    train(model, optimizer, search, 12)
    assert [entry["warmup"] for entry in search.history] == [True] * 4 + [False] * 3


def test_warmup_zero_with_in_step_leaves_everything_on_until_the_first_due_step():
    model, optimizer, search = build(interval=3, warmup=0)
    search.start()
    seen = []
    for step in range(3):
        seen.append(len(on(search.ranks)))
        train(model, optimizer, search, 1, first=step)
    assert seen == [4, 4, 4] and len(on(search.ranks)) == 2


def test_warmup_zero_with_probe_scores_at_the_start():
    _, _, search = build(dataloader=LOADER, warmup=0, score="probe")
    search.start()
    assert search.history[0]["score"] == "probe" and len(on(search.ranks)) == 2


@pytest.mark.parametrize("interval, steps_per_epoch, expected", [
    pytest.param(5, None, [0, 5, 10], id="int"),
    pytest.param(0.2, 20, [0, 4, 8, 12], id="float"),
    pytest.param(1.0, 6, [0, 6, 12], id="one-epoch"),
    pytest.param(0.01, 8, list(range(13)), id="at-least-one-step"),
])
def test_interval(interval, steps_per_epoch, expected):
    _, _, search = build(interval=interval, steps_per_epoch=steps_per_epoch, warmup=99)
    search.start()
    for _ in range(12):
        search.step()
    assert [entry["step"] for entry in search.history] == expected


@pytest.mark.parametrize("call", ["start", "step"])
def test_float_interval_without_steps_per_epoch_names_it(call):
    with pytest.raises(ValueError, match="steps_per_epoch"):
        getattr(build(interval=0.2)[2], call)()


@pytest.mark.parametrize("kind", ["static", "off"])
def test_float_interval_is_not_needed_without_dynamic_search(kind):
    search = build(interval=0.2, dataloader=LOADER, search=kind)[2]
    search.start()
    assert search.step() is False


@pytest.mark.parametrize("value", [0, -3])
def test_steps_per_epoch_must_be_positive(value):
    with pytest.raises(ValueError, match="steps_per_epoch"):
        build(interval=0.2, steps_per_epoch=value)


def test_static_with_in_step_is_an_error_that_names_score():
    with pytest.raises(ValueError, match="score='in_step'"):
        hlk.HeteroLoraConfig(search="static", score="in_step")


def collecting_steps(steps, **config):
    """Numbers (from 1) of the optimizer steps during which statistics were collected."""
    model, optimizer, search = build(**config)
    search.start()
    seen = []
    for step in range(steps):
        if is_collecting(model):
            seen.append(step + 1)
        train(model, optimizer, search, 1, first=step)
    return seen


@pytest.mark.parametrize("config, expected", [
    pytest.param({"interval": 6, "num_batches": 2, "warmup": 0}, [5, 6, 11, 12], id="two-of-six"),
    pytest.param({"interval": 6, "num_batches": 2, "warmup": 2}, [11, 12], id="none-before-a-warm-up"),
    pytest.param({"interval": 3, "num_batches": 7, "warmup": 0}, list(range(1, 13)), id="at-most-the-interval"),
    pytest.param({"interval": 12, "warmup": 0}, list(range(5, 13)), id="eight-by-default"),
    pytest.param({"interval": 6, "warmup": 0, "proxy": "constant"}, [], id="constant-needs-none"),
    pytest.param({"interval": 6, "warmup": 99}, [], id="all-warm-up"),
])
def test_statistics_are_collected_only_in_the_window(config, expected):
    assert collecting_steps(12, **config) == expected


@pytest.mark.parametrize("config", [{"score": "probe"}, {"search": "static"}, {"search": "off"}], ids=["probe", "static", "off"])
def test_nothing_is_collected_without_in_step(config):
    assert collecting_steps(8, interval=2, dataloader=LOADER, **config) == []


def test_batches_of_the_history_are_the_steps_of_the_window():
    model, optimizer, search = build(interval=6, num_batches=2, warmup=0)
    search.start()
    train(model, optimizer, search, 12)
    assert [entry["batches"] for entry in search.history] == [2, 2]


def test_window_is_emptied_by_a_reallocation():
    model, optimizer, search = build(interval=2, num_batches=2, warmup=0)
    search.start()
    train(model, optimizer, search, 2)
    with pytest.raises(ValueError, match="in_step"):
        search.score(score="in_step")


@pytest.mark.parametrize("config", [{}, {"search": "static"}, {"search": "off"}], ids=["before-start", "static", "off"])
def test_in_step_score_of_an_empty_window_is_an_error(config):
    with pytest.raises(ValueError, match="in_step"):
        build(**config)[2].score(score="in_step")


def test_in_step_score_takes_no_batches():
    with pytest.raises(ValueError, match="batches"):
        build()[2].score([net_batch(0)], score="in_step")


def test_a_search_that_is_gone_no_longer_collects():
    model, optimizer, search = build(interval=2, num_batches=2, warmup=0)
    search.start()
    assert is_collecting(model)
    search.cycle = search
    del search
    with Operations() as mode:
        gc.collect()
    assert not is_collecting(model) and mode.seen == []


class Operations(TorchDispatchMode):
    """Whatever mode is active, the garbage collector may run in it: a finalizer has no business with tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_search_that_goes_during_the_probe_of_another_no_longer_collects():
    model, _, search = build(interval=2, num_batches=2, warmup=0)
    search.start()
    gone = [search]
    del search

    def loss_fn(model, batch):
        gone.clear()
        return model(**batch).loss

    hlk.RankSearch(model).score([net_batch(0)], score="probe", loss_fn=loss_fn)
    gc.collect()
    assert not is_collecting(model)


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_apply_int_means_the_first_rows(rank):
    model, _, search = build()
    search.apply({"layers.1": rank})
    assert mask_of(model, "layers.1") == [True] * rank + [False] * (4 - rank) and search.ranks["layers.1"] == rank


@pytest.mark.parametrize("as_mask", [list, torch.tensor], ids=["list", "tensor"])
def test_apply_bool_mask(as_mask):
    model, _, search = build()
    search.apply({"layers.2": as_mask([False, True, False, True])})
    assert mask_of(model, "layers.2") == [False, True, False, True] and search.ranks["layers.2"] == 2


def test_apply_leaves_unnamed_paths_as_they_are():
    _, _, search = build()
    search.apply({"layers.0": 1})
    search.apply({"layers.1": 2})
    assert list(search.ranks.values()) == [1, 2, 4, 4]


def test_apply_changes_what_the_model_computes():
    model, _, search = build()
    holder, seen = adapter(model, "layers.3"), []
    holder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()
    full = model(**net_batch(0)).out
    search.apply({"layers.3": 1})
    torch.testing.assert_close(full - model(**net_batch(0)).out, 4 * seen[0] @ holder.lora_A[1:].t() @ holder.lora_B[:, 1:].t())


def test_apply_and_back_gives_the_same_bits():
    model, _, search = build()
    full = model.eval()(**net_batch(0)).out
    search.apply({"layers.3": 2})
    search.apply({"layers.3": 4})
    assert torch.equal(model(**net_batch(0)).out, full)


@pytest.mark.parametrize("bad, names", [
    pytest.param({"layers.1": -1}, r"layers\.1.*-1", id="minus-one"),
    pytest.param({"layers.1": 5}, r"layers\.1.*5", id="above-r"),
    pytest.param({"layers.9": 1}, r"layers\.9", id="unknown-path"),
    pytest.param({"layers.1": [True] * 3}, r"layers\.1", id="short-mask"),
    pytest.param({"layers.1": [1, 0, 1, 0]}, r"layers\.1", id="mask-of-ints"),
    pytest.param({"layers.1": 1.5}, r"layers\.1", id="float"),
    pytest.param({"layers.1": True}, r"layers\.1", id="bool"),
])
def test_apply_of_a_bad_value_names_it_and_changes_nothing(bad, names):
    model, _, search = build()
    search.apply({"layers.0": 2})
    before, out = snapshot(model), model.eval()(**net_batch(0)).out
    with pytest.raises(ValueError, match=names):
        search.apply({"layers.0": 0, **bad})
    assert same_bits(before, snapshot(model)) and torch.equal(model(**net_batch(0)).out, out)


def test_parameters_and_optimizer_state_keep_their_identity():
    model, optimizer, search = build(interval=1, warmup=2)
    train(model, optimizer, search, 2)
    parameters, states = trainable(model), {p: optimizer.state[p] for p in trainable(model)}
    moments = {p: state["exp_avg"] for p, state in states.items() if "exp_avg" in state}
    train(model, optimizer, search, 6, first=2)
    assert all(new is old for new, old in zip(trainable(model), parameters))
    assert all(optimizer.state[p] is state for p, state in states.items()) and moments
    assert all(optimizer.state[p]["exp_avg"] is moment for p, moment in moments.items())


def test_history_is_json():
    model, optimizer, search = build(interval=2, warmup=1)
    train(model, optimizer, search, 4)
    assert json.loads(json.dumps(search.history)) == search.history


def test_history_threshold_and_active_parameters():
    model, optimizer, search = build(interval=2, warmup=1)
    train(model, optimizer, search, 2)
    entry, chosen = search.history[-1], on(search.ranks)
    parameters = sum(adapter(model, path).lora_A.numel() + adapter(model, path).lora_B.numel() for path in chosen)
    assert (entry["threshold"], entry["active_parameters"]) == (min(entry["scores"][path] for path in chosen), parameters)


def test_history_churn_is_the_share_of_new_paths():
    _, _, search = build(interval=1, proxy="constant", budget=0.75)
    for _ in range(8):
        search.step()
    sets = [on(entry["ranks"]) for entry in search.history]
    assert [entry["churn"] for entry in search.history[1:]] == [len(b - a) / 3 for a, b in zip(sets, sets[1:])]
    assert search.history[0]["churn"] == 0


def histories(seeds, **config):
    for seed in seeds:
        model, optimizer, search = build(interval=2, budget=0.25, seed=seed, **config)
        train(model, optimizer, search, 12)
        yield search.history


def test_same_seed_same_history():
    first, second = histories([3, 3])
    assert first == second


def test_other_seed_other_warmup():
    orders = {tuple(tuple(on(entry["ranks"])) for entry in history[:4]) for history in histories(range(5))}
    assert len(orders) > 1


def saved(*states):
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume(cut, steps, make, loader=None, batch=net_batch):
    """``(unbroken, resumed)``, each (history, parameters, generator)."""
    results = []
    for broken in (False, True):
        model = make(0)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
        search = hlk.RankSearch(model, optimizer, loader)
        for step in range(steps):
            if broken and step == cut:
                states = saved(model.state_dict(), optimizer.state_dict(), search.state_dict())
                model = fill_B(make(1), 99)
                optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
                search = hlk.RankSearch(model, optimizer, loader)
                for target, state in zip((model, optimizer, search), states):
                    target.load_state_dict(state)
            train_step(model, optimizer, batch(step), search)
        results.append((search.history, snapshot(model), search.state_dict()["generator"]))
    return results


@pytest.mark.parametrize("cut", [0, 1, 3, 6, 7, 8, 11, 15], ids=lambda cut: f"after-step-{cut}")
@pytest.mark.parametrize("score", ["in_step", "probe"])
def test_resumed_search_allocates_as_the_unbroken_one(cut, score):
    unbroken, resumed = resume(cut, 18, lambda seed: make_net(seed, interval=4, num_batches=3, warmup=2, score=score), LOADER)
    assert unbroken[0] == resumed[0] and torch.equal(unbroken[2], resumed[2]) and same_bits(unbroken[1], resumed[1])


def test_resumed_search_with_shortcuts_in_the_middle_of_a_window():
    def make(seed):
        return make_llama(seed, interval=3, warmup=1)

    unbroken, resumed = resume(4, 7, make, batch=llama_batch)
    assert unbroken[0] == resumed[0] and len(unbroken[0]) == 3 and same_bits(unbroken[1], resumed[1])


def test_resumed_warmup_goes_on_covering():
    unbroken, resumed = resume(3, 8, lambda seed: make_net(seed, interval=2, budget=0.25))
    assert unbroken[0] == resumed[0] and set().union(*(on(entry["ranks"]) for entry in resumed[0][:4])) == set(NET_PATHS)


def test_resumed_search_does_not_start_again():
    _, _, search = build(warmup=9)
    search.start()
    _, _, other = build(warmup=9)
    other.load_state_dict(search.state_dict())
    other.start()
    assert len(other.history) == 1 and other.ranks == search.ranks


def test_state_dict_is_a_copy():
    model, optimizer, search = build(interval=1, warmup=1)
    train(model, optimizer, search, 1)
    state = search.state_dict()
    frozen = json.dumps([state["history"], state["masks"], state["times_on"], state["steps"]])
    train(model, optimizer, search, 3, first=1)
    assert json.dumps([state["history"], state["masks"], state["times_on"], state["steps"]]) == frozen


@pytest.mark.parametrize("other", [
    pytest.param(lambda: make_net(target_modules=["layers.0", "layers.1"]), id="other-paths"),
    pytest.param(lambda: make_net(r=3), id="other-ranks"),
])
def test_state_of_another_model_is_refused(other):
    _, _, search = build()
    search.start()
    before = (search.ranks, search.state_dict()["generator"].tolist())
    with pytest.raises(ValueError):
        search.load_state_dict(hlk.RankSearch(other()).state_dict())
    assert (search.ranks, search.state_dict()["generator"].tolist()) == before


def test_state_of_another_version_is_refused():
    search = build()[2]
    with pytest.raises(ValueError, match="version"):
        search.load_state_dict({**search.state_dict(), "version": 1})
