"""A search over rows, end to end; the optimizers that it refuses; two processes. Rows under optimizers:
test_inactive_rows and test_reactivation.

Run as a script, this file is one of two gloo processes.
"""

from __future__ import annotations

import io
import math
import os
import sys

import pytest
import torch
from helpers_jobs import WORLD, launch, work
from helpers_search import (
    NET_PATHS,
    adapter,
    fill_B,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    same_bits,
    snapshot,
    train_step,
    trainable,
)
from torch.nn.parallel import DistributedDataParallel
from transformers.optimization import Adafactor as TransformersAdafactor

import heterolora_kernels as hlk

PATTERN = {"layers.1": 2, "layers.3": 7}
MODELS = {
    "net": (lambda **config: make_net(**config), net_batch),
    "llama": (lambda **config: make_llama(**config), llama_batch),
    "mixed-ranks": (lambda **config: make_net(rank_pattern=PATTERN, **config), net_batch),
}
every_model = pytest.mark.parametrize("kind", MODELS)
every_score = pytest.mark.parametrize("score", ["probe", "in_step"])


def masks_of(model, paths):
    return {path: adapter(model, path).lora_mask.tolist() for path in paths}


def row_parameters(model, path):
    """Parameters of one row: in_features and out_features."""
    return adapter(model, path).lora_A.shape[1] + adapter(model, path).lora_B.shape[0]


def graded_run(kind, steps, **config):
    """Yields ``(model, search, masks)`` after the start and after every step."""
    make, batch = MODELS[kind]
    model = make(**{"ranks": "graded", "interval": 2, "num_batches": 2, "budget": 0.4, **config})
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    search = hlk.RankSearch(model, optimizer, [batch(90), batch(91)])
    search.start()
    yield model, search, masks_of(model, search.paths)
    for step in range(steps):
        train_step(model, optimizer, batch(step), search)
        yield model, search, masks_of(model, search.paths)


def last_of(run):
    return list(run)[-1]


# ---- what a search over rows does ----

@every_score
@every_model
def test_masks_that_are_no_prefixes_occur(kind, score):
    seen = [mask for _, _, masks in graded_run(kind, 6, score=score, warmup=1) for mask in masks.values()]
    assert any(mask != sorted(mask, reverse=True) for mask in seen)


@every_score
@every_model
def test_the_best_rows_are_on(kind, score):
    model, search, masks = last_of(graded_run(kind, 4, score=score, warmup=1))
    scores = search.history[-1]["scores"]
    every = sorted((value for rows in scores.values() for value in rows), reverse=True)
    on = [value for path, mask in masks.items() for value, active in zip(scores[path], mask) if active]
    assert len(search.history) == 3 and sorted(on, reverse=True) == every[:math.floor(0.4 * len(every))]


@pytest.mark.parametrize("options", [
    pytest.param({}, id="rows"), pytest.param({"budget_unit": "parameters"}, id="parameters"),
    pytest.param({"budget_unit": "parameters", "rank_step": 2}, id="parameters-in-units"),
    pytest.param({"mode": "separated", "min_rank": 1, "budget": 0.6}, id="separated"),
    pytest.param({"mode": "lora_only"}, id="lora_only"),
])
@every_model
def test_active_parameters_are_counted_and_within_the_budget(kind, options):
    for model, search, masks in graded_run(kind, 8, **options):
        spent = sum(row_parameters(model, path) * sum(mask) for path, mask in masks.items())
        assert search.history[-1]["active_parameters"] == spent and search.history[-1]["ranks"] == {
            path: sum(mask) for path, mask in masks.items()} == search.ranks
        eligible = [path for path in masks if options.get("mode") != "lora_only" or "_proj" in path or kind != "llama"]
        share = options.get("budget", 0.4)
        if "budget_unit" in options:
            assert 0 < spent <= share * sum(row_parameters(model, path) * len(masks[path]) for path in eligible)
        else:
            assert 0 < sum(map(sum, masks.values())) <= share * sum(len(masks[path]) for path in eligible)
            assert not any(any(mask) for path, mask in masks.items() if path not in eligible)
    assert not search.history[-1]["warmup"]


