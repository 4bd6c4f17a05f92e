"""alpha_test against a linear search on an eager model, its metrics, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from helpers_search import NET_PATHS, adapter, make_llama, make_net, net_batch, same_bits, snapshot, train_step, trainable
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import heterolora_kernels as hlk
from heterolora_kernels.alpha_test import accuracy, perplexity

BATCHES = [net_batch(i) for i in range(2)]


def loss_metric(model: nn.Module, batches) -> float:
    return sum(float(model(**batch).loss) for batch in batches)


def scaled_loss(patched: nn.Module, scales: dict[str, float | list[float]]) -> float:
    """The metric of an unpatched copy whose paths' deltas are multiplied, in eval mode."""
    leaves = {name: (adapter(patched, name).lora_A.detach().clone(), adapter(patched, name).lora_B.detach().clone())
              for name in NET_PATHS}
    plain = hlk.remove_heterolora(copy.deepcopy(patched)).eval()
    for name, (a, b) in leaves.items():
        scale = torch.as_tensor(scales.get(name, 1.0)) * torch.ones(4)
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, out, a=a, b=b, scale=scale: out + 4.0 * (args[0] @ a.t() * scale) @ b.t())
    with torch.no_grad():
        return loss_metric(plain, BATCHES)


def linear_search(value_at, whole: float, tolerance: float) -> float | None:
    """10 times the smallest share that is within tolerance, None where that is no threshold."""
    passes = [value_at(a / 10) <= whole + abs(whole) * tolerance for a in range(10)] + [True]
    first = passes.index(True)
    return float(first) if all(passes[first:]) else None


@pytest.fixture(scope="module")
def trained():
    """A Net whose paths all help on BATCHES, so that scaling one down costs."""
    model = make_net(search="off")
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    for step in range(60):
        train_step(model, optimizer, BATCHES[step % 2])
    return model


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.3])
def test_scores_are_those_of_a_linear_search(trained, tolerance):
    search = hlk.RankSearch(trained)
    measures = dict(metric=loss_metric, greater_is_better=False, tolerance=tolerance)
    scores = search.score(BATCHES, proxy="alpha_test", **measures)
    rows = search.score(BATCHES, proxy="alpha_test", per_rank=True, **measures)
    whole, checked = scaled_loss(trained, {}), 0
    for name in NET_PATHS:
        expected = linear_search(lambda a: scaled_loss(trained, {name: a}), whole, tolerance)
        if expected is not None:
            assert scores[name] == expected, name
            checked += expected > 0
        for j in range(4):
            expected = linear_search(lambda a: scaled_loss(trained, {name: [a if i == j else 1.0 for i in range(4)]}), whole,
                                     tolerance)
            assert expected is None or rows[name][j] == expected, (name, j)
    assert checked


def test_at_most_four_evaluations_a_path(trained):
    calls = []

    def metric(model, batches):
        calls.append(1)
        return loss_metric(model, batches)

    scores = hlk.RankSearch(trained, metric=metric, greater_is_better=False).score(BATCHES, proxy="alpha_test")
    assert len(calls) <= 1 + 4 * len(scores)
    assert set(scores.values()) <= {float(a) for a in range(11)}


def test_greater_and_smaller_and_negative_metrics_agree(trained):
    search = hlk.RankSearch(trained)

    def score(metric, **more):
        return search.score(BATCHES, proxy="alpha_test", tolerance=0.05, metric=metric, **more)

    smaller = score(loss_metric, greater_is_better=False)
    assert score(lambda model, batches: -loss_metric(model, batches)) == smaller
    assert score(lambda model, batches: torch.tensor(-loss_metric(model, batches)), greater_is_better=True) == smaller
    assert len(set(smaller.values())) > 1


def test_eval_batches_take_the_place_of_the_training_data(trained):
    search = hlk.RankSearch(trained, dataloader=[net_batch(9)], metric=loss_metric, greater_is_better=False, tolerance=0.02,
                            eval_batches=BATCHES)
    assert search.score(proxy="alpha_test") == hlk.RankSearch(trained).score(
        BATCHES, proxy="alpha_test", metric=loss_metric, greater_is_better=False, tolerance=0.02)


def test_equal_metrics_give_zero():
    scores = hlk.RankSearch(make_net(), metric=lambda model, batches: 0.0).score(BATCHES, proxy="alpha_test")
    assert set(scores.values()) == {0.0}


def test_zero_B_gives_zero_and_says_so():
    search = hlk.RankSearch(make_net(zero_B=True), metric=loss_metric, greater_is_better=False)
    with pytest.warns(UserWarning, match="'alpha_test' is 0 for every path"):
        assert set(search.score(BATCHES, proxy="alpha_test").values()) == {0.0}


# ---- metrics ----


def classifier() -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                     intermediate_size=16, num_labels=3))
    return hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2, search="off", init_B="kaiming_uniform", lora_alpha=16))


