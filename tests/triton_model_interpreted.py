"""The modelled cost against what Triton's interpreter does; pytest runs this file through test_gpu_model.py, in a process with
TRITON_INTERPRET=1.

Counted are the True elements of the mask of every load and store, the addresses they reach, the sizes of every tl.dot and the
elements of every high half of a product, of which Philox makes twenty per call.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from bench import gpu_model
from heterolora_kernels.backends import resolve
from heterolora_kernels.ops.schema import Flags, Needs

resolve(torch.device("cpu"), "triton")

from heterolora_kernels.backends.triton import configs, group  # noqa: E402 - the backend is imported at its first use
from heterolora_kernels.backends.triton.builds import Scenario  # noqa: E402

ops = torch.ops.heterolora_kernels
#: Arguments that the model takes for tables: read by every program, in L2 after the first.
TABLES = {f"{name}_ptr" for name in ("active", "scaling", "gate", "rng", "paths", "columns", "chunks", "outputs", "targets",
                                     "works", "blocks", "slabs", "ranges", "records")}
SCENARIOS = [
    Scenario("odd sizes, dropout, statistics", 70, 90, (41, 33), (50,), ((5, 0, -1), (13, 1, -1), (0, 0, -1), (24, 0, 0)),
             dropout_p=0.3, statistics=True, has_bias=True),
    Scenario("aligned group", 100, 64, (72, 40, 40), paths=((8, 0, -1), (16, 1, -1), (8, 2, -1)), adapter_dtype=torch.bfloat16),
    Scenario("several chunks of columns", 50, 48, (40, 24), (24,), ((40, 0, -1), (24, 1, -1), (9, 1, 0)), dtype=torch.float32,
             dropout_p=0.1, statistics=True),
    Scenario("decoding", 3, 37, (21, 9), paths=((5, 0, -1), (9, 1, -1)), statistics=True),
    Scenario("delta", 40, 33, (35, 20), (27,), ((5, 0, 0), (3, 1, -1), (2, 1, 0)), dropout_p=0.5, is_delta=True),
]


class Counter:
    """What the interpreter does between two launches."""

    def __init__(self):
        self.bytes = self.flops = self.high_products = 0
        self.loaded, self.stored = [], []

    def access(self, pointers, mask, kept):
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        is_on = np.broadcast_to(mask.data, pointers.data.shape)
        self.bytes += int(is_on.sum()) * itemsize
        kept.append((np.unique(pointers.data[is_on]), itemsize))

    def distinct(self, kept, excluded):
        """Bytes at different addresses outside the ``excluded`` ranges."""
        itemsizes = {itemsize for _, itemsize in kept}
        total = 0
        for itemsize in itemsizes:
            addresses = np.unique(np.concatenate([found for found, size in kept if size == itemsize]))
            for first, end in excluded:
                addresses = addresses[(addresses < first) | (addresses >= end)]
            total += len(addresses) * itemsize
        return total


@pytest.fixture
def counters(monkeypatch):
    """One ``(kernel, role, counter, arguments)`` per launch from here on."""
    found = []
    builder = InterpreterBuilder
    load, store, dot, high = (getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "dot", "umulhi"))

    def counted_load(self, pointers, mask, *rest, **named):
        found[-1][2].access(pointers, mask, found[-1][2].loaded)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest):
        found[-1][2].access(pointers, mask, found[-1][2].stored)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        found[-1][2].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counted_high(self, left, right):
        found[-1][2].high_products += np.broadcast(left.data, right.data).size
        return high(self, left, right)

    def refused(self, *rest):
        raise AssertionError("the model knows no atomics")

    for name, function in (("masked_load", counted_load), ("masked_store", counted_store), ("dot", counted_dot),
                           ("umulhi", counted_high), ("atomic_rmw", refused), ("atomic_cas", refused)):
        monkeypatch.setattr(builder, f"create_{name}", function)
    run = group.launch

    def counted_launch(kernel, role, grid, device, config, *arguments, **constants):
        if 0 not in grid:
            found.append((kernel.__name__, role, Counter(), dict(zip(kernel.arg_names, arguments))))
        run(kernel, role, grid, device, config, *arguments, **constants)

    monkeypatch.setattr(group, "launch", counted_launch)
    return found


def run(s):
    """A forward and a backward of the scenario with every path active and every gate open."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape, dtype=s.dtype: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    ranks, outputs, sources = (list(part) for part in zip(*s.paths))
    widths = (*s.source_widths, s.width)
    adapters = s.dtype if s.dtype == torch.float32 else s.adapter_dtype
    x, grads = draw(s.rows, s.width), [draw(s.rows, n) for n in s.out_features]
    biases = [draw(n if s.has_bias else 0) for n in s.out_features]
    bases = (([draw(s.rows, n) for n in s.out_features],) if s.is_delta else
             ([draw(n, s.width) for n in s.out_features], [], biases))
    rest = ([draw(s.rows, width) for width in s.source_widths],
            [draw(rank, widths[source], dtype=adapters) for rank, source in zip(ranks, sources)],
            [draw(s.out_features[output], rank, dtype=adapters) for rank, output in zip(ranks, outputs)],
            torch.full((len(ranks),), 2.0), torch.ones(sum(ranks)), torch.tensor(ranks, dtype=torch.int32),
            torch.tensor([5]) if s.dropout_p else None, outputs, sources, s.dropout_p,
            int(Flags.SAVE | (Flags.STATISTICS if s.statistics else Flags.NONE)))
    needs = Needs.X | Needs.SOURCES | Needs.LORA_A | Needs.LORA_B | (Needs.STATISTICS if s.statistics else Needs.NONE)
    name = "lora_delta" if s.is_delta else "lora_linear"
    _, hidden, mask = getattr(ops, f"{name}_triton")(x, *bases, *rest)
    getattr(ops, f"{name}_backward_triton")(grads, x, *bases, *rest, hidden, mask, int(needs))


