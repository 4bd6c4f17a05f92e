"""Rows that come back (``on_reactivate``): with the state that they left, or as if the optimizer had just been made."""

from __future__ import annotations

import io

import pytest
import torch
from helpers_optimizers import ELEMENTWISE, every_optimizer
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

import heterolora_kernels as hlk

PATH, OTHERS = "layers.1", ("layers.0", "layers.2", "layers.3")


def setup(make_optimizer=ELEMENTWISE["adamw"], on_reactivate="reset", **config):
    """``(model, optimizer, search)``; ranks are set by hand."""
    model = make_net(**{"search": "off", "on_reactivate": on_reactivate, **config})
    return model, make_optimizer(trainable(model)), hlk.RankSearch(model)


def steps(model, optimizer, *numbers):
    for number in numbers:
        train_step(model, optimizer, net_batch(number), set_to_none=False)


def parameters(model, *paths):
    return [p for path in paths for p in (adapter(model, path).lora_A, adapter(model, path).lora_B)]


def copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def states(optimizer, *params):
    """Copies of all that the optimizer keeps for these parameters."""
    return [{name: copied(value) for name, value in optimizer.state.get(p, {}).items()} for p in params]


def equal(first, second):
    """Whether lists of states are the same, bit for bit."""
    return len(first) == len(second) and all(
        one.keys() == two.keys() and all(
            torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name] for name in one)
        for one, two in zip(first, second))