def text_batch(seed: int, labels: list[int]) -> dict:
    ids = torch.randint(20, (len(labels), 5), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": torch.tensor(labels)}


def test_accuracy_counts_labels_that_count():
    model = classifier().eval()
    batches = [text_batch(0, [0, 1, -100]), text_batch(1, [2])]
    with torch.no_grad():
        guesses = [model(input_ids=batch["input_ids"]).logits.argmax(-1).tolist() for batch in batches]
    right = (guesses[0][0] == 0) + (guesses[0][1] == 1) + (guesses[1][0] == 2)
    assert accuracy(model, batches) == right / 3
    with pytest.raises(ValueError, match="accuracy"):
        accuracy(model, [{"input_ids": batches[0]["input_ids"]}])


def test_perplexity_weighs_batches_by_their_labels():
    losses = {1: 0.5, 3: 2.0}
    batches = [{"labels": torch.tensor([1])}, {"labels": torch.tensor([1, 2, 3, -100])}]
    found = perplexity(nn.Linear(1, 1), batches, lambda model, batch: losses[int((batch["labels"] != -100).sum())])
    assert found == pytest.approx(math.exp((0.5 + 3 * 2.0) / 4))


@pytest.mark.parametrize("metric", ["accuracy", "perplexity", None])
def test_named_metrics_and_the_one_that_is_chosen(metric):
    model = classifier()
    batches = [text_batch(0, [0, 1, 2, 0, 1]), text_batch(1, [2, 1, 0, 0, 2])]
    functions = {"accuracy": (accuracy, True), None: (accuracy, True),
                 "perplexity": (lambda m, b: perplexity(m, b, lambda m, x: m(**x).loss), False)}
    function, greater = functions[metric]
    search = hlk.RankSearch(model, tolerance=0.001)
    assert search.score(batches, proxy="alpha_test", metric=metric) == \
        search.score(batches, proxy="alpha_test", metric=function, greater_is_better=greater)


def test_a_language_model_is_measured_by_perplexity(monkeypatch):
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}
    search = hlk.RankSearch(make_llama(), tolerance=0.0)
    assert search.score([batch], proxy="alpha_test") == search.score([batch], proxy="alpha_test", metric="perplexity")


# ---- errors and traces ----


@pytest.mark.parametrize("given, error, message", [
    (dict(metric="rouge"), ValueError, "metric"),
    (dict(metric="accuracy", greater_is_better=True), ValueError, "greater_is_better"),
    (dict(tolerance=1.0), ValueError, "tolerance"), (dict(eval_batches=iter([])), TypeError, "eval_batches"),
], ids=["metric", "greater", "tolerance", "generator"])
def test_wrong_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        hlk.RankSearch(make_net(), **given)


@pytest.mark.parametrize("answer, error", [(math.nan, FloatingPointError), ("good", TypeError), (torch.ones(2), TypeError)],
                         ids=["nan", "text", "two"])
def test_a_metric_that_is_no_number_is_refused(answer, error):
    with pytest.raises(error, match="metric"):
        hlk.RankSearch(make_net(), metric=lambda model, batches: answer).score(BATCHES, proxy="alpha_test")


def test_empty_eval_batches_are_named():
    with pytest.raises(ValueError, match="eval_batches"):
        hlk.RankSearch(make_net(), eval_batches=[]).score(BATCHES, proxy="alpha_test")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
@pytest.mark.parametrize("last", [None, 0, 1, 5], ids=str)
def test_nothing_is_left_behind(last, error):
    model = make_net()
    model.train()
    model.norm.eval()
    model(**BATCHES[0]).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    search = hlk.RankSearch(model)
    search.apply({"layers.0": 0, "layers.2": [True, False, True, False]})
    before, ranks, modes = snapshot(model), search.ranks, [module.training for module in model.modules()]
    linears = model._heterolora_state.linears
    gates = [module._heterolora.derived.gate.clone() for module in linears]
    assert sorted(torch.cat(gates).tolist()) == [0.0] * 6 + [1.0] * 10
    out = model(**BATCHES[1]).out
    state, python = torch.get_rng_state(), random.getstate()
    calls = []

    def metric(model, batches):
        assert not model.training
        random.random(), torch.rand(1)
        calls.append(1)
        if last is not None and len(calls) > last:
            raise error("on purpose")
        return loss_metric(model, batches)

    def score():
        return search.score(BATCHES, proxy="alpha_test", metric=metric, greater_is_better=False)

    if last is None:
        score()
    else:
        with pytest.raises(error, match="on purpose"):
            score()
    assert same_bits(before, snapshot(model)) and search.ranks == ranks
    assert all(map(torch.equal, gates, (module._heterolora.derived.gate for module in linears)))
    assert torch.equal(model(**BATCHES[1]).out, out)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert same_bits(grads, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_everything_is_on_while_one_path_is_scaled(trained):
    search = hlk.RankSearch(trained)
    expected = search.score(BATCHES, proxy="alpha_test", metric=loss_metric, greater_is_better=False)
    search.apply({name: 0 for name in NET_PATHS[:3]})
    assert search.score(BATCHES, proxy="alpha_test", metric=loss_metric, greater_is_better=False) == expected
    search.apply(dict.fromkeys(NET_PATHS, 4))


def test_a_dynamic_search_probes_for_it():
    model = make_net(proxy="alpha_test", interval=2, warmup=0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    search = hlk.RankSearch(model, optimizer, BATCHES, metric=loss_metric, greater_is_better=False)
    for step in range(4):
        train_step(model, optimizer, BATCHES[step % 2], search)
    assert [entry["score"] for entry in search.history] == ["probe"] * 3
    with pytest.raises(ValueError, match="score='in_step'"):
        hlk.RankSearch(make_net(proxy="alpha_test", score="in_step"))


def test_metric_sees_eval_mode_without_gradients():
    seen = []

    def metric(model, batches):
        seen.append((model.training, torch.is_grad_enabled(), F.dropout(torch.ones(8), training=model.training).sum().item()))
        return 1.0

    hlk.RankSearch(make_net(), metric=metric).score(BATCHES, proxy="alpha_test")
    assert set(seen) == {(False, False, 8.0)}
