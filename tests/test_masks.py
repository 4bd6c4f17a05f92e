"""Masks are the truth: whoever writes them is followed, and what is closed takes no part."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_search import make_net, net_batch, path_names, same_bits, snapshot, trainable
from torch.optim.swa_utils import AveragedModel

import heterolora_kernels as hlk
from heterolora_kernels.allocation import _allocators, register_allocator


def test_an_averaged_copy_follows_the_masks():
    model = make_net()
    averaged = AveragedModel(model, use_buffers=True)
    averaged(**net_batch(0))
    hlk.RankSearch(model).apply({"layers.0": 0, "layers.2": 1})
    averaged.update_parameters(model)
    model.eval(), averaged.eval()
    torch.testing.assert_close(averaged(**net_batch(1)).out, model(**net_batch(1)).out)


def test_a_mask_written_in_place_is_followed():
    model, other = make_net().eval(), make_net().eval()
    model(**net_batch(0))
    hlk.RankSearch(other).apply({"layers.1": 0})
    model.state_dict()["layers.1.lora_mask"].fill_(False)
    assert torch.equal(model(**net_batch(0)).out, other(**net_batch(0)).out)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_summed_out_of_place_are_counted_and_so_are_those_after():
    model = make_net()
    tables = []
    for create_graph in (False, True):
        with hlk.collect_statistics(model) as ledger:
            for _ in range(2):
                model(**net_batch(0)).loss.backward(create_graph=create_graph)
                model.zero_grad()
            model(**net_batch(1)).loss.backward()
            tables.append(ledger.table())
    for path, columns in tables[0].items():
        for name, value in columns.items():
            assert bool(value.any())
            torch.testing.assert_close(tables[1][path][name], value)


@pytest.mark.parametrize("statistics", [False, True], ids=["plain", "statistics"])
@pytest.mark.parametrize("rows", [0, 2], ids=["whole-path", "some-rows"])
def test_closed_rows_may_hold_anything(statistics, rows):
    results = []
    for value in (0.0, float("nan")):
        model = make_net()
        path = model.layers[1]
        with torch.no_grad():
            path.lora_A[rows:] = value
            path.lora_B[:, rows:] = value
        hlk.RankSearch(model).apply({"layers.1": rows})
        if statistics:
            with hlk.collect_statistics(model):
                loss = model(**net_batch(0)).loss
                loss.backward()
        else:
            loss = model(**net_batch(0)).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in trainable(model))])
    assert all(torch.isfinite(value).all() for value in results[1])
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize("answer, message", [
    pytest.param(lambda scores: {name: 0 for name in scores}, "every path off", id="nothing"),
    pytest.param(lambda scores: {"layers.0": 4}, "no rank for", id="paths-left-out"),
    pytest.param(lambda scores: {name: 99 for name in scores}, "ranks", id="too-large"),
])
def test_a_broken_allocator_changes_nothing(answer, message):
    register_allocator("broken")(lambda scores, costs, budget, **options: answer(scores))
    try:
        model = make_net(ranks="broken", search="static")
        search, before = hlk.RankSearch(model, dataloader=[net_batch(0)]), snapshot(model)
        with pytest.raises(ValueError, match=message):
            search.start()
    finally:
        del _allocators["broken"]
    assert same_bits(snapshot(model), before) and search.history == [] and set(search.ranks.values()) == {4}


def test_an_allocator_may_answer_with_masks():
    mask = torch.tensor([True, False, True, False])
    register_allocator("masks")(lambda scores, costs, budget, **options: {name: mask for name in scores})
    try:
        model = make_net(ranks="masks", search="static")
        search = hlk.RankSearch(model, dataloader=[net_batch(0)])
        search.start()
    finally:
        del _allocators["masks"]
    assert set(search.ranks.values()) == {2}
    assert all(torch.equal(model.get_submodule(path).lora_mask, mask) for path in path_names(model))


def test_patching_under_inference_mode_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig())
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_a_wrapped_model_is_refused_with_the_order():
    wrapped = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="apply_heterolora first"):
        hlk.apply_heterolora(wrapped, hlk.HeteroLoraConfig())


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm],
                         ids=["hook", "parametrization"])
def test_a_computed_weight_is_refused_by_name(norm):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), norm(torch.nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="1: its weight is computed"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig(target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match=r"1 \[.*\]: its weight is computed"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig())


def test_names_that_match_nothing_are_said():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"exclude_modules: \['down_prj'\]"):
        hlk.apply_heterolora(copy.deepcopy(model), hlk.HeteroLoraConfig(exclude_modules=["down_prj"]))
    with pytest.raises(ValueError, match="sites: .*LlamaDecodrLayer"):
        hlk.apply_heterolora(torch.nn.Sequential(model), hlk.HeteroLoraConfig(
            shortcuts="all", sites={"LlamaDecodrLayer": hlk.Site("a", "b", "c", "d"),
                                    "Sequential": hlk.Site("0", "0", "0", "0")}))
