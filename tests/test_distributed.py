"""Two gloo processes under DDP. One job runs all scenarios; each test reads what both processes left behind.

Run as a script, this file is one of those processes.
"""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers_jobs import WAIT, WORLD, Lost, assert_like_one_process, fit, launch, work
from helpers_search import (
    ALL_PROXIES,
    adapter,
    assert_scores_close,
    caught,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    path_names,
    plain_llama,
    snapshot,
    train_step,
    trainable,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import heterolora_kernels as hlk
from heterolora_kernels import distributed


def batches_of(rank, make=llama_batch, count=3):
    return [make(WORLD * step + rank) for step in range(count)]


def trained(rank, make, batch, steps=8, grad_as_view=False, dropout=0.0, **config):
    """History, ranks and parameters after a few DDP steps with a dynamic search."""
    model = make(lora_dropout=dropout, warmup=1, **{"interval": 2, **config})
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=grad_as_view)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    search = hlk.RankSearch(wrapped, optimizer, batches_of(rank, batch))
    search.start()
    for step in range(steps):
        train_step(wrapped, optimizer, batch(WORLD * step + rank), search)
    return {"history": search.history, "ranks": search.ranks, "parameters": snapshot(model)}


def probe_scores(rank):
    search = hlk.RankSearch(DistributedDataParallel(make_llama(dtype=torch.float64)))
    return {proxy: search.score(batches_of(rank), proxy=proxy, score="probe") for proxy in ALL_PROXIES}


def static_ranks(rank):
    search = hlk.RankSearch(DistributedDataParallel(make_llama(search="static")), dataloader=batches_of(rank))
    search.start()
    return search.ranks


def tied_ranks(rank):
    """Constant scores and generators that differ: what the processes would draw alone is not the same."""
    return [constant_ranks(10 * rank + number) for number in range(6)]


def constant_ranks(seed):
    search = hlk.RankSearch(make_net(search="static", proxy="constant", seed=seed))
    search.start()
    return search.ranks


def in_step_scores(rank):
    """Scores of a window of three SGD steps."""
    model = make_llama(dtype=torch.float64, interval=9, num_batches=9, warmup=0)
    wrapped = DistributedDataParallel(model)
    search, optimizer = hlk.RankSearch(wrapped), torch.optim.SGD(trainable(model), lr=0.1)
    search.start()
    for step in range(3):
        train_step(wrapped, optimizer, llama_batch(WORLD * step + rank), search)
    return search.score(score="in_step")


def nan_loss(rank, proxy):
    """A loss that is not finite on the second process alone."""
    batches = batches_of(rank, net_batch)
    if rank == 1:
        batches[1]["target"][:] = float("nan")
    search = hlk.RankSearch(DistributedDataParallel(make_net(search="static", proxy=proxy)), dataloader=batches)
    try:
        search.start()
        raised = None
    except FloatingPointError as error:
        raised = str(error)
    return {"raised": raised, "ranks": search.ranks, "history": search.history}


def broken_loss(rank):
    """A loss function that raises on the second process alone."""
    def loss(model, batch):
        if rank == 1:
            raise KeyError("no such column")
        return model(**batch).loss

    search = hlk.RankSearch(make_net(search="static"), dataloader=batches_of(rank, net_batch), loss_fn=loss)
    try:
        search.start()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def no_batches(rank):
    """A loader that is empty on the second process alone."""
    search = hlk.RankSearch(make_net(), dataloader=[])
    try:
        search.score(batches_of(0, net_batch) if rank == 0 else [], score="probe")
    except ValueError as error:
        return str(error)


def probe_under_bucket_view(rank):
    """Gradients that are views of DDP's buckets, and a training step after a probe between forward passes."""
    results = []
    for probe in (False, True):
        model = make_net(search="off")
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        search, optimizer = hlk.RankSearch(wrapped), torch.optim.SGD(trainable(model), lr=0.1)
        for step in range(3):
            optimizer.zero_grad(set_to_none=False)
            with wrapped.no_sync():
                wrapped(**net_batch(10 + step)).loss.backward()
            grads = [p.grad for p in trainable(model)]
            copies = [grad.clone() for grad in grads]
            if probe:
                search.score(batches_of(rank, net_batch), proxy="grad_norm", score="probe")
            kept = all(p.grad is grad and torch.equal(grad, value)
                       for p, grad, value in zip(trainable(model), grads, copies))
            wrapped(**net_batch(20 + WORLD * step + rank)).loss.backward()
            optimizer.step()
        results.append({"parameters": snapshot(model), "kept": kept})
    return results


