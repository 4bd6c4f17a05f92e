"""What a probe reads, and what it leaves to the loop that reads the same loader."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from helpers_search import make_net, net_batch, train_step, trainable
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

import heterolora_kernels as hlk
from heterolora_kernels.scoring import probe_loader

SAMPLES = [{"x": net_batch(index)["x"][0], "target": torch.full((5,), float(index))} for index in range(12)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


def read(loader):
    """Numbers of the samples, batch by batch."""
    return [batch["target"][:, 0].int().tolist() for batch in loader]


IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("loader", [
    pytest.param(lambda: DataLoader(SAMPLES, 4), id="plain"),
    pytest.param(lambda: DataLoader(SAMPLES, 4, shuffle=True), id="shuffle"),
    pytest.param(lambda: DataLoader(SAMPLES, 4, sampler=RandomSampler(SAMPLES)), id="random-sampler"),
    pytest.param(lambda: DataLoader(SAMPLES, batch_sampler=BatchSampler(RandomSampler(SAMPLES), 4, False)), id="batch-sampler"),
    pytest.param(lambda: DataLoader(Stream(), 4), id="iterable"),
])
def test_the_head_is_read_in_order(loader):
    assert read(probe_loader(loader())) == IN_ORDER


@pytest.mark.parametrize("seedable", [True, False])
def test_each_process_reads_its_batches_in_order_under_accelerate(seedable):
    """And leaves the order of the next epoch alone, which both processes must shuffle alike."""
    for process, expected in enumerate(([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]])):
        loader, twin = (prepare_data_loader(
            DataLoader(SAMPLES, 3, shuffle=True, generator=torch.Generator().manual_seed(1)), torch.device("cpu"), 2, process,
            put_on_device=False, rng_types=[], use_seedable_sampler=seedable) for _ in range(2))
        assert read(probe_loader(loader)) == read(probe_loader(loader)) == expected
        assert read(loader.base_dataloader) == read(twin.base_dataloader) != expected


@pytest.mark.parametrize("data", [SAMPLES, Stream()], ids=["samples", "stream"])
def test_a_probe_does_not_end_an_accumulation_of_gradients(data):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, loader = make_net(score="probe"), accelerator.prepare(DataLoader(data, 2))
    search, synced = hlk.RankSearch(model, dataloader=loader), []
    for number, _ in enumerate(loader):
        if number == 1:
            search.score()
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert synced == [False, False, True, False, False, True]


def test_a_sampler_of_the_users_own_decides():
    backwards = DataLoader(SAMPLES, 4, sampler=SequentialSampler(range(8)))
    assert read(probe_loader(backwards)) == IN_ORDER[:2]


def test_drop_last_and_collate_are_kept():
    loader = DataLoader(SAMPLES, 5, shuffle=True, drop_last=True,
                        collate_fn=lambda samples: {"target": torch.zeros(len(samples), 1)})
    assert [len(batch) for batch in read(probe_loader(loader))] == [5, 5]


def test_lists_are_read_as_they_are():
    batches = [net_batch(0)]
    assert probe_loader(batches) is batches


def test_a_loop_over_a_loader_with_persistent_workers_goes_on():
    model = make_net(interval=1, warmup=0, score="probe", num_batches=1)
    loader = DataLoader(SAMPLES, 4, num_workers=1, persistent_workers=True)
    optimizer, seen = torch.optim.SGD(trainable(model), lr=0.01), []
    search = hlk.RankSearch(model, optimizer, loader)
    for batch in loader:
        seen += [batch["target"][:, 0].int().tolist()]
        train_step(model, optimizer, batch, search)
        assert len(seen) <= 3
    assert seen == IN_ORDER and len(search.history) == 4


def test_a_probe_between_a_forward_and_its_backward_changes_no_gradient():
    gradients = []
    for probed in (False, True):
        model = make_net()
        search = hlk.RankSearch(model, dataloader=[net_batch(7)])
        search.apply({"layers.1": 0, "layers.2": 2})
        loss = model(**net_batch(0)).loss
        if probed:
            search.score(score="probe")
            search.score(score="probe", proxy="fisher")
        loss.backward()
        gradients.append([p.grad for p in trainable(model)])
    assert all(torch.equal(first, second) for first, second in zip(*gradients))


@pytest.mark.parametrize("loss_fn, error", [
    pytest.param(lambda model, batch: 1.0, TypeError, id="float"),
    pytest.param(lambda model, batch: model(**batch).out, TypeError, id="vector"),
    pytest.param(lambda model, batch: model(**batch).loss.detach(), ValueError, id="detached"),
])
def test_a_loss_that_is_none_names_loss_fn(loss_fn, error):
    with pytest.raises(error, match="loss_fn"):
        hlk.RankSearch(make_net(), loss_fn=loss_fn).score([net_batch(0)], score="probe")


def test_batches_that_are_no_dictionaries_name_loss_fn():
    with pytest.raises(TypeError, match="loss_fn"):
        hlk.RankSearch(make_net()).score([(1, 2)], score="probe")


@pytest.mark.parametrize("argument, value", [
    ("optimizer", [net_batch(0)]), ("dataloader", 3), ("dataloader", iter([])), ("loss_fn", "mse"),
], ids=["optimizer", "number", "iterator", "loss_fn"])
def test_wrong_argument_is_named(argument, value):
    with pytest.raises(TypeError, match=argument):
        hlk.RankSearch(make_net(), **{argument: value})


def test_a_probe_without_a_dataloader_complains_at_the_start():
    with pytest.raises(ValueError, match="dataloader"):
        hlk.RankSearch(make_net(score="probe")).start()


def test_a_search_outlives_its_patch_with_a_clear_error():
    model = make_net()
    search = hlk.RankSearch(model)
    hlk.remove_heterolora(model)
    with pytest.raises(ValueError, match="not patched"):
        search.apply({})
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig())
    with pytest.raises(ValueError, match="patched anew"):
        search.apply({})
