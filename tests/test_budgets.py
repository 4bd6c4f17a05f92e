"""Budgets in parameters and in modules, as numbers: what is taken, and that no budget is exceeded."""

from __future__ import annotations

import math
import random

import pytest
import torch
from fuzzing import fuzz
from helpers_budgets import MODES, kind_of, pools_of, shares
from helpers_search import adapter, build, make_llama, make_net, train
from hypothesis import given
from hypothesis import strategies as st

import heterolora_kernels as hlk
from heterolora_kernels.allocation import module_budget

# ---- binary ranks, parameters as the unit ----


def binary(scores, costs, budget, *, seed=0, mode="combined", budget_unit="parameters"):
    """Paths that are on."""
    ranks = hlk.allocate(scores, costs, budget, kinds={path: kind_of(path) for path in scores},
                         max_ranks=dict.fromkeys(scores, 8), mode=mode, budget_unit=budget_unit,
                         generator=torch.Generator().manual_seed(seed))
    assert list(ranks) == list(scores) and set(ranks.values()) <= {0, 8}
    return {path for path, rank in ranks.items() if rank}


PATHS = {"lora.0": 50, "lora.1": 20, "lora.2": 30, "shortcut.0": 60, "shortcut.1": 10}  # 100 and 70 parameters
FALLING = {path: float(5 - i) for i, path in enumerate(PATHS)}


@pytest.mark.parametrize("budget, expected", [
    pytest.param(50, {"lora.0"}, id="exactly"), pytest.param(49, {"lora.1", "shortcut.1"}, id="the-best-does-not-fit"),
    pytest.param(75, {"lora.0", "lora.1"}, id="goes-on"), pytest.param(95, {"lora.0", "lora.1", "shortcut.1"}, id="skips-two"),
    pytest.param(10, {"shortcut.1"}, id="the-smallest"), pytest.param(170, set(PATHS), id="all"),
    pytest.param(1.0, set(PATHS), id="share-all"), pytest.param(0.5, {"lora.0", "lora.1", "shortcut.1"}, id="half"),
])
def test_parameters_are_spent_in_the_order_of_the_scores(budget, expected):
    # 49: 20 fit, not 30 more, not 60, 10 do.
    assert binary(FALLING, PATHS, budget) == expected


@pytest.mark.parametrize("mode, expected", [
    pytest.param("combined", {"lora.0", "lora.1", "shortcut.1"}, id="combined"),  # 85 of 170
    pytest.param("separated", {"lora.0", "shortcut.1"}, id="separated"),  # 50 of 100, 35 of 70
    pytest.param("lora_only", {"lora.0"}, id="lora_only"),  # 50 of 100
])
def test_share_of_parameters_is_one_of_the_eligible_paths_of_each_pool(mode, expected):
    assert binary(FALLING, PATHS, 0.5, mode=mode) == expected


def test_int_budget_of_parameters_is_shared_out_in_proportion_when_separated():
    # 85 of 170: 50 for LoRA, 35 for shortcuts.
    assert binary(FALLING, PATHS, 85, mode="separated") == {"lora.0", "shortcut.1"}


@pytest.mark.parametrize("mode, total", [("combined", 170), ("separated", 170), ("lora_only", 100)])
def test_more_parameters_than_there_are_is_an_error_that_names_the_budget(mode, total):
    binary(FALLING, PATHS, total, mode=mode)
    with pytest.raises(ValueError, match=rf"budget is {total + 1}.*only {total} trainable parameters"):
        binary(FALLING, PATHS, total + 1, mode=mode)


@pytest.mark.parametrize("budget", [9, 0.05], ids=str)
def test_fewer_parameters_than_any_path_has_is_an_error_that_names_the_budget(budget):
    with pytest.raises(ValueError, match=rf"budget {budget} .*smallest costs 10 "):
        binary(FALLING, PATHS, budget)


def test_share_that_rounds_to_no_parameter_is_an_error_that_names_the_budget():
    with pytest.raises(ValueError, match="budget 0.005 buys none of 170 trainable parameters"):
        binary(FALLING, PATHS, 0.005)


sizes = st.lists(st.tuples(st.sampled_from(["lora", "shortcut"]), st.integers(1, 60)), min_size=1, max_size=9)


@fuzz(250)
@given(paths=sizes, budget=st.one_of(st.floats(0.01, 1.0), st.integers(1, 200)), mode=st.sampled_from(MODES),
       seed=st.integers(0, 5))
def test_parameters_are_spent_as_by_hand(paths, budget, mode, seed):
    costs = {f"{kind}.{i}": cost for i, (kind, cost) in enumerate(paths)}
    draw = random.Random(seed)
    scores = {path: draw.random() for path in costs}
    pools = pools_of(scores, mode)
    limits = shares(budget, [sum(costs[path] for path in pool) for pool in pools])
    expected = set()
    for pool, left in zip(pools, limits):
        for path in sorted(pool, key=scores.get, reverse=True):
            if sum(costs[other] for other in expected & set(pool)) + costs[path] <= left:
                expected.add(path)
    if not expected or (isinstance(budget, int) and budget > sum(costs[path] for pool in pools for path in pool)):
        with pytest.raises(ValueError, match="budget"):
            binary(scores, costs, budget, mode=mode, seed=seed)
    else:
        assert binary(scores, costs, budget, mode=mode, seed=seed) == expected


