"""Budgets, ties and errors of allocation: numbers in, ranks out."""

import math

import pytest
import torch
from fuzzing import fuzz
from helpers_search import make_net, net_batch
from hypothesis import given
from hypothesis import strategies as st

import heterolora_kernels as hlk
from heterolora_kernels import allocation


def pool(n_lora, n_shortcut, r_lora=8, r_shortcut=4):
    """Names, kinds, full ranks and costs of LoRA paths and shortcuts."""
    names = [f"lora.{i}" for i in range(n_lora)] + [f"shortcut.{i}" for i in range(n_shortcut)]
    kinds = {name: name.partition(".")[0] for name in names}
    max_ranks = {name: r_lora if kinds[name] == "lora" else r_shortcut for name in names}
    return names, kinds, max_ranks, {name: 100 * rank for name, rank in max_ranks.items()}


def share_out(scores, budget, n_lora=None, mode="combined", seed=0, generator=None, **options):
    """``allocate`` over paths named as in :func:`pool`."""
    names = list(scores)
    kinds = {name: name.partition(".")[0] for name in names}
    max_ranks = {name: 8 if kinds[name] == "lora" else 4 for name in names}
    return hlk.allocate(scores, {name: 100 for name in names}, budget, kinds=kinds, max_ranks=max_ranks, mode=mode,
                        generator=generator or torch.Generator().manual_seed(seed), **options)


def falling(n_lora, n_shortcut):
    """Scores that fall in the order of the names."""
    names = pool(n_lora, n_shortcut)[0]
    return {name: float(len(names) - i) for i, name in enumerate(names)}


def count(ranks, kind=""):
    return sum(rank > 0 for name, rank in ranks.items() if name.startswith(kind))


@pytest.mark.parametrize("mode, n_lora, n_shortcut", [
    pytest.param("combined", 36, 0, id="combined"),
    pytest.param("separated", 12, 24, id="separated"),
    pytest.param("lora_only", 12, 0, id="lora_only"),
])
def test_published_budget_of_opt_350m(mode, n_lora, n_shortcut):
    ranks = share_out(falling(48, 95), 0.25, mode=mode)
    assert (count(ranks, "lora"), count(ranks, "shortcut")) == (n_lora, n_shortcut)


@pytest.mark.parametrize("p, n_lora, n_shortcut", [
    pytest.param(0.25, 7, 3, id="floor-1.75-round-0.75"),
    pytest.param(0.33, 24, 11, id="floor-7.92-round-3.63"),
    pytest.param(0.5, 5, 3, id="floor-2.5-round-1.5"),
    pytest.param(1.0, 6, 5, id="everything"),
])
def test_float_budget_floors_lora_and_rounds_shortcuts(p, n_lora, n_shortcut):
    ranks = share_out(falling(n_lora, n_shortcut), p, mode="separated")
    assert (count(ranks, "lora"), count(ranks, "shortcut")) == (math.floor(p * n_lora), round(p * n_shortcut))


@pytest.mark.parametrize("mode", ["combined", "separated"])
@pytest.mark.parametrize("budget", [1, 2, 5, 10, 11])
def test_int_budget_is_the_number_of_paths(budget, mode):
    assert count(share_out(falling(7, 4), budget, mode=mode)) == budget


def test_int_budget_is_shared_out_in_proportion_when_separated():
    ranks = share_out(falling(20, 10), 6, mode="separated")
    assert (count(ranks, "lora"), count(ranks, "shortcut")) == (4, 2)


def test_int_budget_of_lora_only_counts_lora():
    ranks = share_out(falling(4, 4), 3, mode="lora_only")
    assert (count(ranks, "lora"), count(ranks, "shortcut")) == (3, 0)


@pytest.mark.parametrize("mode, expected", [
    pytest.param("combined", {"shortcut.1", "shortcut.0", "lora.1", "lora.3"}, id="combined"),
    pytest.param("separated", {"lora.1", "lora.3", "shortcut.1", "shortcut.0"}, id="separated"),
    pytest.param("lora_only", {"lora.1", "lora.3"}, id="lora_only"),
])
def test_highest_scores_win(mode, expected):
    scores = {"lora.0": 0.1, "lora.1": 5.0, "lora.2": -3.0, "lora.3": 1.0, "shortcut.0": 6.0, "shortcut.1": 9.0,
              "shortcut.2": 0.2, "shortcut.3": 0.0}
    assert {name for name, rank in share_out(scores, 0.5, mode=mode).items() if rank} == expected