@pytest.mark.parametrize("options", [{}, {"budget": 0.15}, {"mode": "separated"}, {"mode": "lora_only"}], ids=str)
@every_model
def test_warmup_puts_every_row_on_before_any_twice(kind, options):
    times, pools = {}, {}
    for _, search, masks in graded_run(kind, 12, interval=1, proxy="constant", **options):
        if not search.history[-1]["warmup"]:
            break
        for path, mask in masks.items():
            is_lora = kind != "llama" or "_proj" in path
            if options.get("mode") == "lora_only" and not is_lora:
                continue
            times[path] = [count + on for count, on in zip(times.get(path, [0] * len(mask)), mask)]
            pools.setdefault(is_lora if "mode" in options else None, set()).add(path)
        for pool in pools.values():
            counts = [count for path in pool for count in times[path]]
            assert max(counts) <= 1 + min(counts)
    assert not search.history[-1]["warmup"] and min(map(min, times.values())) >= 1


@every_score
def test_threshold_is_the_lowest_score_of_an_active_row(score):
    for _, search, masks in graded_run("mixed-ranks", 6, score=score, warmup=1, min_rank=1):
        entry = search.history[-1]
        on = [(path, j) for path, mask in masks.items() for j, active in enumerate(mask) if active]
        assert entry["threshold"] == (None if entry["warmup"] else min(entry["scores"][path][j] for path, j in on))
    assert [entry["warmup"] for entry in search.history] == [True, False, False, False]


@every_model
def test_churn_is_the_share_of_new_rows(kind):
    before, expected = None, []
    for _, search, masks in graded_run(kind, 8, warmup=2):
        now = {(path, j) for path, mask in masks.items() for j, active in enumerate(mask) if active}
        if len(search.history) > len(expected):
            expected.append(0 if before is None else len(now - before) / len(now))
        before = now
    assert [entry["churn"] for entry in search.history] == expected and len(set(expected)) > 2


@pytest.mark.parametrize("normalize", ["none", "size", "type"])
@every_score
@every_model
def test_scores_of_the_history_are_those_of_the_rows(kind, score, normalize):
    make, batch = MODELS[kind]
    model = make(ranks="graded", interval=2, num_batches=2, warmup=1, score=score, normalize=normalize)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    search = hlk.RankSearch(model, optimizer, [batch(90), batch(91)])
    train_step(model, optimizer, batch(0), search)
    train_step(model, optimizer, batch(1))
    scores = search.score(per_rank=True)
    assert search.step() and search.history[-1]["scores"] == scores
    assert [len(rows) for rows in scores.values()] == [len(mask) for mask in masks_of(model, scores).values()]
    assert len({value for rows in scores.values() for value in rows}) > len(scores)


def test_ranks_of_a_search_are_multiples_of_the_step_or_full():
    ranks = [search.ranks for _, search, _ in graded_run("mixed-ranks", 8, rank_step=3, warmup=2)]
    assert {(path, rank) for entry in ranks for path, rank in entry.items()} <= {
        (path, rank) for path in NET_PATHS for rank in (0, 3, 6, {"layers.1": 2, "layers.3": 7}.get(path, 4))}
    assert {0, 3} <= {rank for entry in ranks for rank in entry.values()}


@pytest.mark.parametrize("options", [
    pytest.param({"min_rank": 1}, id="1"), pytest.param({"min_rank": 3, "budget": 0.7}, id="3-above-a-paths-rank"),
    pytest.param({"min_rank": 2, "rank_step": 2, "budget_unit": "parameters", "budget": 0.8}, id="2-in-units"),
])
@every_score
def test_floor_holds_throughout(score, options):
    run = list(graded_run("mixed-ranks", 12, score=score, **options))
    for _, _, masks in run:
        assert all(sum(mask) >= min(options["min_rank"], len(mask)) for mask in masks.values())
        assert not all(map(all, masks.values()))
    assert not run[-1][1].history[-1]["warmup"]


def test_floor_that_the_budget_cannot_pay_is_an_error_at_the_start():
    search = hlk.RankSearch(make_net(ranks="graded", min_rank=3, budget=0.5))
    with pytest.raises(ValueError, match="min_rank 3 .*budget 0.5"):
        search.start()
    assert set(search.ranks.values()) == {4} and search.history == []


@every_model
def test_printed_active_parameters_are_those_of_the_rows(kind, capsys):
    for model, search, _ in graded_run(kind, 4, warmup=1):
        capsys.readouterr()
        hlk.print_trainable_parameters(model)
        assert capsys.readouterr().out.strip().endswith(f"active params: {search.history[-1]['active_parameters']:,d}")


