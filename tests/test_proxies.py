"""Scores of every proxy against plain autograd."""

import math

import pytest
import torch
from helpers_search import (
    ALL_PROXIES,
    EagerTwin,
    adapter,
    assert_scores_close,
    expected_scores,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    path_names,
    sum_gradients,
    trainable,
)

import heterolora_kernels as hlk
from heterolora_kernels import proxies

# The ledger is float32: what cancels in a gate's sum is known to that precision of the terms, not of the sum.
STREAMED_FLOOR = 1e-6
STREAMED = ("grad_norm", "snip", "taylor", "fisher", "gate")


@pytest.fixture
def registry(monkeypatch):
    """The registry of proxies, as it was after the test."""
    monkeypatch.setattr(proxies, "_proxies", dict(proxies._proxies))


@pytest.fixture(scope="module")
def probed():
    """A search over a float64 Llama with some paths off, its batches, and each batch's gradients by the eager twin."""
    model = make_llama(dtype=torch.float64)
    search = hlk.RankSearch(model)
    search.apply({path: 0 for path in search.paths[::3]})
    batches = [llama_batch(seed) for seed in range(3)]
    twin = EagerTwin(model)
    return search, batches, [twin.gradients(batch, masked=False) for batch in batches]


def terms_of(proxy, records):
    return records if proxy == "fisher" else sum_gradients(records)


@pytest.mark.parametrize("proxy", ALL_PROXIES)
def test_probe_equals_autograd(probed, proxy):
    search, batches, records = probed
    assert_scores_close(search.score(batches, proxy=proxy, score="probe"), expected_scores(proxy, terms_of(proxy, records)))


@pytest.mark.parametrize("proxy", ALL_PROXIES)
def test_probe_per_rank_equals_autograd(probed, proxy):
    search, batches, records = probed
    scores = search.score(batches, proxy=proxy, score="probe", per_rank=True)
    assert_scores_close(scores, expected_scores(proxy, terms_of(proxy, records), per_rank=True))


@pytest.mark.parametrize("proxy", ["grad_norm", "taylor", "gate"])
def test_probe_is_exact_not_streaming(probed, proxy):
    search, batches, records = probed
    path = search.paths[0]
    streaming = expected_scores(proxy, records)
    # The gate's streaming sum equals the exact one: there the two agree by definition.
    agrees = math.isclose(search.score(batches, proxy=proxy, score="probe")[path], streaming[path], rel_tol=1e-5)
    assert agrees == (proxy == "gate")


def test_probe_scores_all_linears_and_shortcuts(probed):
    search, batches, _ = probed
    scores = search.score(batches, proxy="grad_norm", score="probe")
    assert len(scores) == 2 * 7 + 4 * 2 - 1 and min(scores.values()) > 0


def run_in_step(proxy, steps=5, micro_batches=1):
    """An open window of ``steps`` optimizer steps, and the twin's gradients of every backward in it."""
    model = make_llama(dtype=torch.float64, proxy=proxy, interval=steps + 1, num_batches=steps + 1, warmup=0)
    search = hlk.RankSearch(model)
    search.start()
    search.apply({**{path: 0 for path in search.paths[::3]}, search.paths[1]: torch.tensor([False, True, False])})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    twin, records = EagerTwin(model), []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            batch = llama_batch(10 * step + micro)
            records.append(twin.gradients(batch, masked=True))
            model(**batch).loss.backward()
        optimizer.step()
        search.step()
    return search, records


@pytest.mark.parametrize("proxy", STREAMED)
def test_in_step_equals_the_sum_over_steps(proxy):
    search, records = run_in_step(proxy)
    assert_scores_close(search.score(score="in_step"), expected_scores(proxy, records), floor=STREAMED_FLOOR)


