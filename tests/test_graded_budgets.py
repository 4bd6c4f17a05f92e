"""Graded ranks, as numbers: which rows are taken, in which order, and that no budget is exceeded."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from fuzzing import fuzz
from helpers_budgets import MODES, kind_of, pools_of, shares
from hypothesis import given
from hypothesis import strategies as st

import heterolora_kernels as hlk
from heterolora_kernels.allocation import available_allocators


def graded(scores, budget, *, full=None, row_costs=None, seed=0, generator=None, **options):
    """Row masks by ``allocate``. Paths are called ``lora.0``, ``shortcut.0``.

    Args:
        full: full ranks where scores do not say them.
        row_costs: parameters of one row of each path.
    """
    full = full or {path: len(rows) for path, rows in scores.items()}
    row_costs = row_costs or dict.fromkeys(scores, 10)
    return hlk.allocate(scores, {path: row_costs[path] * full[path] for path in scores}, budget,
                        kinds={path: kind_of(path) for path in scores}, max_ranks=full, ranks="graded",
                        generator=generator or torch.Generator().manual_seed(seed), **options)


def distinct(ranks, seed=0):
    """Scores per row, no two alike, of paths of these full ranks (negative: of a shortcut)."""
    draw = random.Random(seed)
    names = [f"{'lora' if rank > 0 else 'shortcut'}.{i}" for i, rank in enumerate(ranks)]
    return {name: [draw.uniform(-1, 1) for _ in range(abs(rank))] for name, rank in zip(names, ranks)}


def counts(masks, kind=""):
    return [sum(mask) for path, mask in masks.items() if path.startswith(kind)]


def by_hand(scores, budget, mode, costs, step=1, floor=0):
    """Graded ranks once more: again and again the path whose next unit is best takes it, or takes no more."""
    masks = {path: [False] * len(rows) for path, rows in scores.items()}
    pools = pools_of(scores, mode)
    for pool, left in zip(pools, shares(budget, [sum(costs[path] * len(scores[path]) for path in pool) for pool in pools])):
        best = {path: sorted(range(len(scores[path])), key=lambda j: -scores[path][j]) for path in pool}
        for path in pool:
            for j in best[path][:floor]:
                masks[path][j] = True
            left -= costs[path] * len(best[path][:floor])
            best[path] = best[path][floor:]
        while any(best.values()):
            path = max((path for path in pool if best[path]),
                       key=lambda path: sum(scores[path][j] for j in best[path][:step]) / len(best[path][:step]))
            unit = best[path][:step]
            if costs[path] * len(unit) > left:
                best[path] = []
                continue
            left -= costs[path] * len(unit)
            best[path] = best[path][step:]
            for j in unit:
                masks[path][j] = True
    return masks


# ---- graded ranks, rows as the unit ----


def all_masks(scores):
    options = [itertools.product([False, True], repeat=len(rows)) for rows in scores.values()]
    return (dict(zip(scores, map(list, choice))) for choice in itertools.product(*options))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode, budget, limits", [
    pytest.param("combined", 0.5, {"": 5}, id="combined"),
    pytest.param("combined", 7, {"": 7}, id="combined-int"),
    pytest.param("separated", 0.5, {"lora": 3, "shortcut": 2}, id="separated"),
    pytest.param("lora_only", 0.5, {"lora": 3, "shortcut": 0}, id="lora_only"),
])
def test_rows_are_the_best_of_all_choices_within_the_budget(mode, budget, limits, seed):
    scores = distinct([3, 3, -4], seed)
    worth = {path: [value + 1 for value in rows] for path, rows in scores.items()}

    def total(masks):
        return sum(value for path, mask in masks.items() for value, on in zip(worth[path], mask) if on)

    fitting = (masks for masks in all_masks(scores)
               if all(sum(counts(masks, kind)) <= limit for kind, limit in limits.items()))
    assert graded(scores, budget, mode=mode) == max(fitting, key=total)


def test_rows_of_all_paths_stand_in_one_order():
    scores = {"lora.0": [1.0, 9.0, 2.0], "shortcut.0": [8.0, 0.0], "lora.1": [3.0, 7.0]}
    assert graded(scores, 4) == {"lora.0": [False, True, False], "shortcut.0": [True, False], "lora.1": [True, True]}


@pytest.mark.parametrize("budget, rows", [
    pytest.param(0.25, 7, id="a-share-is-rounded-down"), pytest.param(0.05, 1, id="one-row"), pytest.param(1.0, 30, id="all"),
    pytest.param(11, 11, id="int"), pytest.param(30, 30, id="int-all"),
])
def test_budget_in_modules_counts_rows(budget, rows):
    assert sum(counts(graded(distinct([8, 8, -4, -10]), budget))) == rows


@pytest.mark.parametrize("mode, lora, shortcut", [
    pytest.param("separated", 4, 3, id="separated"), pytest.param("lora_only", 4, 0, id="lora_only"),
])
def test_share_of_each_pool_is_rounded_down(mode, lora, shortcut):
    # 0.25 of 16 and of 14 rows: the shortcuts' share is not rounded as the published count of modules is.
    masks = graded(distinct([8, 8, -4, -10]), 0.25, mode=mode)
    assert (sum(counts(masks, "lora")), sum(counts(masks, "shortcut"))) == (lora, shortcut)


@pytest.mark.parametrize("budget, lora, shortcut", [(6, 4, 2), (3, 2, 1), (12, 8, 4)])
def test_int_budget_is_shared_out_in_proportion_to_rows_when_separated(budget, lora, shortcut):
    masks = graded(distinct([4, 4, -4]), budget, mode="separated")
    assert (sum(counts(masks, "lora")), sum(counts(masks, "shortcut"))) == (lora, shortcut)


def test_result_is_a_mask_for_every_path_in_order():
    scores = distinct([5, -2, 3])
    masks = graded(scores, 2)
    assert list(masks) == list(scores) and [len(mask) for mask in masks.values()] == [5, 2, 3]
    assert {type(on) for mask in masks.values() for on in mask} == {bool}


def test_negative_scores_are_ranked_as_any():
    assert graded({"lora.0": [-5.0, -1.0], "lora.1": [-3.0, -2.0]}, 2) == {"lora.0": [False, True], "lora.1": [False, True]}


@pytest.mark.parametrize("budget, rows", [(2, 2), (3, 3)])
def test_one_number_for_a_path_counts_for_each_of_its_rows(budget, rows):
    full = {"lora.0": 3, "lora.1": 2}
    assert counts(graded({"lora.0": 2.0, "lora.1": [1.0, 1.5]}, budget, full=full)) == [rows, 0]
    assert graded({"lora.0": 2.0, "lora.1": [1.0, 3.0]}, budget, full=full, seed=4) == graded(
        {"lora.0": [2.0] * 3, "lora.1": [1.0, 3.0]}, budget, seed=4)


def test_arguments_are_not_written_to():
    scores = distinct([4, -3])
    before = {path: list(rows) for path, rows in scores.items()}
    graded(scores, 0.5, rank_step=2)
    assert scores == before


# ---- units of several rows ----


@pytest.mark.parametrize("step, budget, expected", [
    pytest.param(2, 4, [2, 2], id="two"), pytest.param(2, 5, [5, 0], id="the-last-unit-is-smaller"),
    pytest.param(3, 4, [3, 0], id="three"), pytest.param(4, 9, [5, 4], id="full-ranks"),
])
def test_rows_are_taken_in_units(step, budget, expected):
    # Means of the units of 2: 9, 7, 5 and 8, 2.5; of 3: 8.67, 5.5 and 6.33, 1; of 4: 8, 5 and 5.25.
    scores = {"lora.0": [9.0, 9.0, 7.0, 7.0, 5.0], "lora.1": [8.0, 8.0, 4.0, 1.0]}
    if (step, budget) == (2, 5):
        scores = {"lora.0": [9.0, 9.0, 7.0, 7.0, 5.0], "lora.1": [4.0, 4.0, 4.0, 1.0]}
    assert counts(graded(scores, budget, rank_step=step)) == expected


def test_a_unit_is_made_of_the_best_rows_of_its_path():
    assert graded({"lora.0": [1.0, 5.0, 2.0, 4.0], "lora.1": [0.0] * 4}, 2, rank_step=2) == {
        "lora.0": [False, True, False, True], "lora.1": [False] * 4}


def test_the_mean_decides_between_units():
    # One high row does not carry a poor one: 5.5 against 6.
    assert counts(graded({"lora.0": [10.0, 1.0], "lora.1": [6.0, 6.0]}, 2, rank_step=2)) == [0, 2]


def test_a_path_whose_unit_does_not_fit_takes_no_smaller_one():
    # 3 rows are left when the second unit of lora.0 is due; its third, of one row, would fit.
    assert counts(graded({"lora.0": [9.0] * 4 + [8.0] * 4 + [7.0], "lora.1": [1.0] * 3}, 7, rank_step=4)) == [4, 3]


def test_what_does_not_fit_is_skipped():
    assert counts(graded({"lora.0": [9.0] * 4, "lora.1": [5.0] * 3}, 3, rank_step=4)) == [0, 3]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_budget_below_every_unit_is_an_error_that_names_it(step):
    with pytest.raises(ValueError, match=rf"budget 1 .*{step}"):
        graded(distinct([4, 6]), 1, rank_step=step)


# ---- floors ----


def test_every_path_keeps_its_floor():
    scores = {"lora.0": [9.0, 8.0, 7.0], "lora.1": [1.0, 3.0, 2.0], "shortcut.0": [0.1, 0.2]}
    assert graded(scores, 5, min_rank=1) == {"lora.0": [True] * 3, "lora.1": [False, True, False], "shortcut.0": [False, True]}


def test_floors_are_paid_from_the_budget():
    scores = {"lora.0": [9.0] * 4, "lora.1": [1.0] * 4, "lora.2": [2.0] * 4}
    assert counts(graded(scores, 6, min_rank=1)) == [4, 1, 1]
    assert counts(graded(scores, 7, min_rank=2)) == [3, 2, 2]


def test_floors_alone_may_use_up_the_budget():
    assert counts(graded(distinct([4, 5, -3]), 6, min_rank=2)) == [2, 2, 2]


def test_floor_above_a_paths_rank_is_its_full_rank():
    assert counts(graded({"lora.0": [1.0, 1.0], "lora.1": [9.0] * 6}, 7, min_rank=4)) == [2, 5]


def test_floors_of_lora_only_are_those_of_lora():
    assert counts(graded(distinct([4, 4, -4]), 4, min_rank=2, mode="lora_only")) == [2, 2, 0]


def test_floors_come_in_units():
    masks = graded({"lora.0": [9.0] * 5, "lora.1": [1.0, 3.0, 4.0, 2.0, 0.0]}, 7, min_rank=2, rank_step=2)
    assert masks == {"lora.0": [True] * 5, "lora.1": [False, True, True, False, False]}


@pytest.mark.parametrize("mode, budget, unit", [
    pytest.param("combined", 5, "modules", id="combined"), pytest.param("combined", 0.4, "modules", id="share"),
    pytest.param("separated", 0.5, "modules", id="separated"), pytest.param("combined", 59, "parameters", id="parameters"),
    pytest.param("lora_only", 3, "modules", id="lora_only"),
])
def test_budget_below_the_floors_is_an_error_that_names_both(mode, budget, unit):
    # The floors cost 6 rows; separated: 4 of the 4 that half of 8 rows buys, and 2 of half of 3.
    with pytest.raises(ValueError, match=rf"min_rank 2 .*budget\s+{budget}"):
        graded(distinct([4, 4, -3]), budget, min_rank=2, mode=mode, budget_unit=unit)


# ---- rows that cost unlike numbers of parameters ----

COSTS = {"lora.0": 30, "lora.1": 7, "shortcut.0": 11}
PRICED = {"lora.0": [9.0, 8.0, 1.0], "lora.1": [7.0, 3.0, 2.0], "shortcut.0": [6.0, 5.0]}  # 90 + 21 + 22 parameters


@pytest.mark.parametrize("budget, expected", [
    pytest.param(30, [1, 0, 0], id="one-row"), pytest.param(29, [0, 1, 2], id="skips-what-is-too-dear"),
    pytest.param(58, [1, 2, 1], id="skips-and-goes-on"), pytest.param(60, [2, 0, 0], id="exactly"),
    pytest.param(0.5, [2, 0, 0], id="share"), pytest.param(133, [3, 3, 2], id="all"),
    pytest.param(1.0, [3, 3, 2], id="share-all"),
])
def test_budget_in_parameters_is_spent_from_the_top(budget, expected):
    # 58: 30 for the row of score 9, none for 8, 7 for 7, 11 for 6, none for 5, 7 for 3; 3 are left.
    assert counts(graded(PRICED, budget, row_costs=COSTS, budget_unit="parameters")) == expected


@pytest.mark.parametrize("mode, expected", [
    pytest.param("combined", [2, 0, 0], id="combined"),          # 66 of 133
    pytest.param("separated", [1, 3, 1], id="separated"),        # 55 of 111, 11 of 22
    pytest.param("lora_only", [1, 3, 0], id="lora_only"),        # 55 of 111
])
def test_share_of_parameters_is_one_of_the_eligible_paths(mode, expected):
    assert counts(graded(PRICED, 0.5, row_costs=COSTS, budget_unit="parameters", mode=mode)) == expected


def test_units_cost_what_their_rows_do():
    scores = {"lora.0": [9.0, 9.0, 9.0], "lora.1": [1.0, 1.0]}
    assert counts(graded(scores, 59, row_costs={"lora.0": 30, "lora.1": 7}, budget_unit="parameters", rank_step=2)) == [0, 2]


@pytest.mark.parametrize("unit, total, what", [("modules", 8, "rows"), ("parameters", 133, "parameters")])
def test_int_budget_above_everything_is_an_error_that_names_it(unit, total, what):
    with pytest.raises(ValueError, match=rf"budget is {total + 1}.*{total} .*{what}"):
        graded(PRICED, total + 1, row_costs=COSTS, budget_unit=unit)


@pytest.mark.parametrize("unit, budget", [("modules", 0.1), ("parameters", 0.007), ("parameters", 6)])
def test_budget_that_buys_no_row_is_an_error_that_names_it(unit, budget):
    with pytest.raises(ValueError, match=f"budget {budget} "):
        graded(PRICED, budget, row_costs=COSTS, budget_unit=unit)


# ---- ties ----

TIED = {"lora.0": [1.0] * 6, "shortcut.0": [1.0] * 4, "lora.1": [1.0] * 5}


@pytest.mark.parametrize("options", [{}, {"rank_step": 2}, {"budget_unit": "parameters"}, {"min_rank": 1}, {"mode": "separated"}],
                         ids=str)
def test_ties_are_the_same_for_the_same_seed_and_others_for_others(options):
    masks = [str(graded(TIED, 0.4, seed=seed, **options)) for seed in range(6)]
    assert str(graded(TIED, 0.4, seed=3, **options)) == masks[3] and len(set(masks)) > 2


def test_every_tied_row_can_win():
    winners = {str(graded(TIED, 1, seed=seed)) for seed in range(120)}
    assert len(winners) == 15


def test_ties_are_drawn_anew_at_every_call():
    generator = torch.Generator().manual_seed(0)
    assert graded(TIED, 0.4, generator=generator) != graded(TIED, 0.4, generator=generator)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"rank_step": 3}, {"min_rank": 1}, {"budget_unit": "parameters"}], ids=str)
@pytest.mark.parametrize("scores", [pytest.param(TIED, id="tied"), pytest.param(distinct([6, -4, 5]), id="distinct")])
def test_one_draw_of_all_rows_per_call(scores, options, mode):
    used, expected = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    graded(scores, 0.5, mode=mode, generator=used, **options)
    torch.randperm(15, generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


def test_global_generator_is_not_read():
    before = torch.get_rng_state()
    graded(TIED, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_ties_are_random():
    scores = {"lora.0": [5.0, 1.0, 4.0], "lora.1": [1.0, 3.0]}
    winners = [graded(scores, 4, seed=seed) for seed in range(20)]
    assert all(m["lora.0"][0] and m["lora.0"][2] and m["lora.1"][1] for m in winners) and len({str(m) for m in winners}) == 2


# ---- what is refused ----


@pytest.mark.parametrize("rows, wanted", [
    pytest.param([1.0, 2.0], r"a number or 3 numbers.*got 2", id="too-short"),
    pytest.param([1.0] * 4, r"a number or 3 numbers.*got 4", id="too-long"),
    pytest.param([], r"a number or 3 numbers.*got 0", id="empty"),
])
def test_scores_of_a_wrong_length_name_the_path(rows, wanted):
    with pytest.raises(ValueError, match=rf"scores\['lora\.1'\] must be {wanted}"):
        graded({"lora.0": [1.0, 2.0], "lora.1": rows}, 2, full={"lora.0": 2, "lora.1": 3})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_row_that_is_not_finite_names_the_path(value):
    with pytest.raises(ValueError, match=r"scores must be finite.*lora\.1"):
        graded({"lora.0": [1.0, 2.0], "lora.1": [1.0, value, 2.0]}, 2)


def test_binary_ranks_take_no_scores_per_row():
    with pytest.raises(ValueError, match=r"scores\['lora\.0'\] must be a number for ranks='binary', got 2 numbers"):
        hlk.allocate({"lora.0": [1.0, 2.0]}, {"lora.0": 20}, 1, kinds={"lora.0": "lora"}, max_ranks={"lora.0": 2},
                     generator=torch.Generator())


@pytest.mark.parametrize("options, name", [
    pytest.param({"rank_step": 0}, "rank_step", id="no-step"), pytest.param({"min_rank": -1}, "min_rank", id="negative-floor"),
    pytest.param({"rank_step": 2, "min_rank": 3}, "min_rank", id="floor-between-steps"),
    pytest.param({"budget_unit": "bytes"}, "budget_unit", id="unit"), pytest.param({"mode": "both"}, "mode", id="mode"),
])
def test_bad_option_names_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        graded(distinct([4, 4]), 2, **options)


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, math.nan, True], ids=str)
def test_bad_budget_names_the_argument(budget):
    with pytest.raises(ValueError, match="budget"):
        graded(distinct([4, 4]), budget)


def test_graded_is_an_available_allocator():
    assert {"binary", "graded"} <= set(available_allocators())


# ---- whatever the numbers are ----

ranks_drawn = st.lists(st.integers(1, 7), min_size=1, max_size=6).flatmap(
    lambda ranks: st.tuples(*(st.sampled_from([rank, -rank]) for rank in ranks)))
budgets = st.one_of(st.floats(0.01, 1.0), st.integers(1, 40))
units = st.sampled_from(["modules", "parameters"])


def price(scores, unit):
    """Cost of a row of each path: all 1 for rows, unlike for parameters."""
    return {path: 1 if unit == "modules" else 3 + 5 * i % 11 for i, path in enumerate(scores)}


@fuzz(250)
@given(ranks=ranks_drawn, budget=budgets, mode=st.sampled_from(MODES), unit=units, step=st.integers(1, 4),
       seed=st.integers(0, 3), ties=st.booleans())
def test_invariants_of_graded_ranks(ranks, budget, mode, unit, step, seed, ties):
    scores = distinct(ranks, seed)
    if ties:
        scores = {path: [float(round(2 * value)) for value in rows] for path, rows in scores.items()}
    costs, pools = price(scores, unit), pools_of(scores, mode)
    sizes = [sum(costs[path] * len(scores[path]) for path in pool) for pool in pools]
    try:
        masks = graded(scores, budget, mode=mode, row_costs=costs, budget_unit=unit, rank_step=step, seed=seed)
    except ValueError as error:
        # Which budgets are refused: test_graded_ranks_are_those_taken_by_hand.
        assert "budget" in str(error)
        return
    for pool, size, limit in zip(pools, sizes, shares(budget, sizes)):
        spent = sum(costs[path] * sum(masks[path]) for path in pool)
        assert spent <= limit
        if step == 1 and unit == "modules":
            assert spent == min(limit, size)
    assert sum(counts(masks)) > 0
    for path, mask in masks.items():
        assert sum(mask) % step == 0 or all(mask)
        on = [score for score, chosen in zip(scores[path], mask) if chosen]
        off = [score for score, chosen in zip(scores[path], mask) if not chosen]
        assert max(off, default=-math.inf) <= min(on, default=math.inf)
        assert not on or any(path in pool for pool in pools)


@fuzz(250)
@given(ranks=ranks_drawn, budget=budgets, mode=st.sampled_from(MODES), unit=units, step=st.integers(1, 4),
       floors=st.integers(0, 2), seed=st.integers(0, 3))
def test_graded_ranks_are_those_taken_by_hand(ranks, budget, mode, unit, step, floors, seed):
    scores = distinct(ranks, seed)
    costs, floor = price(scores, unit), floors * step
    pools = pools_of(scores, mode)
    limits = shares(budget, [sum(costs[path] * len(scores[path]) for path in pool) for pool in pools])
    total = sum(costs[path] * len(scores[path]) for pool in pools for path in pool)
    least = [sum(costs[path] * min(floor, len(scores[path])) for path in pool) for pool in pools]
    expected = None
    if (isinstance(budget, float) or budget <= total) and all(a <= b for a, b in zip(least, limits)):
        expected = by_hand(scores, budget, mode, costs, step, floor)
    if expected is None or not sum(counts(expected)):
        with pytest.raises(ValueError, match="budget"):
            graded(scores, budget, mode=mode, row_costs=costs, budget_unit=unit, rank_step=step, min_rank=floor)
    else:
        assert graded(scores, budget, mode=mode, row_costs=costs, budget_unit=unit, rank_step=step, min_rank=floor) == expected


@fuzz(100)
@given(ranks=ranks_drawn, mode=st.sampled_from(MODES), unit=units, seed=st.integers(0, 5), ties=st.booleans(),
       transform=st.sampled_from([lambda x: 2 * x + 3, lambda x: x ** 3, math.exp, lambda x: x * 1e-20, lambda x: x - 1e3]))
def test_single_rows_are_invariant_to_monotone_transforms(ranks, mode, unit, seed, ties, transform):
    scores = distinct([3, *ranks], seed)
    if ties:
        scores = {path: [round(2 * value) / 2 for value in rows] for path, rows in scores.items()}
    transformed = {path: [transform(value) for value in rows] for path, rows in scores.items()}
    options = dict(mode=mode, budget_unit=unit, row_costs=price(scores, unit), seed=seed)
    assert graded(scores, 0.6, **options) == graded(transformed, 0.6, **options)