def test_an_allocation_by_hand_takes_scores_of_rows_or_of_paths():
    model = make_net(ranks="graded", search="off", budget=3)
    search = hlk.RankSearch(model)
    search.apply(search.allocate({**dict.fromkeys(NET_PATHS, 0.0), "layers.2": [1.0, 5.0, 2.0, 4.0]}))
    assert masks_of(model, NET_PATHS)["layers.2"] == [False, True, True, True] and sum(search.ranks.values()) == 3


def saved(*states):
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(kind, cut, steps, **config):
    """``(history, parameters, generator)`` of a run that goes on from a file after ``cut`` steps."""
    make, batch = MODELS[kind]

    def parts(weights):
        model = make(weights=weights, ranks="graded", **config)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
        return model, optimizer, hlk.RankSearch(model, optimizer, [batch(90), batch(91)])

    model, optimizer, search = parts(0)
    for step in range(steps):
        if step == cut:
            states = saved(model.state_dict(), optimizer.state_dict(), search.state_dict())
            model, optimizer, search = parts(1)
            fill_B(model, 99)
            for part, state in zip((model, optimizer, search), states):
                part.load_state_dict(state)
        train_step(model, optimizer, batch(step), search)
    return search.history, snapshot(model), search.state_dict()["generator"]


@pytest.mark.parametrize("kind, config, cuts", [
    pytest.param("net", {"score": "in_step", "warmup": 1}, range(13), id="in_step"),
    pytest.param("mixed-ranks", {"score": "probe", "rank_step": 2, "min_rank": 2, "budget": 0.7, "interval": 2}, (1, 4, 6, 9),
                 id="units-and-floors"),
    pytest.param("mixed-ranks", {"budget": 0.4, "budget_unit": "parameters", "interval": 1}, (1, 2, 3, 5), id="warm-up"),
    pytest.param("mixed-ranks", {"warmup": 1, "budget": 0.4, "budget_unit": "parameters", "score_decay": 0.7, "hysteresis": 0.2},
                 (1, 3, 5, 8, 10, 12), id="decay-and-hysteresis"),
    pytest.param("llama", {"score": "in_step", "warmup": 1, "mode": "separated"}, (2, 5), id="llama"),
])
def test_resumed_search_over_rows_allocates_as_the_unbroken_one(kind, config, cuts):
    config, steps = {"interval": 3, "num_batches": 2, **config}, max(cuts) + 2
    history, parameters, generator = resumed(kind, None, steps, **config)
    assert len(history) > 2 and not history[-1]["warmup"]
    for cut in cuts:
        again = resumed(kind, cut, steps, **config)
        assert again[0] == history and same_bits(again[1], parameters) and torch.equal(again[2], generator), f"after step {cut}"


# ---- optimizers that rows cannot have ----

class AdamW8bit(torch.optim.AdamW):
    """By its name one whose state stands in blocks."""


class RowMeans(torch.optim.Optimizer):
    """Keeps one number per row: of no known name, told by the shape of its state."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.01))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("row_mean", torch.zeros(p.shape[0]))
                    mean.lerp_(p.grad.pow(2).mean(1), 0.1)
                    p.sub_(p.grad / (mean.sqrt()[:, None] + 1e-8), alpha=group["lr"])


class Wrapper:
    """Passes everything on to ``optimizer``, as wrappers of training libraries do."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optimizer.step()


REFUSED = {
    "LBFGS": lambda p: torch.optim.LBFGS(p), "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adafactor-transformers": lambda p: TransformersAdafactor(p), "AdamW8bit": AdamW8bit,
    "PagedLion4bit": lambda p: type("PagedLion4bit", (torch.optim.Adam,), {})(p),
    "AdamWFp8": lambda p: type("AdamWFp8", (torch.optim.Adam,), {})(p),
    "MyShampoo": lambda p: type("MyShampoo", (type("Shampoo", (torch.optim.Adam,), {}),), {})(p),
    "AdamW8bit-wrapped": lambda p: Wrapper(AdamW8bit(p)),
}
if hasattr(torch.optim, "Muon"):
    REFUSED["Muon"] = lambda p: torch.optim.Muon(p)
refused = pytest.mark.parametrize("name", REFUSED)


def gradient(model, optimizer, number=0):
    model.zero_grad()
    model(**net_batch(number)).loss.backward()
    return (lambda: torch.zeros(()),) if isinstance(optimizer, torch.optim.LBFGS) else ()