@pytest.mark.parametrize("proxy", STREAMED)
def test_in_step_per_rank_equals_the_sum_over_steps(proxy):
    search, records = run_in_step(proxy, steps=2)
    assert_scores_close(search.score(score="in_step", per_rank=True), expected_scores(proxy, records, per_rank=True),
                        floor=STREAMED_FLOOR)


def test_in_step_sums_over_micro_batches():
    search, records = run_in_step("grad_norm", steps=2, micro_batches=3)
    assert_scores_close(search.score(score="in_step"), expected_scores("grad_norm", records))


def test_in_step_of_another_proxy_reads_the_same_window():
    search, records = run_in_step("grad_norm", steps=2)
    assert_scores_close(search.score(score="in_step", proxy="taylor"), expected_scores("taylor", records))


class ScaleOnly:
    """Of a GradScaler what a search reads, with a loop that scales by hand."""

    def get_scale(self):
        return 256.0


def scaled_window(scaler, proxy, steps=4, overflow=(), micro_batches=1, fused=False):
    """A search over a run whose loss is scaled; at the steps of ``overflow`` one parameter's gradient is infinite.

    What the ledger collects is finite all the same.
    """
    model = make_net(proxy=proxy, interval=20, num_batches=20, warmup=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    search = hlk.RankSearch(model, optimizer, scaler=scaler)
    search.start()
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            # A step that overflowed is left out by the run that it is compared to: batches count the others.
            number = step - sum(skipped < step for skipped in overflow)
            loss = model(**net_batch(10 * number + micro)).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        if step in overflow:
            adapter(model, "layers.3").lora_B.grad[0, 0] = float("inf")
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        search.step()
    return search


def grad_scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, **options)


@pytest.mark.parametrize("proxy", STREAMED)
def test_statistics_of_scaled_losses_are_unscaled(proxy):
    # The scale doubles after two steps: each step is unscaled by its own.
    scaled, plain = scaled_window(grad_scaler(), proxy), scaled_window(None, proxy)
    assert_scores_close(scaled.score(score="in_step"), plain.score(score="in_step"))


def test_statistics_are_unscaled_before_gradients_are_clipped():
    model = make_net(interval=20, num_batches=20, warmup=0)
    optimizer, scaler = torch.optim.SGD(trainable(model), lr=0.1), grad_scaler()
    search = hlk.RankSearch(model, optimizer, scaler=scaler)
    search.start()
    loss = model(**net_batch(0)).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = {path: (adapter(model, path).lora_A.grad.norm() + adapter(model, path).lora_B.grad.norm()).item()
                for path in path_names(model)}
    torch.nn.utils.clip_grad_norm_(trainable(model), 1e-3)
    scaler.step(optimizer)
    assert_scores_close(search.score(score="in_step"), expected)