def check(scenario, counters):
    modelled = gpu_model.costs_of(scenario, "interpreter")
    counters.clear()
    run(scenario)
    assert [(name, role) for name, role, _, _ in counters] == [(cost.kernel, cost.role) for cost in modelled]
    for (name, _, counter, arguments), cost in zip(counters, modelled):
        assert cost.issued == pytest.approx(counter.bytes, rel=0.02), name
        assert cost.flops == counter.flops and cost.philox * 20 == counter.high_products, name
        tables = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
                  for argument, t in arguments.items() if argument in TABLES]
        for amounts, kept in ((cost.reads, counter.loaded), (cost.writes, counter.stored)):
            assert sum(amounts.values()) == pytest.approx(counter.distinct(kept, tables), rel=0.02), (name, amounts)
    return modelled


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_model_equals_the_interpreter(scenario, counters):
    modelled = check(scenario, counters)
    if scenario.name == "several chunks of columns":
        assert any(cost.again for cost in modelled)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_model_equals_the_interpreter_with_persistent_programs(tma, counters, monkeypatch):
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "persistent": True, "tma": tma})
    check(SCENARIOS[1], counters)
    assert next(arguments for _, role, _, arguments in counters if role == "forward")["M"] == SCENARIOS[1].rows


def test_matmuls_of_torch_are_charged(counters, monkeypatch):
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "variant": "cublas"}
                        if role in ("forward", "grad_x") else choose(role, *shape))
    s = SCENARIOS[1]
    modelled = gpu_model.costs_of(s, "interpreter")
    counters.clear()
    run(s)
    matmuls = [cost for cost in modelled if cost.kernel == "torch matmul"]
    assert sum(cost.flops for cost in matmuls) == 2 * 2 * s.rows * s.width * sum(s.out_features)
    rest = [cost for cost in modelled if cost.kernel != "torch matmul"]
    assert [role for _, role, _, _ in counters] == [cost.role for cost in rest]
    for (name, _, counter, _), cost in zip(counters, rest):
        assert (cost.issued, cost.flops) == (counter.bytes, counter.flops), name
