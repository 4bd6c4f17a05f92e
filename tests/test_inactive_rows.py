"""Rows under optimizers: what is off keeps its bits, what is on trains as if alone."""

from __future__ import annotations

import pytest
import torch
from helpers_optimizers import ELEMENTWISE, every_optimizer
from helpers_search import NET_PATHS, Net, adapter, llama_batch, make_llama, make_net, net_batch, snapshot, train_step, trainable
from torch import nn
from torch.nn import functional as F

import heterolora_kernels as hlk

MODELS = {
    "net": (make_net, net_batch), "llama": (make_llama, llama_batch),
    "mixed-ranks": (lambda **config: make_net(rank_pattern={"layers.1": 2, "layers.3": 7}, **config), net_batch),
}


def masks_of(model, paths=NET_PATHS):
    return {path: adapter(model, path).lora_mask.tolist() for path in paths}


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