def test_any_object_with_get_scale_is_a_scaler():
    model = make_net(interval=20, num_batches=20, warmup=0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    search = hlk.RankSearch(model, optimizer, scaler=ScaleOnly())
    search.start()
    (256 * model(**net_batch(0)).loss).backward()
    optimizer.step()
    assert_scores_close(search.score(score="in_step"), search.score([net_batch(0)], score="probe"))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("overflow", [(0,), (2,), (1, 2)], ids=str)
def test_a_step_skipped_on_overflow_leaves_no_trace(overflow, micro_batches, fused):
    scaled = scaled_window(grad_scaler(), "grad_norm", 3 + len(overflow), overflow, micro_batches, fused)
    plain = scaled_window(None, "grad_norm", 3, (), micro_batches, fused)
    assert_scores_close(scaled.score(score="in_step"), plain.score(score="in_step"))


def test_steps_skipped_on_overflow_are_not_counted_as_batches():
    search = scaled_window(grad_scaler(), "grad_norm", 4, overflow=(1,))
    assert search.state_dict()["window"]["steps"] == 3


def test_a_due_step_waits_while_all_steps_overflow():
    model = make_net(interval=2, num_batches=2, warmup=0)
    optimizer, scaler = torch.optim.SGD(trainable(model), lr=0.1), grad_scaler()
    search = hlk.RankSearch(model, optimizer, scaler=scaler)
    search.start()
    chosen = []
    for step, factor in enumerate([float("inf")] * 3 + [1.0]):
        optimizer.zero_grad()
        scaler.scale(model(**net_batch(step)).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            with pytest.warns(UserWarning, match="put off"):
                chosen.append(search.step())
        else:
            chosen.append(search.step())
    assert chosen == [False, False, False, True]


@pytest.mark.parametrize("proxy", ["snip", "taylor", "gate"])
def test_score_is_zero_at_zero_B(proxy):
    search = hlk.RankSearch(make_net(zero_B=True))
    with pytest.warns(UserWarning, match=proxy):
        scores = search.score([net_batch(0)], proxy=proxy, score="probe")
    assert set(scores.values()) == {0.0}


def test_grad_norm_at_zero_B_is_its_B_half():
    model = make_net(zero_B=True)
    model(**net_batch(0)).loss.backward()
    expected = {path: adapter(model, path).lora_B.grad.norm().item() for path in path_names(model)}
    assert_scores_close(hlk.RankSearch(model).score([net_batch(0)], score="probe"), expected)


def test_constant_needs_no_data():
    search = hlk.RankSearch(make_net())
    assert search.score(proxy="constant", score="probe") == {path: 1.0 for path in search.paths}


def test_available_proxies_are_the_built_in_ones():
    assert set(ALL_PROXIES) <= set(hlk.available_proxies())


def test_registered_proxy_sees_the_ledger_columns(registry):
    @hlk.register_proxy("squared_B")
    def squared_B(columns):
        return columns["grad_B_sq"]

    model = make_net(proxy="squared_B")
    scores = hlk.RankSearch(model).score([net_batch(0)], score="probe")
    model(**net_batch(0)).loss.backward()
    assert_scores_close(scores, {path: adapter(model, path).lora_B.grad.square().sum().item() for path in path_names(model)})


def test_registered_proxy_decides_the_ranks(registry):
    @hlk.register_proxy("worst_first")
    def worst_first(columns):
        return -columns["grad_B_sq"]

    model = make_net(proxy="worst_first", search="static")
    hlk.RankSearch(model, dataloader=[net_batch(0)]).start()
    ranks = {path: int(adapter(model, path).lora_mask.sum()) for path in path_names(model)}
    model.zero_grad()
    hlk.RankSearch(model)
    model(**net_batch(0)).loss.backward()
    norms = {path: adapter(model, path).lora_B.grad.norm().item() for path in ranks}
    assert {path for path, rank in ranks.items() if rank} == set(sorted(norms, key=norms.get)[:2])


def test_registered_streaming_proxy_gets_sums_over_batches(registry):
    @hlk.register_proxy("streamed", streaming_only=True)
    def streamed(columns):
        return columns["grad_A_sq"] + columns["grad_B_sq"]

    search = hlk.RankSearch(make_net())
    batches = [net_batch(0), net_batch(1)]
    single = [search.score([batch], proxy="fisher", score="probe") for batch in batches]
    assert_scores_close(search.score(batches, proxy="streamed", score="probe"),
                        {path: single[0][path] + single[1][path] for path in search.paths})


@pytest.mark.parametrize("ask", [
    pytest.param(lambda: hlk.RankSearch(make_net(proxy="no_such")), id="config"),
    pytest.param(lambda: hlk.RankSearch(make_net()).score([net_batch(0)], proxy="no_such", score="probe"), id="argument"),
])
def test_unknown_proxy_names_the_argument_and_the_choices(ask):
    with pytest.raises(ValueError, match=r"proxy must be one of .*grad_norm.*no_such"):
        ask()


def test_scores_are_plain_floats():
    scores = hlk.RankSearch(make_net()).score([net_batch(0)], score="probe", per_rank=True)
    assert all(type(row) is float for rows in scores.values() for row in rows)
