"""Scores of unlike paths made comparable, their moving average, and hysteresis."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_search import build, llama_batch, make_llama, net_batch, train

import heterolora_kernels as hlk
from heterolora_kernels.allocation import averaged
from heterolora_kernels.proxies import PathSize, get_proxy, normalized

SIZES = {"a.q": PathSize(4.0, 100, "q"), "b.q": PathSize(4.0, 100, "q"), "a.v": PathSize(0.5, 36, "v")}
SCORES = {"a.q": 3.0, "b.q": 5.0, "a.v": 2.0}


def tensors(values: dict) -> dict:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def result(values: dict, proxy: str, how: str) -> dict:
    return {name: value.tolist() for name, value in normalized(tensors(values), get_proxy(proxy), how, SIZES).items()}


def test_scale_divides_by_s_to_the_degree():
    assert result(SCORES, "grad_norm", "scale") == {"a.q": 0.75, "b.q": 1.25, "a.v": 4.0}
    assert result(SCORES, "taylor", "scale") == {"a.q": 3 / 16, "b.q": 5 / 16, "a.v": 8.0}


def test_size_divides_by_the_root_of_the_parameters_of_a_path_or_a_row():
    assert result(SCORES, "grad_norm", "size") == pytest.approx({"a.q": 0.3, "b.q": 0.5, "a.v": 1 / 3})
    rows = result({"a.q": [4.0, 2.0, 0.0, 6.0]}, "grad_norm", "size")
    assert rows["a.q"] == pytest.approx([4 / 5, 2 / 5, 0.0, 6 / 5])


def test_type_is_a_z_score_among_modules_of_one_kind():
    assert result(SCORES, "grad_norm", "type") == pytest.approx({"a.q": -1.0, "b.q": 1.0, "a.v": 0.0})
    rows = result({"a.q": [1.0, 2.0], "b.q": [3.0, 6.0], "a.v": [7.0, 7.0]}, "grad_norm", "type")
    spread = math.sqrt(sum((x - 3) ** 2 for x in (1, 2, 3, 6)) / 4)
    assert rows["a.q"] + rows["b.q"] == pytest.approx([-2 / spread, -1 / spread, 0.0, 3 / spread])
    assert rows["a.v"] == [0.0, 0.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
@pytest.mark.parametrize("how", ["scale", "size", "type"])
def test_equal_scores_stay_finite(how, value):
    found = result(dict.fromkeys(SIZES, value), "grad_norm", how)
    assert all(math.isfinite(score) for score in found.values())
    if how == "type":
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize("how", ["none", "scale", "size", "type"])
@pytest.mark.parametrize("proxy", ["constant", "alpha_test"])
def test_proxies_of_degree_0_are_never_normalised(proxy, how):
    assert result(SCORES, proxy, how) == SCORES


@pytest.mark.parametrize("proxy, degree", [("grad_norm", 1), ("snip", 1), ("taylor", 2), ("fisher", 2), ("gate", 1),
                                           ("synflow", 1)])
def test_scale_takes_away_what_alpha_gives_to_lora(proxy, degree):
    # So small that the outputs, and what comes back from them, are those of the base: what is left of alpha is its own factor.
    def scores(alpha: float, normalize: str) -> dict:
        model = make_llama(shortcuts=(), lora_alpha=alpha, normalize=normalize, score="probe", dtype=torch.float64)
        return hlk.RankSearch(model).score([llama_batch(0)], proxy=proxy)

    small, large = scores(1e-6, "none"), scores(4e-6, "none")
    # Under synflow, q and k get next to nothing where all positions are fed alike: what is left is rounding.
    names = [name for name in small if small[name] > 1e-9 * max(small.values())]
    assert len(names) >= 2 * 5 and all(large[name] == pytest.approx(4**degree * small[name], rel=1e-4) for name in names)
    first, second = scores(1e-6, "scale"), scores(4e-6, "scale")
    assert all(first[name] == pytest.approx(second[name], rel=1e-4) for name in names)


def test_a_search_normalises_by_the_type_of_module():
    search = hlk.RankSearch(make_llama(normalize="type", score="probe"))
    plain = hlk.RankSearch(make_llama(score="probe")).score([llama_batch(0)])
    found = search.score([llama_batch(0)])
    for kind in ("self_attn.q_proj", "mlp.down_proj", "residual_1"):
        names = [name for name in plain if name.endswith(kind)]
        assert len(names) == 2
        low, high = sorted(names, key=plain.__getitem__)
        assert (found[low], found[high]) == (pytest.approx(-1.0), pytest.approx(1.0))
    assert found["model.layers.1.shortcut_ffn"] == 0.0


# ---- over reallocations ----


def test_moving_average_begins_with_the_first_scores_and_survives_a_resume():
    def run(decay: float, resume_at: int | None = None) -> list[dict]:
        model, optimizer, search = build(lr=0.0, score_decay=decay, warmup=1, interval=2)
        train(model, optimizer, search, 5)
        if resume_at is not None:
            state, bits = search.state_dict(), model.state_dict()
            model, optimizer, search = build(lr=0.0, score_decay=decay, warmup=1, interval=2)
            model.load_state_dict(bits)
            search.load_state_dict(state)
        train(model, optimizer, search, 6, first=5)
        return search.history

    raw, averaged = run(0.0), run(0.75)
    # At a learning rate of 0 scores depend on what is on alone; the first ones see the same warm-up.
    assert averaged[1]["scores"] == raw[1]["scores"]
    assert run(0.75, resume_at=5) == averaged
    assert len(averaged) > 4 and averaged[3]["scores"] != raw[3]["scores"]


def test_moving_average_by_hand():
    first = averaged({}, {"a": 4.0, "b": [4.0, 0.0]}, 0.75)
    second = averaged(first, {"a": 8.0, "b": [8.0, 4.0]}, 0.75)
    assert first == {"a": 4.0, "b": [4.0, 0.0]} and second == {"a": 5.0, "b": [5.0, 1.0]}


def churn_of(hysteresis: float) -> list[float]:
    model, optimizer, search = build(lr=0.2, hysteresis=hysteresis, warmup=2, interval=1, budget=0.5)
    train(model, optimizer, search, 25)
    return [entry["churn"] for entry in search.history if not entry["warmup"]]


def test_hysteresis_holds_what_the_proxy_has_chosen():
    free, held = churn_of(0.0), churn_of(1e6)
    # The first scored reallocation owes nothing to the warm-up.
    assert held[0] == free[0]
    assert any(free[1:]) and not any(held[1:])
    assert sum(churn_of(0.5)) <= sum(free)


def test_hysteresis_changes_the_ranking_and_not_the_history():
    model, optimizer, search = build(lr=0.0, hysteresis=1e6, warmup=0, interval=1, score="probe",
                                     dataloader=[net_batch(0)])
    train(model, optimizer, search, 3)
    assert search.history[0]["scores"] == pytest.approx(search.history[2]["scores"])
