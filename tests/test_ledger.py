"""Statistics: the identity that ties them together, each column against autograd, and the readers of the buffer."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers_op import CASES, Case, delta, dense, dropped, gradients, make_inputs, path_slices, random_grads

from heterolora_kernels.functional import lora_linear_group
from heterolora_kernels.ops.ledger import COLUMN_DEGREES, COLUMNS, NUM_COLUMNS, Ledger, columns_of, row_statistics

WITH_PATHS = {name: case for name, case in CASES.items()}
cases = pytest.mark.parametrize("case", WITH_PATHS.values(), ids=WITH_PATHS)


def _probe(rows):
    return torch.zeros(rows, NUM_COLUMNS, requires_grad=True)


def _loss(outs):
    """Not linear, so that grad_out depends on the gates of the network as it runs."""
    return sum((out * out.detach().cos() + out.pow(3) / 3).sum() for out in outs)


def _run(inputs):
    """Gradients of the fused op and its statistics, {column: [R]}."""
    probe = _probe(sum(inputs.ranks))
    _loss(inputs.run(probe)).backward()
    return columns_of(probe.grad)


def _expected(inputs):
    """Every column of every path from autograd over the path alone, gate 1, fed with the grad_out of the gated network."""
    outs = [out.detach().requires_grad_() for out in dense(inputs)]
    grad_outs = torch.autograd.grad(_loss(outs), outs)
    rows = {name: [] for name in COLUMNS}
    for p, rank in enumerate(inputs.ranks):
        a, b = inputs.lora_A[p].detach().clone().requires_grad_(), inputs.lora_B[p].detach().clone().requires_grad_()
        gate = torch.ones(rank, dtype=torch.float64, requires_grad=True)
        alone = inputs.mapped(lambda name, t, p=p, a=a, b=b: {f"lora_A[{p}]": a, f"lora_B[{p}]": b}.get(name, t.detach()))
        out = delta(alone, p, gate)
        grad_a, grad_b, grad_gate = torch.autograd.grad(out, [a, b, gate], grad_outs[inputs.path_output[p]])
        per_a, per_b = (a * grad_a).detach(), (b * grad_b).detach()
        rows["hidden_sq"].append((dropped(alone, p) @ a.t()).square().sum(0).detach())
        rows["grad_A_sq"].append(grad_a.square().sum(1))
        rows["grad_B_sq"].append(grad_b.square().sum(0))
        rows["abs_A_grad_A"].append(per_a.abs().sum(1))
        rows["abs_B_grad_B"].append(per_b.abs().sum(0))
        rows["gate_grad"].append(grad_gate)
        rows["taylor_sq"].append(per_a.square().sum(1) + per_b.square().sum(0))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_columns_are_those_of_the_contract():
    assert COLUMNS == ("hidden_sq", "grad_A_sq", "grad_B_sq", "abs_A_grad_A", "abs_B_grad_B", "gate_grad", "taylor_sq")
    assert NUM_COLUMNS == 7
    assert [COLUMN_DEGREES[name] for name in COLUMNS] == [0, 2, 2, 1, 1, 1, 2]


@cases
def test_identity_of_gate_gradient(case):
    """<A_j, grad_A_j> = <B_j, grad_B_j> = s sum q h = the statistic, with every gate 1, dropout included."""
    inputs = make_inputs(replace(case, gates="ones")).requires_grad_()
    outs = inputs.run(_probe(sum(inputs.ranks)))
    grads = random_grads(outs)
    got = gradients(outs, inputs, grads)
    stat = _stats_of(inputs, grads)["gate_grad"].double()
    for p, where in enumerate(path_slices(inputs.ranks)):
        from_a = (inputs.lora_A[p] * got[f"lora_A[{p}]"]).sum(1)
        from_b = (inputs.lora_B[p] * got[f"lora_B[{p}]"]).sum(0)
        q = grads[inputs.path_output[p]] @ inputs.lora_B[p]
        by_hand = inputs.scaling[p].double() * (q * (dropped(inputs, p) @ inputs.lora_A[p].t())).sum(0)
        torch.testing.assert_close(from_a, from_b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(from_a, by_hand, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(stat[where], by_hand, rtol=1e-6, atol=1e-6)


def _stats_of(inputs, grads):
    probe = _probe(sum(inputs.ranks))
    torch.autograd.backward(inputs.run(probe), grads)
    return columns_of(probe.grad)


@pytest.mark.parametrize("gates", ["ones", "mixed", "closed_first", "closed"])
@cases
def test_columns_equal_autograd_as_if_gates_were_one(case, gates):
    inputs = make_inputs(replace(case, gates=gates)).requires_grad_()
    got, expected = _run(inputs), _expected(inputs)
    for name in COLUMNS:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), expected[name], rtol=2e-6, atol=1e-6,
                                   msg=lambda text, name=name: f"{name}: {text}")
    if sum(inputs.ranks):
        assert (expected["grad_A_sq"] > 0).all()


@cases
def test_gradients_to_autograd_are_those_without_statistics(case):
    def run(probed):
        inputs = make_inputs(case).requires_grad_()
        outs = inputs.run(_probe(sum(inputs.ranks)) if probed else None)
        return [*outs, *gradients(outs, inputs, random_grads(outs)).values()]

    for with_probe, without in zip(run(True), run(False)):
        torch.testing.assert_close(with_probe, without, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "float32"])
def test_columns_of_sixteen_bits_are_near_the_exact_ones(dtype, adapters):
    case = replace(CASES["three_linears_four_paths"], m=60, k=70)
    inputs = make_inputs(case, dtype, adapters).requires_grad_()
    grads = random_grads(dense(inputs))
    got = _stats_of(inputs, grads)
    exact = _stats_of(inputs.doubles().requires_grad_(), [grad.double() for grad in grads])
    for name in COLUMNS:
        assert got[name].dtype == torch.float32
        error = (got[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 2.0 ** -7, name


def test_columns_of_adapters_without_gradients():
    inputs = make_inputs(CASES["two_paths_one_output"]).requires_grad_({"x"})
    frozen = _run(inputs)
    assert all(t.grad is None for name, t in inputs.leaves().items() if name != "x")
    for name, value in _expected(inputs).items():
        torch.testing.assert_close(frozen[name].double(), value, rtol=2e-6, atol=1e-6)


def test_columns_reach_a_probe_that_alone_requires_grad():
    inputs = make_inputs(CASES["two_paths_one_output"])
    got = _run(inputs)
    for name, value in _expected(inputs).items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-6, atol=1e-6)


def test_row_statistics_derives_what_is_not_given():
    generator = torch.Generator().manual_seed(9)
    a, grad_a = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    b, grad_b = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    rows = columns_of(row_statistics(a, b, grad_a, grad_b))
    assert not rows["hidden_sq"].any()
    for j in range(3):
        products = [[x * g for x, g in zip(a[j].tolist(), grad_a[j].tolist())],
                    [x * g for x, g in zip(b[:, j].tolist(), grad_b[:, j].tolist())]]
        expected = {"grad_A_sq": sum(g * g for g in grad_a[j].tolist()), "grad_B_sq": sum(g * g for g in grad_b[:, j].tolist()),
                    "abs_A_grad_A": sum(map(abs, products[0])), "abs_B_grad_B": sum(map(abs, products[1])),
                    "gate_grad": sum(products[0]), "taylor_sq": sum(v * v for part in products for v in part)}
        for name, value in expected.items():
            assert rows[name][j].item() == pytest.approx(value, rel=1e-5)
    given = columns_of(row_statistics(a, b, grad_a, grad_b, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])))
    assert given["hidden_sq"].tolist() == [1, 2, 3] and given["gate_grad"].tolist() == [4, 5, 6]


# The buffer and its readers.

RANKS = {"a": 3, "b": 0, "c": 2}


def _fill(ledger, value, first="a", rows=5):
    """What one backward leaves in the buffer."""
    ledger.bind(first, rows, torch.device("cpu")).add_(value)


def _raw(collector, path="a", column="hidden_sq"):
    return collector.table()[path][column].tolist()


def test_probe_gradient_accumulates_in_its_slice():
    inputs = make_inputs(replace(Case(), paths=((2, 0, -1),))).requires_grad_()
    ledger = Ledger(RANKS)
    collector = ledger.open()
    probe = _probe(2)
    probe.grad = ledger.bind("c", 2, torch.device("cpu"))
    alone = torch.stack(list(_run(inputs).values()), dim=1)
    for _ in range(3):
        _loss(inputs.run(probe)).backward()
    assert probe.grad.data_ptr() == ledger.bind("c", 2, torch.device("cpu")).data_ptr()
    table = collector.table()
    for name, value in columns_of(alone).items():
        torch.testing.assert_close(table["c"][name], 3 * value)
        assert not table["a"][name].any()
    assert not probe.grad.any()
    _loss(inputs.run(probe)).backward()
    torch.testing.assert_close(collector.table()["c"]["grad_A_sq"], 4 * columns_of(alone)["grad_A_sq"])


def test_recomputation_counts_once():
    inputs = make_inputs(CASES["one_path_dropout"]).requires_grad_()
    once = _run(inputs)
    probe = _probe(3)

    def block(x):
        return replace(inputs, x=x).run(probe)[0]

    for reentrant in (False, True):
        probe.grad = None
        _loss([torch.utils.checkpoint.checkpoint(block, inputs.x, use_reentrant=reentrant)]).backward()
        for name, value in columns_of(probe.grad).items():
            torch.testing.assert_close(value, once[name])


def test_no_backward_leaves_nothing():
    inputs = make_inputs(CASES["one_path"]).requires_grad_()
    ledger = Ledger({"a": 3})
    collector = ledger.open()
    probe = _probe(3)
    probe.grad = ledger.bind("a", 3, torch.device("cpu"))
    inputs.run(probe)
    assert not any(value.any() for value in collector.table()["a"].values())


def test_table_names_every_path_and_column():
    ledger = Ledger(RANKS)
    collector = ledger.open()
    _fill(ledger, torch.arange(35.0).reshape(5, 7))
    table = collector.table()
    assert list(table) == list(RANKS)
    for path, rank in RANKS.items():
        assert list(table[path]) == list(COLUMNS)
        assert all(value.shape == (rank,) and value.dtype == torch.float32 for value in table[path].values())
    assert table["a"]["hidden_sq"].tolist() == [0, 7, 14] and table["c"]["taylor_sq"].tolist() == [27, 34]
    table["a"]["hidden_sq"].fill_(99)
    assert _raw(collector) == [0, 7, 14]


def test_collecting_is_true_while_somebody_reads():
    ledger = Ledger(RANKS)
    assert not ledger.collecting
    first, second = ledger.open(), ledger.open()
    ledger.close(first)
    assert ledger.collecting
    ledger.close(second)
    ledger.close(second)
    assert not ledger.collecting


def test_reader_sees_only_what_comes_after_it():
    ledger = Ledger(RANKS)
    _fill(ledger, 5.0)
    first = ledger.open()
    _fill(ledger, 1.0)
    second = ledger.open()
    _fill(ledger, 2.0)
    assert _raw(first) == [3, 3, 3] and _raw(second) == [2, 2, 2]
    ledger.close(first)
    _fill(ledger, 4.0)
    assert _raw(first) == [3, 3, 3] and _raw(second) == [6, 6, 6]


def test_readers_do_not_disturb_each_other():
    ledger = Ledger(RANKS)
    first, second = ledger.open(), ledger.open()
    _fill(ledger, 1.0)
    first.zero_()
    assert _raw(first) == [0, 0, 0] and _raw(second) == [1, 1, 1]
    _fill(ledger, 2.0)
    second.commit()
    assert _raw(first) == [2, 2, 2] and _raw(second) == [0, 0, 0]
    assert ledger.split(second.committed)["a"]["hidden_sq"].tolist() == [3, 3, 3]
    _fill(ledger, 4.0)
    second.discard()
    assert _raw(first) == [6, 6, 6] and _raw(second) == [0, 0, 0]


def test_commit_divides_by_the_degree_of_the_loss_scale():
    ledger = Ledger(RANKS)
    collector = ledger.open()
    for scale, value in ((4.0, 3.0), (8.0, 2.0)):
        _fill(ledger, torch.tensor([value * scale ** COLUMN_DEGREES[name] for name in COLUMNS]))
        collector.commit(loss_scale=scale)
    assert torch.equal(collector.committed, torch.full((5, 7), 5.0))
    assert collector.steps == 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=["inf", "minus_inf", "nan"])
def test_commit_drops_a_step_that_is_not_finite(bad):
    ledger = Ledger(RANKS)
    collector = ledger.open()
    _fill(ledger, 1.0)
    collector.commit()
    _fill(ledger, 7.0)
    ledger.bind("c", 2, torch.device("cpu"))[1, 3] = bad
    collector.commit()
    assert torch.equal(collector.committed, torch.ones(5, 7)) and collector.steps == 1
    _fill(ledger, 2.0)
    collector.commit()
    assert torch.equal(collector.committed, torch.full((5, 7), 3.0)) and collector.steps == 2


def test_discard_forgets_only_the_open_step():
    ledger = Ledger(RANKS)
    collector = ledger.open()
    _fill(ledger, 1.0)
    collector.commit()
    _fill(ledger, 5.0)
    collector.discard()
    _fill(ledger, 2.0)
    collector.commit()
    assert torch.equal(collector.committed, torch.full((5, 7), 3.0))


def test_zero_forgets_everything_and_returns_the_reader():
    ledger = Ledger(RANKS)
    collector = ledger.open()
    _fill(ledger, 1.0)
    collector.commit()
    _fill(ledger, 2.0)
    assert collector.zero_() is collector
    assert not collector.committed.any() and not collector.raw.any() and collector.steps == 0


def test_isolated_block_is_seen_by_its_readers_alone():
    ledger = Ledger(RANKS)
    outer = ledger.open()
    _fill(ledger, 1.0)
    with ledger.isolated():
        inner, staying = ledger.open(), ledger.open()
        _fill(ledger, 10.0)
        assert _raw(inner) == [10, 10, 10]
        ledger.close(inner)
    assert _raw(inner) == [10, 10, 10]
    _fill(ledger, 2.0)
    assert _raw(outer) == [3, 3, 3] and _raw(inner) == [10, 10, 10] and _raw(staying) == [12, 12, 12]


def test_isolated_block_restores_the_readers_after_an_exception():
    ledger = Ledger(RANKS)
    outer = ledger.open()
    with pytest.raises(KeyError, match="wanted"):
        with ledger.isolated():
            _fill(ledger, 10.0)
            raise KeyError("wanted")
    _fill(ledger, 2.0)
    assert _raw(outer) == [2, 2, 2]


def test_flush_without_readers_zeroes_the_buffer():
    ledger = Ledger(RANKS)
    _fill(ledger, 1.0)
    ledger.flush()
    assert not ledger.bind("a", 5, torch.device("cpu")).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ledger: pickle.loads(pickle.dumps(ledger))], ids=["deepcopy", "pickle"])
def test_copy_has_no_readers_and_its_own_buffer(copied):
    ledger = Ledger(RANKS)
    collector = ledger.open()
    twin = copied(ledger)
    assert not twin.collecting and ledger.collecting
    _fill(twin, 1.0)
    assert _raw(collector) == [0, 0, 0]
    assert list(twin.rows_by_path(twin.new_rows())) == list(RANKS)


def test_group_function_passes_the_probe():
    inputs = make_inputs(CASES["two_linears"]).requires_grad_()
    probe = _probe(6)
    outs = lora_linear_group(inputs.x, inputs.weights, inputs.biases, inputs.sources, inputs.lora_A, inputs.lora_B,
                             inputs.scaling, inputs.gate, inputs.active, inputs.path_output, inputs.path_source, probe=probe)
    _loss(outs).backward()
    for name, value in _run(inputs).items():
        torch.testing.assert_close(columns_of(probe.grad)[name], value)