def test_combined_is_one_ranking():
    ranks = share_out({"lora.0": 1.0, "lora.1": 2.0, "shortcut.0": 3.0, "shortcut.1": 4.0}, 0.5)
    assert (count(ranks, "lora"), count(ranks, "shortcut")) == (0, 2)


def test_chosen_paths_get_their_own_full_rank():
    assert share_out({"lora.0": 2.0, "shortcut.0": 3.0, "lora.1": 1.0}, 2) == {"lora.0": 8, "shortcut.0": 4, "lora.1": 0}


def test_result_names_every_path_in_order():
    scores = falling(9, 5)
    assert list(share_out(scores, 0.25)) == list(scores)


def test_ties_are_the_same_for_the_same_seed():
    scores = dict.fromkeys(pool(10, 10)[0], 1.0)
    assert share_out(scores, 0.5, seed=3) == share_out(scores, 0.5, seed=3)


def test_ties_depend_on_the_seed():
    scores = dict.fromkeys(pool(10, 10)[0], 1.0)
    assert len({tuple(share_out(scores, 0.5, seed=seed).values()) for seed in range(5)}) == 5


def test_every_tied_path_can_win():
    scores = dict.fromkeys(pool(4, 4)[0], 0.0)
    winners = {name for seed in range(60) for name, rank in share_out(scores, 1, seed=seed).items() if rank}
    assert winners == set(scores)


def test_ties_are_drawn_anew_at_every_call():
    scores, generator = dict.fromkeys(pool(10, 10)[0], 1.0), torch.Generator().manual_seed(0)
    assert share_out(scores, 0.5, generator=generator) != share_out(scores, 0.5, generator=generator)