def shuffled_heads(rank):
    """Numbers of the samples that a probe reads through a shuffling DistributedSampler."""
    samples = [{"x": net_batch(0)["x"][0], "target": torch.full((5,), float(index))} for index in range(12)]
    loader = DataLoader(samples, 2, sampler=DistributedSampler(samples, WORLD, rank, shuffle=True))
    seen = []

    def loss(model, batch):
        seen.extend(batch["target"][:, 0].int().tolist())
        return model(**batch).loss

    hlk.RankSearch(make_net(search="static", num_batches=2), dataloader=loader, loss_fn=loss).start()
    return seen


def averaged(rank):
    tensors = [torch.full((2, 3), rank + 1.0), torch.full((4,), rank + 3.0, dtype=torch.float64), torch.tensor(float(rank))]
    distributed.average_(tensors)
    return [tensor.tolist() for tensor in tensors]


def silent_training(rank):
    """Warnings of a training with inactive paths: DDP has nothing to say about unused parameters."""
    return caught(lambda: trained(rank, make_llama, llama_batch, steps=4))


def nan_in_step(rank):
    """A due step whose statistics are not finite on the second process alone."""
    model = make_net(interval=1, warmup=0)
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(trainable(model), lr=0.1)
    search, batch = hlk.RankSearch(wrapped), net_batch(rank)
    search.start()
    if rank == 1:
        batch["target"][:] = float("nan")
    train_step(wrapped, optimizer, batch, search)
    return search.history


def wrong_orders(rank):
    """What is said of a model that DDP wraps before it is patched, itself or the model inside."""
    messages, wrapped = [], DistributedDataParallel(plain_llama())

    def inside():
        hlk.apply_heterolora(wrapped.module, hlk.HeteroLoraConfig(r=2))
        hlk.RankSearch(wrapped)

    for attempt in (lambda: hlk.apply_heterolora(wrapped, hlk.HeteroLoraConfig(r=2)), inside):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def search_before_wrapper(rank):
    """A search that was built before the model was wrapped."""
    model = make_net(interval=1, warmup=0, score="probe")
    search = hlk.RankSearch(model, dataloader=batches_of(rank, net_batch))
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(trainable(model), lr=0.1)
    search.start()
    train_step(wrapped, optimizer, net_batch(rank), search)
    return search.history


def resumed_window(rank):
    """Scores of a window of two steps, and of one that goes on from the first process's state after one step."""
    model = make_llama(dtype=torch.float64, interval=9, num_batches=9, warmup=0)
    wrapped = DistributedDataParallel(model)
    search, optimizer = hlk.RankSearch(wrapped), torch.optim.SGD(trainable(model), lr=0.0)
    search.start()
    train_step(wrapped, optimizer, llama_batch(rank), search)
    saved = [search.state_dict()]
    dist.broadcast_object_list(saved)
    train_step(wrapped, optimizer, llama_batch(WORLD + rank), search)
    unbroken = search.score(score="in_step")
    search.load_state_dict(saved[0])
    train_step(wrapped, optimizer, llama_batch(WORLD + rank), search)
    return unbroken, search.score(score="in_step")


def killed(rank):
    """The second process is killed between two steps; what the first one's next step ends in, and after how long."""
    model = make_net()
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(trainable(model), lr=0.1)
    search = hlk.RankSearch(wrapped)
    search.start()
    train_step(wrapped, optimizer, net_batch(rank), search)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        train_step(wrapped, optimizer, net_batch(rank), search)
    except RuntimeError as error:
        return Lost(error), time.monotonic() - began


#: Ways in which DDP may be asked to work; each trains as one process does.
OPTIONS = {
    "ddp-accumulate": ({}, {"accumulate": 2}),
    "ddp-unused-accumulate": ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, {"accumulate": 2}),
    "ddp-unused-checkpointing": ({"find_unused_parameters": True}, {"reentrant": False}),
    "ddp-reentrant": ({}, {"reentrant": True}),
    "ddp-static": ({"static_graph": True}, {}),
    "ddp-static-reentrant": ({"static_graph": True, "gradient_as_bucket_view": True}, {"reentrant": True}),
    "ddp-probe": ({}, {"score": "probe"}),
    "ddp-graded-reset": ({}, {"ranks": "graded", "on_reactivate": "reset"}),
    "ddp-separated": ({}, {"mode": "separated"}),
}


