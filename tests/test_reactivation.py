"""Rows under optimizers: what is off keeps its bits, what is on trains as if alone, what comes back (``on_reactivate``)."""

from __future__ import annotations

import io

import pytest
import torch
from helpers_search import (
    NET_PATHS,
    Net,
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
from torch import nn
from torch.nn import functional as F

import heterolora_kernels as hlk

PATH, OTHERS = "layers.1", ("layers.0", "layers.2", "layers.3")
MODELS = {
    "net": (make_net, net_batch), "llama": (make_llama, llama_batch),
    "mixed-ranks": (lambda **config: make_net(rank_pattern={"layers.1": 2, "layers.3": 7}, **config), net_batch),
}


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, arXiv 2302.06675."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average.lerp(p.grad, 1 - first).sign(), alpha=group["lr"])
                average.lerp_(p.grad, 1 - second)


def of_torch(name, **options):
    return lambda params: getattr(torch.optim, name)(params, **{"lr": 0.01, "weight_decay": 0.1, **options})


ELEMENTWISE = {
    "adamw": of_torch("AdamW", foreach=False), "adamw-foreach": of_torch("AdamW", foreach=True),
    "adamw-fused": of_torch("AdamW", fused=True), "adamw-amsgrad": of_torch("AdamW", amsgrad=True),
    "adam-l2": of_torch("Adam"), "nadam": of_torch("NAdam"),
    "sgd": of_torch("SGD", momentum=0.9), "sgd-nesterov-foreach": of_torch("SGD", momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": of_torch("SGD", momentum=0.9, fused=True),
    "rmsprop": of_torch("RMSprop", lr=0.001, momentum=0.9, centered=True),
    "rmsprop-foreach": of_torch("RMSprop", lr=0.001, momentum=0.9, foreach=True),
    "adagrad": of_torch("Adagrad"), "adagrad-foreach": of_torch("Adagrad", foreach=True),
    "adagrad-fused": of_torch("Adagrad", fused=True), "lion": Lion,
}
every_optimizer = pytest.mark.parametrize("make_optimizer", [pytest.param(make, id=name) for name, make in ELEMENTWISE.items()])


def setup(make_optimizer=ELEMENTWISE["adamw"], on_reactivate="reset", **config):
    """``(model, optimizer, search)``; ranks are set by hand."""
    model = make_net(**{"search": "off", "on_reactivate": on_reactivate, **config})
    return model, make_optimizer(trainable(model)), hlk.RankSearch(model)


def masks_of(model, paths=NET_PATHS):
    return {path: adapter(model, path).lora_mask.tolist() for path in paths}


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


# ---- rows that are off ----

def row_bits(model, optimizer, path, rows):
    """Bytes of those rows of lora_A and columns of lora_B, and of all of their state that has rows."""
    holder, index, found = adapter(model, path), torch.tensor(rows, dtype=torch.long), []
    for name, p, dim in (("A", holder.lora_A, 0), ("B", holder.lora_B, 1)):
        tensors = {"weight": p, **optimizer.state.get(p, {})}
        found += [(name, key, value.detach().index_select(dim, index).numpy().tobytes()) for key, value in tensors.items()
                  if isinstance(value, torch.Tensor) and value.shape == p.shape]
    return found


MASKS = ({"layers.0": [True, False, True, False], "layers.1": [False, True, True, True], "layers.2": 0, "layers.3": 4},
         {"layers.0": [False, False, True, True], "layers.1": 1, "layers.2": [True, False, False, True], "layers.3": 0},
         {"layers.0": [True, True, False, False], "layers.1": [True, False, True, False], "layers.2": 4,
          "layers.3": [False, True, False, False]},
         {"layers.0": 0, "layers.1": [False, False, False, True], "layers.2": [False, True, True, False], "layers.3": 2})


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_only_active_rows_move_whatever_is_on(name):
    model = make_net(search="off")
    optimizer, search = ELEMENTWISE[name](trainable(model)), hlk.RankSearch(model)
    if name == "sgd-fused":
        # Where one parameter has a momentum, torch's fused SGD wants one of all.
        train_step(model, optimizer, net_batch(99))
    for step in range(20):
        if step % 5 == 0:
            search.apply(MASKS[step // 5])
        on = {path: [j for j, active in enumerate(mask) if active] for path, mask in masks_of(model).items()}
        off = {path: [j for j in range(4) if j not in on[path]] for path in NET_PATHS}
        before = {path: [row_bits(model, optimizer, path, rows[path]) for rows in (on, off)] for path in NET_PATHS}
        train_step(model, optimizer, net_batch(step), set_to_none=False)
        for path in NET_PATHS:
            now_off = row_bits(model, optimizer, path, off[path])
            # State that this step made is 0 where a row is off.
            fresh = [entry for entry in now_off if entry[:2] not in {kept[:2] for kept in before[path][1]}]
            assert [entry for entry in now_off if entry not in fresh] == before[path][1]
            assert not any(any(entry[2]) for entry in fresh)
            if on[path]:
                assert row_bits(model, optimizer, path, on[path])[0] != before[path][0][0]
                assert not set(row_bits(model, optimizer, path, on[path])) & set(before[path][0])


@pytest.mark.parametrize("set_to_none", [True, False], ids=["grads-none", "grads-zero"])
@pytest.mark.parametrize("make_optimizer", [ELEMENTWISE["adamw"], ELEMENTWISE["adamw-fused"]], ids=["adamw", "adamw-fused"])
@pytest.mark.parametrize("kind", MODELS)
def test_only_active_rows_move_in_a_search(kind, make_optimizer, set_to_none):
    make, batch = MODELS[kind]
    model = make(ranks="graded", interval=3, warmup=2, num_batches=2)
    optimizer = make_optimizer(trainable(model))
    search, partly = hlk.RankSearch(model, optimizer), 0
    search.start()
    for step in range(8):
        off = {path: [j for j, on in enumerate(mask) if not on] for path, mask in masks_of(model, search.paths).items()}
        before = {path: row_bits(model, optimizer, path, rows) for path, rows in off.items()}
        partly += sum(0 < len(rows) < len(adapter(model, path).lora_mask) for path, rows in off.items())
        train_step(model, optimizer, batch(step), set_to_none=set_to_none)
        now = {path: row_bits(model, optimizer, path, rows) for path, rows in off.items()}
        assert all(set(before[path]) <= set(now[path]) for path in off)
        search.step()
    assert partly > 8 and len(search.history) == 3


class SmallerNet(nn.Module):
    """The Net with low-rank paths made of some rows only, by autograd alone."""

    def __init__(self, patched, masks, scaling):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(torch.float64).requires_grad_(False)
        self.low_rank, self.scaling = nn.ParameterDict(), scaling
        for path, mask in masks.items():
            holder, name = adapter(patched, path), path.replace(".", "_")
            if any(mask):
                self.low_rank[f"{name}_A"] = nn.Parameter(holder.lora_A.detach()[torch.tensor(mask)].clone())
                self.low_rank[f"{name}_B"] = nn.Parameter(holder.lora_B.detach()[:, torch.tensor(mask)].clone())
                self.net.get_submodule(path).register_forward_hook(
                    lambda module, args, out, name=name: out + self.delta(name, args[0]))

    def delta(self, name, x):
        return self.scaling * F.linear(F.linear(x, self.low_rank[f"{name}_A"]), self.low_rank[f"{name}_B"])

    def forward(self, **batch):
        return self.net(**batch)


@every_optimizer
def test_active_rows_train_as_paths_that_have_only_these(make_optimizer):
    model = make_net(search="off", dtype=torch.float64)
    search = hlk.RankSearch(model)
    search.apply({"layers.0": [True, False, True, False], "layers.1": 0, "layers.2": [False, False, False, True]})
    masks = masks_of(model)
    smaller = SmallerNet(model, masks, 16 / 4)
    optimizers = make_optimizer(trainable(model)), make_optimizer(list(smaller.low_rank.values()))
    before = snapshot(model)
    for step in range(20):
        train_step(model, optimizers[0], net_batch(step, dtype=torch.float64), set_to_none=False)
        train_step(smaller, optimizers[1], net_batch(step, dtype=torch.float64))
    for path, mask in masks.items():
        rows, holder, name = torch.tensor(mask), adapter(model, path), path.replace(".", "_")
        assert torch.equal(holder.lora_A[~rows], before[f"{path}.lora_A"][~rows])
        if any(mask):
            torch.testing.assert_close(holder.lora_A[rows], smaller.low_rank[f"{name}_A"], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(holder.lora_B[:, rows], smaller.low_rank[f"{name}_B"], rtol=1e-6, atol=1e-8)
            assert not torch.allclose(holder.lora_A[rows], before[f"{path}.lora_A"][rows], rtol=1e-3)


class RowByRow:
    """AdamW or SGD with momentum, written for single rows; a parameter without an active row is not stepped."""

    def __init__(self, kind, lr=0.01, decay=0.1):
        self.kind, self.lr, self.decay, self.kept = kind, lr, decay, {}

    def step(self, name, p, grad, rows):
        count, first, second = self.kept.setdefault(name, [0, torch.zeros_like(p), torch.zeros_like(p)])
        count += 1
        self.kept[name][0] = count
        for j in rows:
            if self.kind == "adamw":
                first[j] = 0.9 * first[j] + 0.1 * grad[j]
                second[j] = 0.999 * second[j] + 0.001 * grad[j] ** 2
                root = (second[j] / (1 - 0.999 ** count)).sqrt() + 1e-8
                p[j] = p[j] * (1 - self.lr * self.decay) - self.lr * first[j] / (1 - 0.9 ** count) / root
            else:
                first[j] = 0.9 * first[j] + grad[j] + self.decay * p[j]
                p[j] = p[j] - self.lr * first[j]


@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "adamw-fused", "sgd", "sgd-fused"])
def test_rows_train_as_by_hand_while_masks_change(name):
    model = make_net(search="off", dtype=torch.float64)
    optimizer, search = ELEMENTWISE[name](trainable(model)), hlk.RankSearch(model)
    twin = SmallerNet(model, dict.fromkeys(NET_PATHS, [True] * 4), 16 / 4)
    by_hand, gates = RowByRow(name.partition("-")[0]), {}
    masks = [{path: 4 for path in NET_PATHS}] * (name == "sgd-fused") + list(MASKS)

    def gated(path, x):
        return 4 * (x @ twin.low_rank[f"{path}_A"].t() * gates[path]) @ twin.low_rank[f"{path}_B"].t()

    twin.delta = gated
    for step in range(20):
        if step % 5 == 0:
            search.apply(masks[step // 5])
            gates = {path.replace(".", "_"): torch.tensor(mask, dtype=torch.float64)
                     for path, mask in masks_of(model).items()}
        train_step(model, optimizer, net_batch(step, dtype=torch.float64), set_to_none=False)
        twin.zero_grad()
        twin(**net_batch(step, dtype=torch.float64)).loss.backward()
        with torch.no_grad():
            for path, gate in gates.items():
                rows = gate.nonzero().flatten().tolist()
                for part in "AB" if rows else "":
                    p = twin.low_rank[f"{path}_{part}"]
                    by_hand.step(f"{path}_{part}", *((p, p.grad) if part == "A" else (p.t(), p.grad.t())), rows)
    for path in NET_PATHS:
        holder, own = adapter(model, path), path.replace(".", "_")
        torch.testing.assert_close(holder.lora_A, twin.low_rank[f"{own}_A"], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(holder.lora_B, twin.low_rank[f"{own}_B"], rtol=1e-7, atol=1e-9)


@every_optimizer
def test_search_over_rows_takes_elementwise_optimizers(make_optimizer):
    model = make_net(ranks="graded", interval=2)
    optimizer = make_optimizer(trainable(model))
    search = hlk.RankSearch(model, optimizer)
    for step in range(5):
        train_step(model, optimizer, net_batch(step), search)
    assert len(search.history) == 3


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