@refused
def test_search_over_rows_refuses_the_optimizer_by_name(name):
    model = make_net(ranks="graded")
    with pytest.raises(ValueError, match=rf"optimizer: {name.partition('-')[0]} .*ranks='graded'"):
        hlk.RankSearch(model, REFUSED[name](trainable(model)))


@refused
def test_step_of_the_optimizer_is_refused_by_name(name):
    model = make_net(ranks="graded")
    search, optimizer = hlk.RankSearch(model), REFUSED[name](trainable(model))
    if name != "LBFGS":
        # Its closure is an error of its own once rows are off.
        search.start()
    before, closure = snapshot(model), gradient(model, optimizer)
    after_forward = snapshot(model)
    with pytest.raises(ValueError, match=rf"optimizer: {name.partition('-')[0]} .*ranks='graded'"):
        optimizer.step(*closure)
    assert all(torch.equal(before[name], after_forward[name]) for name in before if "lora" in name)
    assert same_bits(snapshot(model), after_forward)


@pytest.fixture
def accelerator(monkeypatch):
    """accelerate on the CPU; what it keeps for the process goes after the test."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    from accelerate.state import AcceleratorState, GradientState, PartialState
    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState, PartialState)]
    for state, _ in kept:
        state._shared_state.clear()
    yield accelerate.Accelerator(cpu=True)
    for state, values in kept:
        state._shared_state.clear()
        state._shared_state.update(values)


@pytest.mark.parametrize("when", ["search", "step"])
def test_optimizer_inside_accelerates_wrapper_is_refused_by_name(when, accelerator):
    model = make_net(ranks="graded")
    optimizer = accelerator.prepare_optimizer(torch.optim.Adafactor(trainable(model)))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    if when == "step":
        hlk.RankSearch(model).start()
        gradient(model, optimizer)
    with pytest.raises(ValueError, match="optimizer: Adafactor "):
        optimizer.step() if when == "step" else hlk.RankSearch(model, optimizer)


def test_elementwise_optimizer_inside_accelerates_wrapper_trains_rows(accelerator):
    model = make_net(ranks="graded", interval=2)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(trainable(model), lr=0.01))
    search = hlk.RankSearch(model, optimizer)
    search.start()
    before, masks = snapshot(model), masks_of(model, NET_PATHS)
    train_step(model, optimizer, net_batch(0), set_to_none=False)
    for path, mask in masks.items():
        rows, lora_A = torch.tensor(mask), adapter(model, path).lora_A
        assert (lora_A != before[f"{path}.lora_A"]).any(1).tolist() == rows.tolist()


def test_state_of_another_shape_is_refused_at_the_second_step():
    model = make_net(ranks="graded", interval=50)
    optimizer = RowMeans(trainable(model))
    search = hlk.RankSearch(model, optimizer)
    search.apply({"layers.1": [True, False, False, True]})
    train_step(model, optimizer, net_batch(0), set_to_none=False)
    gradient(model, optimizer, 1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"optimizer: RowMeans keeps state 'row_mean' .*layers\.1"):
        optimizer.step()
    assert same_bits(snapshot(model), before)


def test_state_of_another_shape_is_no_matter_while_no_path_is_partly_on():
    model = make_net(ranks="graded", interval=50)
    optimizer = RowMeans(trainable(model))
    hlk.RankSearch(model, optimizer).apply({"layers.1": 0})
    for step in range(3):
        train_step(model, optimizer, net_batch(step))
    assert optimizer.state[adapter(model, "layers.0").lora_A]["row_mean"].all()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "LBFGS"] + ["RowMeans"])
def test_binary_ranks_work_with_any_optimizer(name):
    model = make_net(ranks="binary", interval=2, budget=0.25)
    optimizer = {**REFUSED, "RowMeans": RowMeans}[name](trainable(model))
    search = hlk.RankSearch(model, optimizer)
    search.start()
    for step in range(6):
        off = [path for path, rank in search.ranks.items() if rank == 0]
        before = snapshot(model)
        model.zero_grad(set_to_none=False)
        model(**net_batch(step)).loss.backward()
        optimizer.step()
        moved = {path: not torch.equal(adapter(model, path).lora_A, before[f"{path}.lora_A"])
                 or not torch.equal(adapter(model, path).lora_B, before[f"{path}.lora_B"]) for path in NET_PATHS}
        assert moved == {path: path not in off for path in NET_PATHS} and len(off) == 3
        search.step()


def test_binary_search_takes_lbfgs_while_everything_is_on():
    model = make_net(ranks="binary", interval=9, warmup=0)
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=2)
    search = hlk.RankSearch(model, optimizer)
    search.start()

    def closure():
        optimizer.zero_grad()
        loss = model(**net_batch(0)).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert model(**net_batch(0)).loss < first


# ---- two processes ----

def own_batch(rank, number):
    """A batch of this process; the second one's are longer."""
    return llama_batch(WORLD * number + rank, length=5 + 2 * rank)