def empty_step(optimizer):
    """A step without gradients: torch's optimizers leave every parameter and its state alone, so only resets are seen."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


def moments(optimizer, model, path, rows):
    """Those rows of every state tensor of lora_A's shape, then those columns of lora_B's."""
    index = torch.tensor(rows)
    return [value.index_select(dim, index) for p, dim in zip(parameters(model, path), (0, 1))
            for value in optimizer.state[p].values() if isinstance(value, torch.Tensor) and value.shape == p.shape]


# ---- keep ----


@every_optimizer
@pytest.mark.parametrize("ranks", [0, [False, True, False, False]], ids=["path", "rows"])
def test_keep_goes_on_with_the_state_that_was_left(make_optimizer, ranks):
    model, optimizer, search = setup(make_optimizer, "keep")
    steps(model, optimizer, 0, 1, 2)
    before = moments(optimizer, model, PATH, [0, 2, 3])
    search.apply({PATH: ranks})
    steps(model, optimizer, 3, 4)
    search.apply({PATH: 4})
    kept = states(optimizer, *parameters(model, *OTHERS, PATH))
    empty_step(optimizer)
    assert equal(states(optimizer, *parameters(model, *OTHERS, PATH)), kept)
    assert before and all(torch.equal(a, b) for a, b in zip(moments(optimizer, model, PATH, [0, 2, 3]), before))


def test_keep_counts_on_and_mixes_old_moments_with_new_gradients():
    model, optimizer, search = setup(on_reactivate="keep")
    steps(model, optimizer, 0, 1, 2)
    old = states(optimizer, *parameters(model, PATH))
    search.apply({PATH: 0})
    steps(model, optimizer, 3, 4)
    search.apply({PATH: 4})
    steps(model, optimizer, 5)
    for p, left in zip(parameters(model, PATH), old):
        assert (int(left["step"]), int(optimizer.state[p]["step"])) == (3, 4)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * left["exp_avg"] + 0.1 * p.grad)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 0.999 * left["exp_avg_sq"] + 0.001 * p.grad ** 2)


def test_keep_is_the_default():
    assert hlk.HeteroLoraConfig().on_reactivate == "keep"


# ---- reset, whole paths ----


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "sgd-fused"])
def test_reset_of_a_path_is_a_fresh_optimizer(name):
    make_optimizer = ELEMENTWISE[name]
    model, optimizer, search = setup(make_optimizer)
    steps(model, optimizer, 0, 1, 2)
    search.apply({PATH: 0})
    steps(model, optimizer, 3, 4)
    search.apply({PATH: 4})
    own = parameters(model, PATH)
    twins = [p.detach().clone().requires_grad_() for p in own]
    fresh = make_optimizer(twins)
    for number in range(5, 9):
        steps(model, optimizer, number)
        for twin, p in zip(twins, own):
            twin.grad = p.grad.clone()
        fresh.step()
        assert all(map(torch.equal, twins, own)) and equal(states(optimizer, *own), states(fresh, *twins))


@every_optimizer
def test_reset_of_a_path_leaves_the_others_alone(make_optimizer):
    model, optimizer, search = setup(make_optimizer)
    steps(model, optimizer, 0, 1, 2)
    search.apply({PATH: 0, "layers.2": [True, False, False, True]})
    steps(model, optimizer, 3)
    search.apply({PATH: 4})
    before = states(optimizer, *parameters(model, *OTHERS))
    empty_step(optimizer)
    for parameter, state in zip(parameters(model, PATH), states(optimizer, *parameters(model, PATH))):
        # Adagrad, which in some versions makes its state only once, has one as before its first step.
        fresh = {"step": torch.tensor(0.0), "sum": torch.zeros_like(parameter)} if "sum" in state else {}
        assert equal([state], [fresh])
    assert equal(states(optimizer, *parameters(model, *OTHERS)), before) and all(before)


def test_reset_waits_for_the_next_step():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: 0})
    before = states(optimizer, *parameters(model, PATH))
    steps(model, optimizer, 2, 3)
    search.apply({PATH: 4})
    assert equal(states(optimizer, *parameters(model, PATH)), before) and all(before)


def test_reset_happens_once():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: 0})
    steps(model, optimizer, 2)
    search.apply({PATH: 4})
    steps(model, optimizer, 3, 4, 5)
    search.apply({PATH: 4})
    steps(model, optimizer, 6)
    assert [int(optimizer.state[p]["step"]) for p in parameters(model, PATH)] == [4, 4]


def test_every_return_of_a_path_is_a_new_start():
    model, optimizer, search = setup()
    for _ in range(3):
        steps(model, optimizer, 0, 1)
        search.apply({PATH: 0})
        steps(model, optimizer, 2)
        search.apply({PATH: 4})
    steps(model, optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in parameters(model, PATH)] == [1, 1]


@pytest.mark.parametrize("ranks", [2, [False, True, False, True]], ids=["int", "mask"])
def test_path_that_returns_with_some_rows_starts_anew_as_a_whole(ranks):
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: 0})
    steps(model, optimizer, 2)
    search.apply({PATH: ranks})
    empty_step(optimizer)
    assert states(optimizer, *parameters(model, PATH)) == [{}, {}]


def test_path_of_which_only_new_rows_are_on_starts_anew_as_a_whole():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: [True, True, False, False]})
    steps(model, optimizer, 2)
    search.apply({PATH: [False, False, True, True]})
    steps(model, optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in parameters(model, PATH)] == [1, 1]


def test_shortcuts_start_anew_as_well():
    model = make_llama(search="off", on_reactivate="reset")
    optimizer, search = torch.optim.AdamW(trainable(model), lr=0.01), hlk.RankSearch(model)
    sites = [path for path in search.paths if "shortcut_" in path]
    for ranks in (0, 2):
        train_step(model, optimizer, llama_batch(0), set_to_none=False)
        search.apply(dict.fromkeys(sites, ranks))
    train_step(model, optimizer, llama_batch(1), set_to_none=False)
    assert {int(optimizer.state[p]["step"]) for p in parameters(model, *sites)} == {1} and len(sites) == 3
    assert {int(optimizer.state[p]["step"]) for p in parameters(model, "model.layers.0.self_attn.q_proj")} == {3}


# ---- reset, rows ----


@every_optimizer
def test_reset_of_rows_zeroes_their_moments_and_nothing_else(make_optimizer):
    model, optimizer, search = setup(make_optimizer)
    steps(model, optimizer, 0, 1, 2)
    search.apply({PATH: [True, False, False, True]})
    steps(model, optimizer, 3)
    left = moments(optimizer, model, PATH, [1, 2])
    search.apply({PATH: [True, True, False, True]})
    others, own = states(optimizer, *parameters(model, *OTHERS)), states(optimizer, *parameters(model, PATH))
    kept = moments(optimizer, model, PATH, [0, 2, 3])
    empty_step(optimizer)
    assert left and all(moment.any() for moment in left)
    assert not any(moment.any() for moment in moments(optimizer, model, PATH, [1]))
    assert all(map(torch.equal, moments(optimizer, model, PATH, [0, 2, 3]), kept))
    assert equal(states(optimizer, *parameters(model, *OTHERS)), others)
    now = states(optimizer, *parameters(model, PATH))
    numbers = [[value for value in entry.values() if not isinstance(value, torch.Tensor) or value.numel() == 1]
               for entry in (*own, *now)]
    assert numbers[:2] == numbers[2:]


def test_rows_that_return_begin_with_the_new_gradient():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1, 2)
    search.apply({PATH: [True, False, False, True]})
    steps(model, optimizer, 3)
    search.apply({PATH: 4})
    steps(model, optimizer, 4)
    lora_A, lora_B = parameters(model, PATH)
    torch.testing.assert_close(optimizer.state[lora_A]["exp_avg"][1:3], 0.1 * lora_A.grad[1:3])
    torch.testing.assert_close(optimizer.state[lora_B]["exp_avg_sq"][:, 1:3], 0.001 * lora_B.grad[:, 1:3] ** 2)
    assert int(optimizer.state[lora_A]["step"]) == 5


def test_rows_of_two_reallocations_before_a_step_are_all_reset():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: [True, False, False, True]})
    steps(model, optimizer, 2)
    search.apply({PATH: [True, True, False, True]})
    search.apply({PATH: [True, True, True, True]})
    kept = moments(optimizer, model, PATH, [0, 3])
    empty_step(optimizer)
    assert not any(moment.any() for moment in moments(optimizer, model, PATH, [1, 2]))
    assert all(map(torch.equal, moments(optimizer, model, PATH, [0, 3]), kept)) and kept[0].any()


def test_rows_switched_on_and_off_before_a_step_disturb_no_other():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: [True, False, False, True]})
    steps(model, optimizer, 2)
    search.apply({PATH: 4})
    search.apply({PATH: [True, False, False, True]})
    kept, count = moments(optimizer, model, PATH, [0, 3]), int(optimizer.state[parameters(model, PATH)[0]]["step"])
    empty_step(optimizer)
    assert all(map(torch.equal, moments(optimizer, model, PATH, [0, 3]), kept)) and kept[0].any()
    assert int(optimizer.state[parameters(model, PATH)[0]]["step"]) == count == 3


# ---- what does not reset ----


@pytest.mark.parametrize("ranks", ["binary", "graded"])
def test_first_allocation_resets_nothing(ranks):
    model, optimizer, search = setup(search="dynamic", ranks=ranks, interval=2)
    search.start()
    assert search.state_dict()["reset"] == {} and not all(rank == 4 for rank in search.ranks.values())


def test_first_allocation_after_steps_with_everything_on_resets_nothing():
    model, optimizer, search = setup(search="dynamic", interval=2, warmup=0)
    for number in range(2):
        train_step(model, optimizer, net_batch(number), search)
    before = states(optimizer, *trainable(model))
    empty_step(optimizer)
    assert 0 in search.ranks.values() and equal(states(optimizer, *trainable(model)), before) and all(before)


def test_reactivation_before_any_step_does_no_harm():
    model, optimizer, search = setup()
    search.apply({PATH: 0})
    search.apply({PATH: 4})
    steps(model, optimizer, 0)
    assert [int(optimizer.state[p]["step"]) for p in trainable(model)] == [1] * 8


def test_a_probe_resets_nothing():
    model, optimizer, search = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: 0, "layers.2": [True, False, True, False]})
    search.score([net_batch(3)], score="probe")
    assert search.state_dict()["reset"] == {}


def test_steps_of_an_optimizer_without_the_path_do_not_use_up_a_reset():
    model, optimizer, search = setup()
    other, other_optimizer, _ = setup()
    steps(model, optimizer, 0, 1)
    search.apply({PATH: 0})
    steps(model, optimizer, 2)
    search.apply({PATH: 4})
    steps(other, other_optimizer, 0, 1)
    steps(model, optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in parameters(model, PATH)] == [1, 1]


@pytest.mark.parametrize("backwards", [False, True], ids=["first-first", "second-first"])
def test_two_optimizers_reset_what_they_hold(backwards):
    model = make_net(search="off", on_reactivate="reset")
    search = hlk.RankSearch(model)
    mine, rest = parameters(model, "layers.0", PATH), parameters(model, "layers.2", "layers.3")
    optimizers = [torch.optim.AdamW(mine, lr=0.01), torch.optim.SGD(rest, lr=0.01, momentum=0.9)]

    def run(number):
        model.zero_grad(set_to_none=False)
        model(**net_batch(number)).loss.backward()
        for optimizer in optimizers[::-1 if backwards else 1]:
            optimizer.step()

    run(0)
    search.apply({PATH: 0, "layers.2": 0})
    run(1)
    search.apply({PATH: 4, "layers.2": 4})
    run(2)
    assert [int(optimizers[0].state[p]["step"]) for p in mine] == [3, 3, 1, 1]
    fresh = [torch.equal(optimizers[1].state[p]["momentum_buffer"], p.grad) for p in rest]
    assert fresh == [True, True, False, False]


# ---- a search, and its checkpoint ----


def trained(on_reactivate, ranks="binary", count=14):
    """A search of its own that reallocates at every second step; ``(model, optimizer, search, paths that came back)``."""
    model, optimizer, search = setup(on_reactivate=on_reactivate, search="dynamic", ranks=ranks, interval=2)
    came_back = 0
    for number in range(count):
        train_step(model, optimizer, net_batch(number), search)
        came_back += len(search.state_dict()["reset"])
    return model, optimizer, search, came_back


@pytest.mark.parametrize("ranks", ["binary", "graded"])
def test_search_resets_what_it_switches_on(ranks):
    came_back = {how: trained(how, ranks)[3] for how in ("keep", "reset")}
    assert came_back["keep"] == 0 < came_back["reset"]


@pytest.mark.parametrize("ranks", ["binary", "graded"])
def test_keep_and_reset_train_differently(ranks):
    assert not same_bits(*(snapshot(trained(how, ranks)[0]) for how in ("keep", "reset")))


def test_steps_of_a_path_are_counted_from_its_last_return():
    model, optimizer, search, _ = trained("reset")
    on = [[entry["ranks"][path] > 0 for entry in search.history] for path in search.paths]
    assert [entry["step"] for entry in search.history] == [0, 2, 4, 6, 8, 10, 12, 14]
    for path, was_on in zip(search.paths, on):
        # The last allocation has trained nothing yet.
        was_on = was_on[:-1]
        last = max((i for i, active in enumerate(was_on) if active), default=None)
        first = None if last is None else max((i + 1 for i in range(last) if not was_on[i]), default=0)
        counted = {int(optimizer.state[p]["step"]) for p in parameters(model, path) if p in optimizer.state}
        assert counted == (set() if last is None else {2 * (last - first + 1)})


def saved(*given):
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(given, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(cut, ranks, order, count=14):
    """Parameters, optimizer state and history of the run; cut: number of steps after which it goes on from a file."""
    def make(weights):
        model = make_net(weights, on_reactivate="reset", ranks=ranks, interval=2, rank_pattern={"layers.2": 3})
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
        return {"model": model, "optimizer": optimizer, "search": hlk.RankSearch(model, optimizer)}

    run, pending = make(0), {}
    for number in range(count):
        if number == cut:
            states = dict(zip(order, saved(*(run[part].state_dict() for part in order))))
            pending = states["search"]["reset"]
            run = make(1)
            fill_B(run["model"], 99)
            for part in order:
                run[part].load_state_dict(states[part])
        train_step(run["model"], run["optimizer"], net_batch(number), run["search"])
    states = [run["optimizer"].state[p] for p in trainable(run["model"])]
    return snapshot(run["model"]), states, run["search"].history, pending


ORDERS = [("model", "optimizer", "search"), ("search", "model", "optimizer")]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("ranks", ["binary", "graded"])
def test_resumed_run_resets_as_the_unbroken_one(ranks, order):
    whole, pending = resumed(None, ranks, order), 0
    for cut in range(1, 13):
        again = resumed(cut, ranks, order)
        assert same_bits(whole[0], again[0]) and equal(whole[1], again[1]) and whole[2] == again[2], f"cut after step {cut}"
        pending += bool(again[3])
    assert pending >= 2


def test_pending_resets_are_plain_data():
    _, _, search = setup()
    search.apply({PATH: [True, False, False, True]})
    search.apply({PATH: [True, False, True, True]})
    state = search.state_dict()
    expected = {f"{PATH}.lora_A": [False, False, True, False], f"{PATH}.lora_B": [False, False, True, False]}
    assert state["reset"] == expected
    state["reset"][f"{PATH}.lora_A"][2] = False
    assert search.state_dict()["reset"] == expected


@pytest.mark.parametrize("backwards", [False, True], ids=["A-first", "B-first"])
@pytest.mark.parametrize("back", [4, [True, True, False, True]], ids=["path", "rows"])
def test_reset_reaches_both_optimizers_of_one_path(backwards, back):
    model = make_net(search="off", on_reactivate="reset")
    search = hlk.RankSearch(model)
    lora_A, lora_B = adapter(model, "layers.1").lora_A, adapter(model, "layers.1").lora_B
    optimizers = [torch.optim.AdamW([adapter(model, path).lora_A for path in NET_PATHS], lr=0.01),
                  torch.optim.AdamW([adapter(model, path).lora_B for path in NET_PATHS], lr=0.1)]

    def run(number):
        model.zero_grad(set_to_none=False)
        model(**net_batch(number)).loss.backward()
        for optimizer in optimizers[::-1 if backwards else 1]:
            optimizer.step()

    run(0)
    search.apply({"layers.1": 0 if back == 4 else [True, False, False, True]})
    run(1)
    search.apply({"layers.1": back})
    run(2)
    torch.testing.assert_close(optimizers[0].state[lora_A]["exp_avg"][1], 0.1 * lora_A.grad[1])
    torch.testing.assert_close(optimizers[1].state[lora_B]["exp_avg"][:, 1], 0.1 * lora_B.grad[:, 1])


class EarlyState(torch.optim.Optimizer):
    """Makes its state when it is built, as Adagrad of torch before it became lazy did."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.01))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] += 1
                    p.addcdiv_(p.grad, state["sum"].addcmul_(p.grad, p.grad).sqrt() + 1e-10, value=-group["lr"])


def test_reset_of_a_state_that_was_made_with_the_optimizer():
    model = make_net(search="off", on_reactivate="reset")
    optimizer, search = EarlyState(trainable(model)), hlk.RankSearch(model)
    train_step(model, optimizer, net_batch(0))
    search.apply({"layers.1": 0})
    train_step(model, optimizer, net_batch(1))
    search.apply({"layers.1": 4})
    train_step(model, optimizer, net_batch(2))
    lora_A = adapter(model, "layers.1").lora_A
    torch.testing.assert_close(optimizer.state[lora_A]["sum"], lora_A.grad ** 2)


def test_rows_that_were_never_on_have_adagrads_first_accumulator():
    model = make_net(search="off")
    optimizer = torch.optim.Adagrad(trainable(model), lr=0.01, initial_accumulator_value=0.1)
    search = hlk.RankSearch(model)
    search.apply({"layers.1": [True, False, False, True]})
    train_step(model, optimizer, net_batch(0))
    search.apply({"layers.1": 4})
    train_step(model, optimizer, net_batch(1))
    lora_A = adapter(model, "layers.1").lora_A
    torch.testing.assert_close(optimizer.state[lora_A]["sum"][1:3], 0.1 + lora_A.grad[1:3] ** 2)
