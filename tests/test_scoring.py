"""A probe: what it reads, what it leaves as it was, and what it says."""

import random

import numpy as np
import pytest
import torch
from helpers_search import (
    NET_PATHS,
    adapter,
    build,
    caught,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    path_names,
    same_bits,
    snapshot,
    train,
    trainable,
)
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import heterolora_kernels as hlk


def noisy_loss(model, batch):
    """A loss that draws from every global generator."""
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return model(**batch).loss * (1 + noise)


def failing_after(number):
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) > number:
            raise RuntimeError("the user's loss failed")
        return noisy_loss(model, batch)
    return loss


class Samples(Dataset):
    """Twelve samples; the target of each tells its number."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": net_batch(index, size=1)["x"][0], "target": torch.full((5,), float(index))}


def score_quietly(search, batches, **options):
    try:
        search.score(batches, score="probe", **options)
    except RuntimeError as error:
        assert "the user's loss failed" in str(error)


OUTCOMES = pytest.mark.parametrize("loss_fn", [
    pytest.param(lambda: noisy_loss, id="scored"),
    pytest.param(lambda: failing_after(0), id="exception-at-once"),
    pytest.param(lambda: failing_after(2), id="exception-in-the-third-batch"),
])
STATISTICS = pytest.mark.parametrize("proxy", ["grad_norm", "fisher"], ids=["exact", "streaming"])
BATCHES = [net_batch(seed) for seed in range(4)]


def searching(loss_fn=None, dropout=0.3, **config):
    """``(model, search)`` on a Net with LoRA dropout, partly in eval mode, with a path off and one half on."""
    model = make_net(lora_dropout=dropout, **config)
    model.eval()
    model.layers[1].train()
    model.dropout.train()
    search = hlk.RankSearch(model, loss_fn=loss_fn)
    search.apply({"layers.0": 0, "layers.2": [True, False, True, False]})
    return model, search


@OUTCOMES
@STATISTICS
@pytest.mark.parametrize("state", [
    pytest.param(lambda: torch.get_rng_state().tolist(), id="torch"),
    pytest.param(random.getstate, id="python"),
    pytest.param(lambda: repr(np.random.get_state(legacy=False)), id="numpy"),
])
def test_global_generators_are_as_before(state, loss_fn, proxy):
    _, search = searching(loss_fn())
    before = state()
    score_quietly(search, BATCHES, proxy=proxy)
    assert state() == before


@OUTCOMES
@STATISTICS
def test_training_mode_of_every_module_is_as_before(loss_fn, proxy):
    model, search = searching(loss_fn())
    before = {name: module.training for name, module in model.named_modules()}
    score_quietly(search, BATCHES, proxy=proxy)
    assert {name: module.training for name, module in model.named_modules()} == before and len(set(before.values())) == 2


@OUTCOMES
@STATISTICS
def test_half_accumulated_grad_is_as_before(loss_fn, proxy):
    model, search = searching(loss_fn())
    model(**net_batch(9)).loss.backward()
    adapter(model, "layers.3").lora_A.grad = None
    objects = [p.grad for p in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in objects]
    score_quietly(search, BATCHES, proxy=proxy)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))
    assert all(grad is None if value is None else torch.equal(grad, value) for grad, value in zip(objects, values))
    assert sum(value is not None for value in values) == 7


@OUTCOMES
@STATISTICS
def test_parameters_buffers_and_masks_are_as_before(loss_fn, proxy):
    model, search = searching(loss_fn())
    objects, before = list(model.parameters()), snapshot(model)
    score_quietly(search, BATCHES, proxy=proxy)
    assert all(new is old for new, old in zip(model.parameters(), objects)) and same_bits(before, snapshot(model))


@OUTCOMES
def test_requires_grad_is_as_before(loss_fn):
    model, search = searching(loss_fn())
    adapter(model, "layers.1").lora_A.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    score_quietly(search, BATCHES)
    assert [p.requires_grad for p in model.parameters()] == before


@OUTCOMES
@STATISTICS
def test_gates_are_as_before(loss_fn, proxy):
    model, search = searching(loss_fn(), dropout=0.0)
    model.eval()
    before = model(**net_batch(0)).out
    score_quietly(search, BATCHES, proxy=proxy)
    assert torch.equal(model(**net_batch(0)).out, before)


@OUTCOMES
@pytest.mark.parametrize("register", ["register_post_accumulate_grad_hook", "register_hook"])
def test_hooks_of_the_user_do_not_fire_in_a_probe(loss_fn, register):
    model, search = searching(loss_fn())
    fired = []
    for parameter in trainable(model):
        getattr(parameter, register)(fired.append)
    score_quietly(search, BATCHES)
    assert fired == []


def test_hooks_of_the_user_fire_after_a_probe():
    model, search = searching()
    fired = []
    for parameter in trainable(model):
        parameter.register_post_accumulate_grad_hook(fired.append)
    search.score(BATCHES, score="probe")
    model(**net_batch(0)).loss.backward()
    assert {id(p) for p in fired} == {id(p) for p in trainable(model)}


@OUTCOMES
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no-grad"])
def test_grad_mode_is_as_before(loss_fn, enabled):
    _, search = searching(loss_fn())
    with torch.set_grad_enabled(enabled):
        score_quietly(search, BATCHES)
        assert torch.is_grad_enabled() == enabled


@OUTCOMES
@STATISTICS
def test_disabled_adapters_stay_disabled(loss_fn, proxy):
    model, search = searching(loss_fn())
    model.eval()
    with hlk.disable_adapter(model):
        before = model(**net_batch(0)).out
        score_quietly(search, BATCHES, proxy=proxy)
        assert torch.equal(model(**net_batch(0)).out, before)


def test_disabled_adapters_are_scored():
    model, search = searching(dropout=0.0)
    expected = search.score(BATCHES, score="probe")
    with hlk.disable_adapter(model):
        assert search.score(BATCHES, score="probe") == expected


@STATISTICS
def test_a_probe_leaves_an_open_window_as_it_was(proxy):
    windows = []
    for probe in (False, True):
        model, optimizer, search = build(interval=9, num_batches=9, warmup=0)
        search.start()
        train(model, optimizer, search, 2)
        if probe:
            search.score([net_batch(50)], proxy=proxy, score="probe")
        train(model, optimizer, search, 2, first=2)
        windows.append(search.score(score="in_step"))
    assert windows[0] == windows[1]


@STATISTICS
def test_a_probe_is_not_seen_by_collect_statistics(proxy):
    model, search = searching()
    with hlk.collect_statistics(model) as ledger:
        search.score(BATCHES, proxy=proxy, score="probe")
        assert not any(column.any() for columns in ledger.table().values() for column in columns.values())


def test_a_probe_runs_in_train_mode():
    seen = []

    def loss(model, batch):
        seen.append([module.training for module in model.modules()])
        return model(**batch).loss

    searching(loss)[1].score(BATCHES, score="probe")
    assert len(seen) == 4 and all(map(all, seen))


@STATISTICS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_score(reentrant, proxy):
    model, batches = make_llama(layers=3), [llama_batch(0), llama_batch(1)]
    search = hlk.RankSearch(model)
    plain = search.score(batches, proxy=proxy, score="probe")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert search.score(batches, proxy=proxy, score="probe") == pytest.approx(plain, rel=1e-5)


def test_scores_do_not_depend_on_what_was_accumulated():
    model, search = searching(dropout=0.0)
    fresh = search.score(BATCHES, score="probe")
    model(**net_batch(9)).loss.backward()
    assert search.score(BATCHES, score="probe") == fresh


def test_scores_do_not_depend_on_which_paths_are_on():
    model = make_llama()
    search = hlk.RankSearch(model)
    everything = search.score([llama_batch(0)], score="probe")
    search.apply({path: 0 for path in search.paths[::2]})
    assert search.score([llama_batch(0)], score="probe") == everything


def test_training_goes_on_as_without_a_probe():
    models = []
    for probe in (False, True):
        model, optimizer, search = build(lora_dropout=0.2, warmup=9)
        torch.manual_seed(1)
        for step in range(4):
            train(model, optimizer, search, 1, first=step)
            if probe:
                search.score(BATCHES, score="probe")
        models.append(snapshot(model))
    assert same_bits(*models)


def targets_seen(loader, num_batches=2, **config):
    """Numbers of the samples that a static search scored."""
    seen = []

    def loss(model, batch):
        seen.extend(batch["target"][:, 0].int().tolist())
        return model(**batch).loss

    hlk.RankSearch(make_net(search="static", num_batches=num_batches, **config), dataloader=loader, loss_fn=loss).start()
    return seen


@pytest.mark.parametrize("options", [
    pytest.param({}, id="not-shuffled"),
    pytest.param({"shuffle": True}, id="shuffled"),
    pytest.param({"shuffle": True, "generator": torch.Generator().manual_seed(3)}, id="shuffled-by-an-own-generator"),
])
def test_the_head_of_the_set_is_read(options):
    assert targets_seen(DataLoader(Samples(), 3, **options)) == [0, 1, 2, 3, 4, 5]


def test_a_loader_is_read_up_to_its_end():
    assert targets_seen(DataLoader(Samples(), 5, shuffle=True), num_batches=32) == list(range(12))


def test_drop_last_and_collate_fn_are_kept():
    collated = []

    def collate(samples):
        collated.append(len(samples))
        return torch.utils.data.default_collate(samples)

    targets_seen(DataLoader(Samples(), 5, shuffle=True, drop_last=True, collate_fn=collate), num_batches=32)
    assert collated == [5, 5]


@pytest.mark.parametrize("make", [
    pytest.param(lambda g: DataLoader(Samples(), 3, shuffle=True, generator=g), id="shuffled"),
    pytest.param(lambda g: DataLoader(Samples(), 3, generator=g), id="not-shuffled"),
    pytest.param(lambda g: DataLoader(Samples(), 3, sampler=WeightedRandomSampler([1.0] * 12, 12, generator=g)), id="weighted"),
])
def test_a_loaders_own_generator_is_as_before(make):
    generator = torch.Generator().manual_seed(3)
    loader = make(generator)
    before = generator.get_state()
    targets_seen(loader)
    assert torch.equal(generator.get_state(), before)


def test_shuffled_loader_gives_the_user_the_same_order_after_a_probe():
    orders = []
    for probe in (False, True):
        loader = DataLoader(Samples(), 3, shuffle=True)
        if probe:
            torch.manual_seed(3)
            targets_seen(loader)
        torch.manual_seed(4)
        orders.append([batch["target"][:, 0].tolist() for batch in loader])
    assert orders[0] == orders[1] and sorted(sum(orders[0], [])) == list(range(12))


def test_given_batches_are_all_used():
    calls = []
    search = hlk.RankSearch(make_net(num_batches=2), loss_fn=lambda model, batch: (calls.append(1), model(**batch).loss)[1])
    search.score(BATCHES, score="probe")
    assert len(calls) == 4


def test_empty_dataloader_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="dataloader is empty"):
        hlk.RankSearch(make_net(search="static"), dataloader=[]).start()


def test_dataloader_that_can_be_read_once_is_refused():
    with pytest.raises(TypeError, match="dataloader must be .* again and again"):
        hlk.RankSearch(make_net(search="static"), dataloader=iter(BATCHES))


def test_loss_of_none_names_loss_fn():
    with pytest.raises(ValueError, match="loss_fn"):
        hlk.RankSearch(make_net()).score([{"x": net_batch(0)["x"]}], score="probe")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("position", [0, 2], ids=["first-batch", "last-batch"])
@STATISTICS
def test_loss_that_is_not_finite_raises_before_any_rank_changes(proxy, position, bad):
    batches = [net_batch(seed) for seed in range(3)]
    batches[position]["target"][:] = bad
    model = make_net(search="static", proxy=proxy)
    search, before = hlk.RankSearch(model, dataloader=batches), snapshot(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        search.start()
    assert set(search.ranks.values()) == {4} and search.history == [] and same_bits(before, snapshot(model))


def test_a_search_can_be_started_after_a_loss_that_was_not_finite():
    batches = [net_batch(0)]
    search = hlk.RankSearch(make_net(search="static"), dataloader=batches)
    batches[0]["target"][:] = float("nan")
    with pytest.raises(FloatingPointError):
        search.start()
    batches[0] = net_batch(0)
    search.start()
    assert sorted(search.ranks.values()) == [0, 0, 4, 4]


@pytest.mark.parametrize("proxy", ["snip", "taylor", "gate"])
@pytest.mark.parametrize("zeros", [1, 4], ids=["some", "all"])
def test_zero_B_is_reported_once_with_the_number(proxy, zeros):
    model = make_net(proxy=proxy)
    search = hlk.RankSearch(model)
    with torch.no_grad():
        for path in NET_PATHS[:zeros]:
            adapter(model, path).lora_B.zero_()
    messages = caught(lambda: [search.score([net_batch(0)], score="probe") for _ in range(3)])
    assert len(messages) == 1 and proxy in messages[0] and f"{zeros} of 4" in messages[0]


@pytest.mark.parametrize("proxy", ["grad_norm", "fisher", "constant"])
def test_zero_B_is_not_reported_for_proxies_that_live_there(proxy):
    search = hlk.RankSearch(make_net(proxy=proxy, zero_B=True))
    assert caught(lambda: search.score([net_batch(0)], score="probe")) == []


def test_tied_scores_are_reported_once():
    model = make_net(interval=1, warmup=0, score="probe")
    search = hlk.RankSearch(model, dataloader=[net_batch(0)],
                            loss_fn=lambda model, batch: sum((p * 0).sum() for p in trainable(model)))
    messages = caught(lambda: [search.step() for _ in range(4)])
    assert len(messages) == 1 and "equal" in messages[0] and "random" in messages[0] and len(search.history) == 5


def test_ties_of_constant_are_not_reported():
    search = hlk.RankSearch(make_net(proxy="constant", interval=1, warmup=0))
    assert caught(lambda: [search.step() for _ in range(4)]) == []


@pytest.mark.parametrize("config", [{"search": "static"}, {"score": "probe", "warmup": 0}], ids=["static", "dynamic"])
def test_probe_without_dataloader_names_the_argument(config):
    with pytest.raises(ValueError, match="dataloader"):
        hlk.RankSearch(make_net(**config)).start()


def test_unknown_score_names_the_argument():
    with pytest.raises(ValueError, match="score must be"):
        hlk.RankSearch(make_net()).score([net_batch(0)], score="no_such")


def test_optimizer_without_our_parameters_names_the_argument():
    with pytest.raises(ValueError, match="optimizer"):
        hlk.RankSearch(make_net(), torch.optim.SGD(trainable(make_net()), lr=0.1))


def test_model_that_is_not_patched_names_the_argument():
    with pytest.raises(ValueError, match="model is not patched"):
        hlk.RankSearch(torch.nn.Linear(2, 2))


def test_allocate_without_a_path_names_it():
    search = hlk.RankSearch(make_net())
    with pytest.raises(ValueError, match=r"scores.*layers\.2"):
        search.allocate({path: 1.0 for path in search.paths if path != "layers.2"})


def test_paths_of_the_search_are_the_paths_of_the_model():
    model = make_net()
    assert set(hlk.RankSearch(model).paths) == set(path_names(model)) == set(NET_PATHS)