def graded_masks(rank):
    model = make_llama(ranks="graded", interval=2, warmup=1, num_batches=2)
    wrapped, seen = DistributedDataParallel(model), []
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    search = hlk.RankSearch(wrapped, optimizer)
    search.start()
    for step in range(6):
        train_step(wrapped, optimizer, own_batch(rank, step), search)
        seen.append(masks_of(model, search.paths))
    return seen, search.history


def tied_masks(rank):
    """Scores all alike and generators that differ: what the processes would draw alone is not the same."""
    return [drawn_masks(10 * rank + number) for number in range(3)]


def drawn_masks(seed):
    model = make_net(ranks="graded", search="static", proxy="constant", seed=seed)
    hlk.RankSearch(model).start()
    return masks_of(model, NET_PATHS)


def own_pass_scores(rank, proxy):
    search = hlk.RankSearch(make_llama(layers=1), dataloader=[own_batch(rank, number) for number in range(2)], tolerance=0.0)
    return search.score(proxy=proxy, per_rank=proxy == "synflow")


def failing_metric(rank):
    """A metric that fails on the second process alone, in the middle of the search for a path's score."""
    calls = []

    def metric(model, batches):
        calls.append(1)
        if rank == 1 and len(calls) == 5:
            raise KeyError("no such metric")
        return float(-model(**batches[0]).loss)

    model = make_llama(layers=1, search="static", proxy="alpha_test")
    search = hlk.RankSearch(model, dataloader=[own_batch(rank, 0)], metric=metric, tolerance=0.0)
    raised = None
    try:
        search.start()
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    return raised, len(calls), search.history, all(map(all, masks_of(model, search.paths).values()))


SCENARIOS = {
    "graded": graded_masks, "tied": tied_masks,
    "synflow": lambda rank: own_pass_scores(rank, "synflow"),
    "alpha_test": lambda rank: own_pass_scores(rank, "alpha_test"),
    "failing-metric": failing_metric,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """``job(scenario)`` -> [result of process 0, of process 1]"""
    return launch(__file__, tmp_path_factory.mktemp("job"))


def test_rows_are_alike_on_both_processes(job):
    (masks, history), (others, other_history) = job("graded")
    assert masks == others and history == other_history
    assert any(0 < sum(mask) < len(mask) for mask in masks[-1].values()) and not history[-1]["warmup"]


def test_the_first_process_decides_about_tied_rows(job):
    first, second = job("tied")
    assert first == second == [drawn_masks(number) for number in range(3)] != [drawn_masks(10 + number) for number in range(3)]


@pytest.mark.parametrize("proxy", ["synflow", "alpha_test"])
def test_scores_of_own_passes_are_alike_on_both_processes(job, proxy):
    first, second = job(proxy)
    alone = [own_pass_scores(rank, proxy) for rank in range(WORLD)]
    # What each process would have found alone is not the same.
    assert first == second and alone[0] != alone[1]


def test_a_metric_that_fails_on_one_process_raises_on_both(job):
    (first, *of_first), (second, *of_second) = job("failing-metric")
    assert first == "RuntimeError: scoring failed on another process; no rank was changed"
    assert second == "KeyError: 'no such metric'" and of_first == of_second == [5, [], True]


if __name__ == "__main__":
    work(SCENARIOS, int(sys.argv[1]), sys.argv[2])


def test_state_of_a_search_over_paths_is_refused_by_one_over_rows():
    paths = hlk.RankSearch(make_net(ranks="binary", interval=1))
    paths.start()
    search = hlk.RankSearch(make_net(ranks="graded", interval=1))
    with pytest.raises(ValueError, match="state .*ranks='binary'"):
        search.load_state_dict(paths.state_dict())