def ddp(name):
    options, config = OPTIONS[name]
    return lambda rank: fit(lambda model: DistributedDataParallel(model, **options), rank, **config)


SCENARIOS = {
    "trained-net": lambda rank: trained(rank, make_net, net_batch),
    "trained-llama": lambda rank: trained(rank, make_llama, llama_batch),
    "trained-llama-probe": lambda rank: trained(rank, make_llama, llama_batch, score="probe", steps=4),
    "trained-llama-dropout": lambda rank: trained(rank, make_llama, llama_batch, steps=4, dropout=0.3),
    "trained-llama-bucket-view": lambda rank: trained(rank, make_llama, llama_batch, steps=4, grad_as_view=True),
    "probe": probe_scores,
    "static": static_ranks,
    "tied": tied_ranks,
    "in_step": in_step_scores,
    "nan-exact": lambda rank: nan_loss(rank, "grad_norm"),
    "nan-streaming": lambda rank: nan_loss(rank, "fisher"),
    "broken-loss": broken_loss,
    "no-batches": no_batches,
    "bucket-view": probe_under_bucket_view,
    "shuffled": shuffled_heads,
    "any": lambda rank: [distributed.any_process(flag, torch.device("cpu")) for flag in (rank == 1, False, True)],
    "average": averaged,
    "silent": silent_training,
    **{name: ddp(name) for name in OPTIONS},
    "wrong-orders": wrong_orders,
    "search-first": search_before_wrapper,
    "resumed-window": resumed_window,
    # If the processes part ways here, nothing after it would run.
    "nan-in_step": nan_in_step,
    "killed": killed,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """``job(scenario)``: the results of process 0 and process 1."""
    return launch(__file__, tmp_path_factory.mktemp("job"))


TRAININGS = pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name.startswith("trained")])


@TRAININGS
def test_training_with_a_dynamic_search_reallocates(job, scenario):
    assert [len(result["history"]) for result in job(scenario)] in ([5, 5], [3, 3])


@TRAININGS
def test_histories_and_ranks_are_alike(job, scenario):
    first, second = job(scenario)
    assert first["history"] == second["history"] and first["ranks"] == second["ranks"]


@TRAININGS
def test_parameters_stay_alike(job, scenario):
    first, second = (result["parameters"] for result in job(scenario))
    shared = [name for name in first if "norm.running" not in name and "num_batches" not in name]
    assert all(torch.equal(first[name], second[name]) for name in shared) and len(shared) > 8


@pytest.mark.parametrize("name", list(OPTIONS))
def test_ddp_trains_and_chooses_as_one_process(job, name):
    assert_like_one_process(job(name), fit(**OPTIONS[name][1]))


def test_wrapped_before_it_was_patched(job):
    for applied, searched in job("wrong-orders"):
        assert "call apply_heterolora first, then wrap" in applied
        assert "before apply_heterolora" in searched


def test_a_search_may_be_built_before_the_wrapper(job):
    first, second = job("search-first")
    assert first == second and len(first) == 2


def test_a_window_goes_on_from_the_first_process_state(job):
    for unbroken, resumed in job("resumed-window"):
        assert_scores_close(resumed, unbroken, tolerance=1e-6)


def test_a_killed_process_ends_the_other(job):
    (message, seconds), = job("killed", ranks=[0])
    assert isinstance(message, Lost) and seconds < WAIT.total_seconds()


def test_training_with_inactive_paths_warns_of_nothing(job):
    assert job("silent") == [[], []]


# Gradients are averaged: one process sums over WORLD times as many batches, and its gradients are WORLD times as large.
FACTORS = {"constant": 1, "grad_norm": WORLD, "snip": WORLD, "gate": WORLD, "taylor": WORLD ** 2, "fisher": 1}


@pytest.mark.parametrize("proxy", ALL_PROXIES)
def test_probe_equals_one_process_on_all_batches(job, proxy):
    union = batches_of(0) + batches_of(1)
    alone = hlk.RankSearch(make_llama(dtype=torch.float64)).score(union, proxy=proxy, score="probe")
    expected = {path: score / FACTORS[proxy] for path, score in alone.items()}
    assert_scores_close(job("probe")[0][proxy], expected)