@pytest.mark.parametrize("mode", ["combined", "separated", "lora_only"])
@pytest.mark.parametrize("scores", [
    pytest.param(falling(6, 5), id="no-ties"), pytest.param(dict.fromkeys(falling(6, 5), 1.0), id="all-tied"),
])
def test_one_draw_per_call(scores, mode):
    used, expected = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    share_out(scores, 0.5, mode=mode, generator=used)
    torch.randperm(len(scores), generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


def test_only_ties_are_random():
    scores = {**falling(4, 0), "shortcut.0": 0.0, "shortcut.1": 0.0}
    for seed in range(5):
        assert {name for name, rank in share_out(scores, 4, seed=seed).items() if rank} == set(falling(4, 0))


def test_global_generator_is_not_read():
    before = torch.get_rng_state()
    share_out(dict.fromkeys(pool(5, 5)[0], 1.0), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_score_that_is_not_finite_is_an_error_that_names_the_path(value):
    with pytest.raises(ValueError, match=r"scores must be finite.*lora\.2"):
        share_out({**falling(4, 2), "lora.2": value}, 0.5)


@pytest.mark.parametrize("mode, budget, n_lora, n_shortcut", [
    pytest.param("combined", 0.1, 3, 3, id="combined"),
    pytest.param("separated", 0.1, 3, 3, id="separated"),
    pytest.param("lora_only", 0.25, 3, 40, id="lora_only"),
    pytest.param("lora_only", 0.5, 0, 4, id="no-lora-paths"),
])
def test_budget_that_selects_nothing_is_an_error_that_names_it(mode, budget, n_lora, n_shortcut):
    with pytest.raises(ValueError, match="budget"):
        share_out(falling(n_lora, n_shortcut), budget, mode=mode)


@pytest.mark.parametrize("budget", [0, -1, -2, 12, 0.0, -0.5, 1.5, math.nan], ids=str)
def test_budget_out_of_range_is_an_error_that_names_it(budget):
    with pytest.raises(ValueError, match="budget"):
        share_out(falling(7, 4), budget)


@pytest.mark.parametrize("option", ["mode", "ranks"])
def test_unknown_choice_names_the_argument(option):
    with pytest.raises(ValueError, match=f"{option} must be .*'no_such'"):
        share_out(falling(4, 4), 0.5, **{option: "no_such"})


@pytest.mark.parametrize("lacking", ["costs", "kinds", "max_ranks"])
def test_missing_entry_names_argument_and_path(lacking):
    names, kinds, max_ranks, costs = pool(4, 4)
    given = {"costs": costs, "kinds": kinds, "max_ranks": max_ranks}
    del given[lacking]["shortcut.1"]
    with pytest.raises(ValueError, match=rf"{lacking} .*shortcut\.1"):
        hlk.allocate(dict.fromkeys(names, 1.0), given["costs"], 0.5, kinds=given["kinds"], max_ranks=given["max_ranks"],
                     generator=torch.Generator())


def test_arguments_are_not_written_to():
    scores = falling(5, 5)
    before = dict(scores)
    share_out(scores, 0.5)
    assert scores == before


pools = st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda sizes: sum(sizes) > 0)
modes = st.sampled_from(["combined", "separated", "lora_only"])
budgets = st.one_of(st.floats(0.01, 1.0), st.integers(1, 24))


def drawn_scores(data, sizes):
    names = pool(*sizes)[0]
    values = data.draw(st.lists(st.integers(-40, 40), min_size=len(names), max_size=len(names)))
    return dict(zip(names, map(float, values)))


def allowed(budget, sizes, mode):
    n_lora, n_shortcut = sizes
    if isinstance(budget, int):
        return budget
    return math.floor(budget * n_lora) + (0 if mode == "lora_only" else round(budget * n_shortcut))


@fuzz(150)
@given(data=st.data(), sizes=pools, mode=modes, budget=budgets, seed=st.integers(0, 5))
def test_budget_is_met_exactly_or_refused(data, sizes, mode, budget, seed):
    scores = drawn_scores(data, sizes)
    available = sizes[0] if mode == "lora_only" else sum(sizes)
    limit = allowed(budget, sizes, mode)
    if not 1 <= limit <= available:
        with pytest.raises(ValueError, match="budget"):
            share_out(scores, budget, mode=mode, seed=seed)
    else:
        assert count(share_out(scores, budget, mode=mode, seed=seed)) == limit


@fuzz(100)
@given(data=st.data(), sizes=pools, mode=modes, seed=st.integers(0, 5),
       transform=st.sampled_from([lambda x: 2 * x + 3, lambda x: x ** 3, lambda x: math.exp(x / 10), lambda x: x * 1e-20]))
def test_allocation_is_invariant_to_monotone_transforms(data, sizes, mode, seed, transform):
    scores = drawn_scores(data, (sizes[0] + 1, sizes[1]))
    transformed = {name: transform(score) for name, score in scores.items()}
    assert share_out(scores, 1, mode=mode, seed=seed) == share_out(transformed, 1, mode=mode, seed=seed)


@fuzz(100)
@given(data=st.data(), sizes=pools, p=st.floats(0.3, 1.0), seed=st.integers(0, 5))
def test_no_path_that_is_off_outscores_one_that_is_on(data, sizes, p, seed):
    scores = drawn_scores(data, (sizes[0] + 4, sizes[1]))
    ranks = share_out(scores, p, seed=seed)
    off = [scores[name] for name, rank in ranks.items() if not rank]
    assert max(off, default=-math.inf) <= min(scores[name] for name, rank in ranks.items() if rank)


@pytest.fixture
def registry(monkeypatch):
    """The registry of allocators, as it was after the test."""
    monkeypatch.setattr(allocation, "_allocators", dict(allocation._allocators))


def register_last_path():
    @hlk.register_allocator("last_path")
    def last_path(scores, costs, budget, *, kinds, max_ranks, mode, generator):
        return {path: 1 if path == list(scores)[-1] else 0 for path in scores}


def test_registered_allocator_is_used_by_allocate(registry):
    register_last_path()
    assert share_out(falling(2, 1), 0.5, ranks="last_path") == {"lora.0": 0, "lora.1": 0, "shortcut.0": 1}


def test_registered_allocator_is_used_by_a_search(registry):
    register_last_path()
    search = hlk.RankSearch(make_net(search="static", ranks="last_path"), dataloader=[net_batch(0)])
    search.start()
    assert list(search.ranks.values()) == [0, 0, 0, 1]


def test_binary_is_an_available_allocator():
    assert "binary" in allocation.available_allocators()