# ---- modules: the published counts ----


@pytest.mark.parametrize("p, n_lora, n_shortcut, expected", [
    pytest.param(0.25, 48, 95, (12, 24), id="opt-350m"), pytest.param(0.25, 48, 0, (12, 0), id="lora-alone"),
    pytest.param(0.33, 64, 127, (21, 42), id="32-layers"), pytest.param(0.25, 7, 3, (1, 1), id="floor-and-round"),
    pytest.param(0.5, 5, 5, (2, 2), id="half-to-even"), pytest.param(1.0, 6, 5, (6, 5), id="all"),
    pytest.param(0.01, 48, 49, (0, 0), id="nothing"),
])
def test_module_budget_floors_lora_and_rounds_shortcuts(p, n_lora, n_shortcut, expected):
    assert module_budget(p, n_lora, n_shortcut) == expected


@pytest.mark.parametrize("n_lora, n_shortcut", [(48, 95), (5, 0), (3, 7)])
def test_int_module_budget_is_met_and_in_proportion(n_lora, n_shortcut):
    for budget in range(1, n_lora + n_shortcut + 1):
        lora, shortcuts = module_budget(budget, n_lora, n_shortcut)
        assert lora + shortcuts == budget and 0 <= lora <= n_lora and 0 <= shortcuts <= n_shortcut
        assert abs(lora - budget * n_lora / (n_lora + n_shortcut)) <= 0.5


@pytest.mark.parametrize("mode, expected", [("combined", 36), ("separated", 36), ("lora_only", 12)])
def test_published_count_does_not_depend_on_sizes(mode, expected):
    names = [f"lora.{i}" for i in range(48)] + [f"shortcut.{i}" for i in range(95)]
    draw = random.Random(1)
    scores, costs = {name: draw.random() for name in names}, {name: draw.randint(1, 10 ** 6) for name in names}
    assert len(binary(scores, costs, 0.25, mode=mode, budget_unit="modules")) == expected


# ---- a search with a budget in parameters ----


def cost_of(model, path):
    return adapter(model, path).lora_A.numel() + adapter(model, path).lora_B.numel()


@pytest.mark.parametrize("ranks", ["binary", "graded"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 100])
def test_search_stays_within_its_parameters(budget, ranks):
    model, optimizer, search = build(budget=budget, budget_unit="parameters", ranks=ranks, interval=2)
    total = sum(cost_of(model, path) for path in search.paths)
    train(model, optimizer, search, 14)
    limit = budget if isinstance(budget, int) else math.floor(budget * total)
    spent = [entry["active_parameters"] for entry in search.history]
    assert len(spent) == 8 and not search.history[-1]["warmup"] and 0 < max(spent) <= limit
    # Of rows of at most 19 parameters no affordable one is left out.
    assert ranks == "binary" or min(spent) > limit - 19


def test_shares_of_parameters_on_llama_count_each_kind_when_separated():
    model = make_llama(budget=0.4, budget_unit="parameters", mode="separated", interval=1, proxy="constant")
    search = hlk.RankSearch(model)
    is_lora = {path: "_proj" in path for path in search.paths}
    for _ in range(8):
        search.step()
        for lora in (True, False):
            pool = [path for path in search.paths if is_lora[path] is lora]
            spent = sum(cost_of(model, path) for path in pool if search.ranks[path])
            assert 0 < spent <= math.floor(0.4 * sum(cost_of(model, path) for path in pool))


def test_warmup_covers_all_paths_that_the_budget_can_buy():
    # layers.1 has 76 parameters, the others 64, 64 and 44.
    model = make_net(budget=70, budget_unit="parameters", interval=1, proxy="constant")
    search, seen = hlk.RankSearch(model), set()
    search.start()
    while search.history[-1]["warmup"]:
        seen |= {path for path, rank in search.ranks.items() if rank}
        search.step()
        assert len(search.history) < 9
    assert seen == {"layers.0", "layers.2", "layers.3"} and cost_of(model, "layers.1") > 70


def test_rounding_of_means_breaks_no_unit():
    # The sum of three equal numbers, divided by three, may be less than the number.
    draw = random.Random(0)
    value = next(x for x in iter(draw.random, None) if (x + x + x) / 3 < x)
    for budget in range(1, 10):
        for seed in range(10):
            try:
                masks = hlk.allocate({"a": [value] * 5, "b": [value] * 5}, {"a": 50, "b": 50}, budget, ranks="graded",
                                     rank_step=3, kinds=dict.fromkeys("ab", "lora"), max_ranks=dict.fromkeys("ab", 5),
                                     generator=torch.Generator().manual_seed(seed))
            except ValueError:
                assert budget < 3
                continue
            assert {sum(mask) for mask in masks.values()} <= {0, 3, 5}


def test_smallest_cost_in_the_message_is_one_of_the_eligible_paths():
    with pytest.raises(ValueError, match="smallest costs 100 "):
        hlk.allocate({"a": 1.0, "s": 2.0}, {"a": 100, "s": 10}, 50, kinds={"a": "lora", "s": "shortcut"},
                     max_ranks={"a": 5, "s": 5}, mode="lora_only", budget_unit="parameters", generator=torch.Generator())