@pytest.mark.parametrize("proxy", ALL_PROXIES)
def test_probe_scores_are_alike(job, proxy):
    first, second = job("probe")
    assert first[proxy] == second[proxy]


def test_static_ranks_are_those_of_one_process_on_all_batches(job):
    alone = hlk.RankSearch(make_llama(search="static"), dataloader=batches_of(0) + batches_of(1))
    alone.start()
    assert job("static") == [alone.ranks, alone.ranks]


def test_the_first_process_decides(job):
    first, second = job("tied")
    assert first == second == [constant_ranks(number) for number in range(6)]


def test_processes_alone_would_have_decided_otherwise():
    assert [constant_ranks(number) for number in range(6)] != [constant_ranks(10 + number) for number in range(6)]


def test_in_step_scores_are_alike(job):
    first, second = job("in_step")
    assert first == second


def test_in_step_scores_equal_one_process_that_accumulates(job):
    model = make_llama(dtype=torch.float64, interval=9, num_batches=9, warmup=0)
    # DDP averages what one process sums: half the learning rate takes the same steps.
    search, optimizer = hlk.RankSearch(model), torch.optim.SGD(trainable(model), lr=0.1 / WORLD)
    search.start()
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(WORLD):
            model(**llama_batch(WORLD * step + rank)).loss.backward()
        optimizer.step()
        search.step()
    assert_scores_close(job("in_step")[0], search.score(score="in_step"))


@pytest.mark.parametrize("scenario", ["nan-exact", "nan-streaming"])
def test_nan_on_one_process_raises_on_both(job, scenario):
    assert all("not finite" in result["raised"] for result in job(scenario))


@pytest.mark.parametrize("scenario", ["nan-exact", "nan-streaming"])
def test_nan_on_one_process_changes_no_rank(job, scenario):
    for result in job(scenario):
        assert set(result["ranks"].values()) == {4} and result["history"] == []


def test_statistics_that_are_not_finite_on_one_process_leave_both_alike(job):
    first, second = job("nan-in_step")
    assert first == second


def test_an_exception_on_one_process_raises_on_both(job):
    assert job("broken-loss") == ["RuntimeError: scoring failed on another process; no rank was changed",
                                  "KeyError: 'no such column'"]


def test_no_batches_on_one_process_raises_on_both(job):
    assert all("empty" in message for message in job("no-batches"))


def test_probe_leaves_gradients_in_buckets(job):
    assert all(run["kept"] for result in job("bucket-view") for run in result)


def test_training_under_ddp_goes_on_as_without_a_probe(job):
    for without, probed in job("bucket-view"):
        assert all(torch.equal(without["parameters"][name], probed["parameters"][name]) for name in without["parameters"])


def test_probe_reads_the_unshuffled_share_of_each_process(job):
    assert job("shuffled") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_any_process(job):
    assert job("any") == [[True, False, True]] * 2


def test_average_of_tensors_of_two_dtypes(job):
    assert job("average") == [[[[1.5] * 3] * 2, [3.5] * 4, 0.5]] * 2


@pytest.mark.parametrize("function, value", [
    pytest.param(distributed.sum_, torch.tensor([1.0, 2.0]), id="sum_"),
    pytest.param(distributed.broadcast_, torch.tensor([1.0, 2.0]), id="broadcast_"),
])
def test_identity_without_a_process_group(function, value):
    assert function(value) is value and value.tolist() == [1.0, 2.0]


def test_one_process_without_a_process_group():
    tensor = torch.tensor([3.0])
    distributed.average_([tensor])
    assert (distributed.world_size(), distributed.any_process(True, tensor.device), tensor.item()) == (1, True, 3.0)


def test_a_search_takes_the_model_inside_a_wrapper():
    model = make_net()
    wrapper = torch.nn.Module()
    wrapper.module = model
    hlk.RankSearch(wrapper).apply({"layers.1": 1})
    assert {path: int(adapter(model, path).lora_mask.sum()) for path in path_names(model)}["layers.1"] == 1


if __name__ == "__main__":
    work(SCENARIOS, int(sys.argv[1]), sys.argv[2])
