"""Numbers of the Triton backend; pytest runs this file through test_triton.py, in a process with TRITON_INTERPRET=1.

On CPU tensors kernels run in Triton's interpreter with the small tiles of its row in the table; with HETEROLORA_TEST_DEVICE=cuda
and without TRITON_INTERPRET they run on the device.
"""

import os
from dataclasses import replace

import helpers_search as hs
import pytest
import torch
from helpers_op import (
    CASES,
    Case,
    assert_same,
    dense,
    dropped,
    gradients,
    keep_matrix,
    make_inputs,
    packed_bytes,
    random_grads,
)
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import heterolora_kernels as hlk
from heterolora_kernels.backends import resolve
from heterolora_kernels.ops.ledger import COLUMNS
from heterolora_kernels.ops.schema import Flags, Needs, hidden_offsets

DEVICE = torch.device(os.environ.get("HETEROLORA_TEST_DEVICE", "cpu"))
resolve(DEVICE, "triton")

from heterolora_kernels.backends.triton import configs, group, launch, plan  # noqa: E402 - the backend is imported at its first use

EPSILON = {torch.float32: 2.0 ** -23, torch.bfloat16: 2.0 ** -7, torch.float16: 2.0 ** -10}
ops = torch.ops.heterolora_kernels
MIXED = Case(m=37, k=45, outs=(19, 33, 18), biases=(True, False, True), source_sizes=(27, 41),
             paths=tuple((rank, index % 3, (-1, -1, 0, 1)[index % 4])
                         for index, rank in enumerate((0, 1, 3, 5, 8, 13, 16, 24, 40, 64))),
             dropout_p=0.3, gates="mixed", seed=11)
ALL_CASES = {**CASES, "mixed_ranks": MIXED, "mixed_ranks_no_dropout": replace(MIXED, dropout_p=0.0),
             "decoding": Case(m=3, k=37, outs=(21, 9), biases=(True, False), paths=((5, 0, -1), (9, 1, -1), (2, 1, -1)),
                              gates="mixed")}
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
         (torch.float16, torch.float32)]

cases = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
types = pytest.mark.parametrize("dtype, adapters", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def larger(case):
    """Sizes above one tile of every kernel, still multiples of nothing."""
    if case.m in (3, 37):
        return case
    return replace(case, m=case.m + 30, k=case.k + 50)


def make(case, dtype=torch.float32, adapters=None):
    return make_inputs(case, dtype, adapters).to(DEVICE)


def base_outs(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(41)
    return [torch.randn(case.m, n, dtype=torch.float64, generator=generator).to(DEVICE, dtype) for n in case.outs]


def error(actual, truth):
    return (actual.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_bounded(actual, yardstick, truth, factor, dtype, name):
    """The error rule: at most ``factor`` times the error of plain PyTorch in the same dtype."""
    assert torch.isfinite(actual).all(), name
    # Float32 sums of a few terms are exact to the last bit or two in any order, in the yardstick by chance to the last.
    slack = EPSILON[dtype] * truth.abs().max().item() / (1 if dtype == torch.float32 else 8) if truth.numel() else 0.0
    assert error(actual, truth) <= factor * error(yardstick, truth) + slack, name


def check_against_dense(inputs, rtol=2e-5, atol=2e-5):
    """Values and every gradient of float32 inputs against float64."""
    inputs.requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, expected = inputs.run(backend="triton"), dense(truth)
    assert_same([out.double() for out in outs], expected, rtol, atol)
    grads = random_grads(expected)
    got = gradients(outs, inputs, [grad.float() for grad in grads])
    assert_same({name: grad.double() for name, grad in got.items()}, gradients(expected, truth, grads), rtol, 5 * atol)


@types
@cases
def test_error_is_bounded_by_plain_pytorch(case, dtype, adapters):
    inputs = make(larger(case), dtype, adapters).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, plain, exact = inputs.run(backend="triton"), dense(inputs), dense(truth)
    grads = random_grads(outs)
    fused, usual = gradients(outs, inputs, grads), gradients(plain, inputs, grads)
    wanted = gradients(exact, truth, [grad.double() for grad in grads])
    for i, (out, yardstick, value) in enumerate(zip(outs, plain, exact)):
        assert out.dtype == dtype and out.is_contiguous()
        assert_bounded(out, yardstick, value, 2, dtype, f"outs[{i}]")
    for name, value in wanted.items():
        assert fused[name].dtype == inputs.leaves()[name].dtype
        assert_bounded(fused[name], usual[name], value, 3, dtype, name)


@pytest.mark.parametrize("dtype, adapters", TYPES[:1] + TYPES[2:3], ids=lambda dtype: str(dtype).removeprefix("torch."))
@cases
def test_delta_is_bounded_by_plain_pytorch(case, dtype, adapters):
    case = larger(case)
    inputs, bases = make(case, dtype, adapters), base_outs(case, dtype)
    inputs.weights, inputs.biases = [], []
    inputs.requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, plain = inputs.run_delta(bases, backend="triton"), dense(inputs, bases)
    exact = dense(truth, [base.double() for base in bases])
    for i, (out, base, yardstick, value) in enumerate(zip(outs, bases, plain, exact)):
        assert out.data_ptr() != base.data_ptr()
        assert_bounded(out, yardstick, value, 2, dtype, f"outs[{i}]")
    grads = random_grads(outs)
    fused, usual = gradients(outs, inputs, grads), gradients(plain, inputs, grads)
    for name, value in gradients(exact, truth, [grad.double() for grad in grads]).items():
        assert_bounded(fused[name], usual[name], value, 3, dtype, name)


@pytest.mark.parametrize("flags", [Flags.SAVE, Flags.SAVE | Flags.STATISTICS], ids=["plain", "statistics"])
@cases
def test_hidden_and_mask_are_those_of_the_reference(case, flags):
    inputs = make(larger(case))
    _, hidden, mask = ops.lora_linear_triton(*inputs.args(int(flags)))
    _, expected, expected_mask = ops.lora_linear_reference(*inputs.args(int(flags)))
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    ranks = inputs.ranks
    for first, rank, end in zip(hidden_offsets(ranks), ranks, hidden_offsets(ranks)[1:]):
        assert not hidden[:, first + rank:end].any()


def test_mask_is_the_rule_bit_for_bit():
    inputs = make(replace(MIXED, m=7))
    mask = ops.lora_linear_triton(*inputs.args(int(Flags.SAVE)))[2]
    expected = [packed_bytes(keep_matrix(int(inputs.rng), *u.shape, key, MIXED.dropout_p))
                for key, u in enumerate([inputs.x, *inputs.sources])]
    assert torch.equal(mask.cpu(), torch.cat(expected, dim=1))


@pytest.mark.parametrize("dtype, adapters", TYPES[:1] + TYPES[2:3], ids=lambda dtype: str(dtype).removeprefix("torch."))
@cases
def test_statistics_are_those_of_the_reference(case, dtype, adapters):
    inputs = make(larger(case), dtype, adapters)
    flags, needs = int(Flags.SAVE | Flags.STATISTICS), int(Needs(31))
    outs, hidden, mask = ops.lora_linear_reference(*inputs.args(flags))
    grads = random_grads(outs)
    stats = ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, needs)[4]
    expected = ops.lora_linear_backward_reference(grads, *inputs.args(flags), hidden, mask, needs)[4]
    exact = ops.lora_linear_backward_reference([grad.double() for grad in grads], *inputs.doubles().args(flags), hidden.double(),
                                               mask, needs)[4]
    assert stats.dtype == torch.float32 and stats.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 4 * EPSILON[dtype]
    for index, name in enumerate(COLUMNS):
        # Relative to the path's rows: one row may cancel.
        scale = exact[:, index].abs().max().item() if exact.numel() else 0.0
        assert error(stats[:, index], exact[:, index]) <= tolerance * scale, name


def test_identity_of_the_gradients():
    """<A_j, grad_A_j> = <B_:j, grad_B_:j> = s sum_m q_mj h_mj for every rank of every path."""
    inputs = make(replace(MIXED, gates="ones"))
    flags = int(Flags.SAVE | Flags.STATISTICS)
    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
    _, _, grad_A, grad_B, stats = ops.lora_linear_backward_triton(random_grads(outs), *inputs.args(flags), hidden, mask, 31)
    by_A = torch.cat([(a * grad).sum(1) for a, grad in zip(inputs.lora_A, grad_A)])
    by_B = torch.cat([(b * grad).sum(0) for b, grad in zip(inputs.lora_B, grad_B)])
    gate_grad = stats[:, COLUMNS.index("gate_grad")]
    assert gate_grad.abs().max() > 1
    torch.testing.assert_close(by_A, gate_grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_B, gate_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [
    Case(m=0), Case(m=0, source_sizes=(5,), paths=((3, 0, -1), (2, 0, 0)), dropout_p=0.3),
    Case(m=1, k=13, source_sizes=(5,), paths=((9, 0, -1), (2, 0, 0)), dropout_p=0.3), Case(m=1), Case(paths=()),
    Case(paths=(), dropout_p=0.5), Case(paths=((0, 0, -1),)), Case(k=1, outs=(1,), paths=((1, 0, -1),)),
    Case(paths=((0, 0, -1), (0, 0, 0)), source_sizes=(3,), dropout_p=0.5),
    Case(paths=((0, 0, -1), (2, 0, 0)), source_sizes=(3,), dropout_p=0.5)],
    ids=["no_rows", "no_rows_dropout", "one_row_dropout", "one_row", "no_paths", "no_paths_dropout", "rank_0", "all_ones",
         "rank_0_dropout", "rank_0_beside_another"])
def test_edge_sizes_equal_dense(case):
    check_against_dense(make(case))


@pytest.mark.parametrize("op", ["linear", "delta"])
def test_edge_sizes_have_statistics(op):
    for case in (Case(m=0), Case(m=1), Case(paths=((0, 0, -1),)), Case(paths=())):
        inputs, flags = make(case), int(Flags.SAVE | Flags.STATISTICS)
        bases = base_outs(case)
        args = inputs.args(flags) if op == "linear" else (inputs.x, bases, *inputs.path_args(flags))
        outs, hidden, mask = getattr(ops, f"lora_{op}_reference")(*args)
        results = [getattr(ops, f"lora_{op}_backward_{name}")(random_grads(outs), *args, hidden, mask, 31)
                   for name in ("triton", "reference")]
        for got, want in zip(*results):
            assert_same(got if isinstance(got, list) else [got], want if isinstance(want, list) else [want], 1e-5, 1e-5)


@pytest.mark.parametrize("case", [CASES["all_closed"], MIXED, ALL_CASES["decoding"]], ids=["all_closed", "mixed", "decoding"])
@pytest.mark.parametrize("statistics", [False, True], ids=["plain", "statistics"])
def test_closed_rows_may_hold_nan(case, statistics):
    inputs = make(case)
    flags = int(Flags.SAVE | (Flags.STATISTICS if statistics else Flags.NONE))
    clean = dense(inputs)
    first = 0
    for a, b in zip(inputs.lora_A, inputs.lora_B):
        closed = inputs.gate[first:first + a.shape[0]] == 0
        a[closed] = torch.nan
        b[:, closed] = torch.nan
        first += a.shape[0]
    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
    assert_same(outs, clean, 2e-5, 2e-5)
    grads = random_grads(outs)
    needs = 15 | (int(Needs.STATISTICS) if statistics else 0)
    results = [op(grads, *inputs.args(flags), hidden, mask, needs)
               for op in (ops.lora_linear_backward_triton, ops.lora_linear_backward_reference)]
    for got, want in zip(*results):
        got, want = (part if isinstance(part, list) else [part] for part in (got, want))
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert all(torch.isfinite(part).all() for part in [results[0][0], *results[0][1], *results[0][2], *results[0][3]])


def test_rows_from_active_on_are_not_computed():
    inputs = make(Case(m=35, k=10, source_sizes=(6,), paths=((25, 0, -1), (4, 0, 0))))
    inputs.active[:] = torch.tensor([3, 0], dtype=torch.int32)
    clean = dense(inputs)
    for a, b, rows in zip(inputs.lora_A, inputs.lora_B, (3, 0)):
        a[rows:] = torch.nan
        b[:, rows:] = torch.nan
    inputs.requires_grad_()
    outs = inputs.run(backend="triton")
    assert_same(outs, clean, 2e-5, 2e-5)
    grads = gradients(outs, inputs, random_grads(outs))
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert (grads["lora_A[0]"][:3] != 0).any() and not grads["lora_A[0]"][3:].any() and not grads["lora_B[0]"][:, 3:].any()
    assert not any(grads[name].any() for name in ("lora_A[1]", "lora_B[1]", "sources[0]"))


def test_allocation_written_in_place_is_followed_and_makes_nothing_new():
    inputs = make(CASES["two_linears"])
    inputs.run(backend="triton")
    made = plan.plan_of.cache_info().misses
    inputs.scaling.copy_(torch.tensor([-3.0, 0.125]))
    inputs.gate.copy_(1 - inputs.gate)
    inputs.active.fill_(5)
    assert_same(inputs.run(backend="triton"), dense(inputs), 2e-5, 2e-5)
    inputs.gate.fill_(0.3)
    check_against_dense(inputs)
    assert plan.plan_of.cache_info().misses == made


def test_dropout_of_one_leaves_the_base():
    inputs = make(replace(CASES["two_paths_one_output"], dropout_p=1.0)).requires_grad_()
    outs = inputs.run(backend="triton")
    assert_same(outs, dense(replace(inputs, lora_A=[], path_output=[])), 2e-5, 2e-5)
    grads = gradients(outs, inputs, random_grads(outs))
    assert not any(grads[name].any() for name in grads if name.startswith(("lora", "sources")))


def test_dropped_values_may_be_infinite():
    inputs = make(CASES["one_path_dropout"])
    keep = keep_matrix(int(inputs.rng), *inputs.x.shape, 1, 0.4).to(DEVICE)
    inputs = replace(inputs, sources=[inputs.x.masked_fill(~keep, torch.inf)], path_source=[0])
    inputs.lora_A[0].requires_grad_()
    out, = inputs.run(backend="triton")
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), inputs.lora_A[0])[0]).all()


def strided(tensor, how):
    if how == "transposed":
        return tensor.t().contiguous().t()
    spread = tensor.new_zeros(tensor.shape[0] * 2, tensor.shape[1] * 3)
    spread[::2, ::3] = tensor
    return spread[::2, ::3]


@pytest.mark.parametrize("how", ["transposed", "spread"])
@pytest.mark.parametrize("name", ["one_path_dropout", "three_linears_four_paths", "decoding"])
def test_strided_inputs_equal_dense(name, how):
    inputs = make(ALL_CASES[name]).mapped(lambda name, t: strided(t, how) if t.dim() == 2 else t)
    assert not inputs.x.is_contiguous() and not inputs.weights[0].is_contiguous()
    check_against_dense(inputs)


def test_expanded_gradients_equal_dense():
    inputs = make(CASES["two_linears"]).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    got = torch.autograd.grad(inputs.run(backend="triton")[1].sum(), list(inputs.leaves().values()), allow_unused=True)
    want = torch.autograd.grad(dense(truth)[1].sum(), list(truth.leaves().values()), allow_unused=True)
    for g, w in zip(got, want):
        if g is None:
            assert w is None or not w.any()
        else:
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w.float(), rtol=2e-5, atol=1e-4)


def test_saved_tensors_may_be_strided():
    inputs, flags = make(CASES["three_linears_four_paths"]), int(Flags.SAVE)
    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
    grads = random_grads(outs)
    plain = ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, 15)
    other = ops.lora_linear_backward_triton(grads, *inputs.args(flags), strided(hidden, "spread"), strided(mask, "spread"), 15)
    for got, want in zip(other, plain):
        assert_same(got if isinstance(got, list) else [got], want if isinstance(want, list) else [want], rtol=0, atol=0)


@pytest.mark.parametrize("variant", configs.VARIANTS)
@pytest.mark.parametrize("case", [ALL_CASES["decoding"], replace(ALL_CASES["decoding"], m=39), CASES["three_linears_four_paths"]],
                         ids=["few_rows", "rows", "sources"])
def test_every_variant_equals_dense(case, variant, monkeypatch):
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "variant": variant, "BLOCK_R": 32}
                        if role in ("forward", "grad_x") else choose(role, *shape))
    launched = []
    run = launch.launch
    monkeypatch.setattr(group, "launch", lambda kernel, role, *rest, **kw: (launched.append((role, kw.get("ONE_PASS"))),
                                                                            run(kernel, role, *rest, **kw)))
    check_against_dense(make(case))
    is_one_pass = variant == "one_pass" and not case.dropout_p
    assert ("forward", True) in launched if is_one_pass else ("hidden", None) in launched
    assert (("delta", False) in launched) == (variant == "cublas")


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", [Case(m=70, k=48, outs=(72, 40), biases=(True, False), paths=((5, 0, -1), (9, 1, -1)),
                                       gates="mixed"), Case(m=1, k=16, outs=(8,)), CASES["three_linears_four_paths"]],
                         ids=["aligned", "one_row", "odd"])
def test_persistent_programs_equal_dense(case, tma, monkeypatch):
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "persistent": True, "tma": tma,
                                                                 "variant": "two_pass"}
                        if role == "forward" else choose(role, *shape))
    seen = []
    run = launch.launch
    monkeypatch.setattr(group, "launch", lambda kernel, role, grid, *rest, **kw: (seen.append((role, grid[0], kw.get("TMA"))),
                                                                                  run(kernel, role, grid, *rest, **kw)))
    check_against_dense(make(case))
    programs, uses_tma = next((programs, uses) for role, programs, uses in seen if role == "forward")
    assert programs <= launch.processors(DEVICE)
    assert uses_tma == (tma and case is not CASES["three_linears_four_paths"])


@pytest.mark.parametrize("columns, offset, expected", [(48, 0, True), (48, 1, False), (52, 0, False)],
                         ids=["aligned", "base", "rows"])
def test_descriptors_need_weights_at_sixteen_bytes(columns, offset, expected, monkeypatch):
    choose, seen = configs.choose, []
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "tma": True, "variant": "two_pass"}
                        if role == "forward" else choose(role, *shape))
    run = launch.launch
    monkeypatch.setattr(group, "launch", lambda kernel, role, *rest, **kw: (seen.append(kw.get("TMA")),
                                                                            run(kernel, role, *rest, **kw)))
    inputs = make(Case(m=20, k=48, outs=(24,), paths=((5, 0, -1),)))
    weight, = inputs.weights
    buffer = weight.new_zeros(24 * columns + offset)
    inputs.weights = [buffer[offset:].view(24, columns)[:, :48].copy_(weight)]
    assert_same(inputs.run(backend="triton"), dense(inputs), 2e-5, 2e-5)
    assert seen[-1] is expected


def test_sums_are_split_and_the_parts_are_used():
    inputs, seen = make(larger(CASES["one_path_dropout"])), {}

    def record(kernel, role, grid, arguments, constants, options):
        seen[role] = {"grid": grid, **dict(zip(kernel.arg_names, arguments)), **constants}

    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(3))
    with launch.intercepted(record, "interpreter"):
        ops.lora_linear_backward_triton(random_grads(outs), *inputs.args(3), hidden, mask, 31)
    assert seen["q_grad_B"]["ONE_READ"] and seen["grad_A"]["grid"][2] > 1 and seen["q_sum"]["grid"][0] > 1
    assert seen["q_grad_B"]["grad_B_parts_ptr"].shape[0] > 1
    wide = make(replace(larger(CASES["one_path_dropout"]), outs=(41,)))
    outs, hidden, mask = ops.lora_linear_triton(*wide.args(3))
    with launch.intercepted(record, "interpreter"):
        ops.lora_linear_backward_triton(random_grads(outs), *wide.args(3), hidden, mask, 31)
    assert seen["q_grad_B"]["q_parts_ptr"].shape[0] > 1
    high = make(replace(larger(CASES["one_path_dropout"]), paths=((20, 0, -1),)))
    outs, hidden, mask = ops.lora_linear_triton(*high.args(3))
    with launch.intercepted(record, "interpreter"):
        ops.lora_linear_backward_triton(random_grads(outs), *high.args(3), hidden, mask, 31)
    assert not seen["q_grad_B"]["ONE_READ"] and seen["q_grad_B"]["q_programs"] > 1
    assert seen["q_grad_B"]["grad_B_parts_ptr"].shape[0] > 1


def test_each_need_alone_gives_the_same_bits_and_nothing_else():
    inputs = make(CASES["three_linears_four_paths"])
    flags = int(Flags.SAVE | Flags.STATISTICS)
    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
    grads = random_grads(outs)
    flatten = lambda result: [t for part in result for t in (part if isinstance(part, list) else [part])]  # noqa: E731
    full = ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, 31)
    for place, need in enumerate((Needs.X, Needs.SOURCES, Needs.LORA_A, Needs.LORA_B, Needs.STATISTICS)):
        result = ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, int(need))
        for part in range(5):
            got, want = flatten([result[part]]), flatten([full[part]])
            assert all(torch.equal(g, w) if part == place else g.numel() == 0 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["one_path_dropout", "three_linears_four_paths"])
def test_backward_twice_is_bitwise_equal(name):
    inputs = make(larger(CASES[name]), torch.bfloat16, torch.float32).requires_grad_()
    outs = inputs.run(backend="triton")
    grads = random_grads(outs)
    first = gradients(outs, inputs, grads, retain_graph=True)
    assert_same(gradients(outs, inputs, grads), first, rtol=0, atol=0)


@types
def test_same_inputs_same_bits(dtype, adapters):
    def run():
        inputs = make(larger(CASES["two_paths_one_output"]), dtype, adapters).requires_grad_()
        outs = inputs.run(backend="triton")
        return [*outs, *gradients(outs, inputs, random_grads(outs)).values()]

    assert_same(run(), run(), rtol=0, atol=0)


@pytest.mark.parametrize("op", ["linear", "delta"])
def test_no_input_is_written(op):
    case = CASES["three_linears_four_paths"]
    inputs = make(case).requires_grad_()
    bases = [base.requires_grad_() for base in base_outs(case)]
    tensors = [*inputs.leaves().values(), *bases, inputs.scaling, inputs.gate, inputs.active, inputs.rng]
    before = [(t._version, t.detach().clone()) for t in tensors]
    outs = inputs.run(backend="triton") if op == "linear" else inputs.run_delta(bases, backend="triton")
    grads = random_grads(outs)
    kept = [grad.clone() for grad in grads]
    torch.autograd.backward(outs, grads)
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(tensors, before))
    assert_same(grads, kept, rtol=0, atol=0)


def test_adapters_of_two_dtypes_in_one_group():
    inputs = make(CASES["two_linears"], torch.bfloat16, torch.float32)
    inputs.lora_A[1], inputs.lora_B[1] = inputs.lora_A[1].bfloat16(), inputs.lora_B[1].bfloat16()
    inputs.requires_grad_()
    outs = inputs.run(backend="triton")
    plain = inputs.run(backend="reference")
    for out, value in zip(outs, plain):
        torch.testing.assert_close(out, value, rtol=2e-2, atol=2e-2)
    grads = random_grads(outs)
    assert_same(gradients(outs, inputs, grads), gradients(plain, inputs, grads), 5e-2, 5e-2)


def test_hidden_of_dropout_is_the_dropped_source_times_A():
    inputs = make(larger(CASES["one_path_dropout"]))
    hidden = ops.lora_linear_triton(*inputs.args(int(Flags.SAVE | Flags.STATISTICS)))[1]
    expected = dropped(inputs, 0) @ inputs.lora_A[0].t()
    torch.testing.assert_close(hidden[:, :3], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs the interpreter: a device has other tests for this")
def test_backend_is_never_chosen_for_cpu_tensors():
    assert "triton" in hlk.available_backends()
    assert resolve(DEVICE) != "triton"
    with pytest.raises(TypeError, match="backend 'triton' takes x of .*got torch.float64"):
        resolve(DEVICE, "triton", torch.float64)


@pytest.mark.parametrize("op", ["linear", "delta"])
def test_fakes_agree_with_what_runs(op):
    case = CASES["three_linears_four_paths"]
    inputs, flags = make(case), int(Flags.SAVE | Flags.STATISTICS)
    args = inputs.args(flags) if op == "linear" else (inputs.x, base_outs(case), *inputs.path_args(flags))
    checks = ("test_schema", "test_faketensor")
    outs, hidden, mask = getattr(ops, f"lora_{op}_triton")(*args)
    torch.library.opcheck(getattr(ops, f"lora_{op}_triton").default, args, test_utils=checks)
    torch.library.opcheck(getattr(ops, f"lora_{op}_backward_triton").default, (random_grads(outs), *args, hidden, mask, 31),
                          test_utils=checks)


def test_a_compiled_model_is_one_graph_of_the_ops_and_follows_new_ranks():
    graphs = []

    def record(graph, examples):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, batch = hs.make_llama(layers=1).to(DEVICE), {name: value.to(DEVICE) for name, value in hs.llama_batch(0).items()}

    def grads(call):
        model.zero_grad()
        call(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=record))
    with hlk.use_backend("triton"):
        search, compiled = hlk.RankSearch(model), torch.compile(model, fullgraph=True, backend=counter)
        for ranks in (None, 0, 1):
            if ranks is not None:
                search.apply({name: ranks for name in list(search.paths)[::2]})
            assert_same(grads(compiled), grads(model), 1e-5, 1e-6)
    # One graph forward and one backward, and in them the ops as they are, not what they are made of.
    called = [{str(node.target) for node in graph.graph.nodes if "heterolora" in str(node.target)} for graph in graphs]
    assert called == [{f"heterolora_kernels.{op}_triton.default"} for op in ("lora_linear", "lora_linear_backward")]
    assert counter.frame_count == 1


@pytest.mark.parametrize("score", ["in_step", "probe"])
def test_search_gives_the_ranks_of_the_reference(score):
    batch = {name: value.to(DEVICE) for name, value in hs.net_batch(9).items()}

    def ranks(backend):
        with hlk.use_backend(backend):
            model = hs.make_net(score=score, num_batches=1, interval=1, warmup=1).to(DEVICE)
            optimizer = torch.optim.AdamW(hs.trainable(model), lr=0.05)
            search = hlk.RankSearch(model, optimizer, [batch])
            search.start()
            for seed in range(3):
                hs.train_step(model, optimizer, {name: value.to(DEVICE) for name, value in hs.net_batch(seed).items()}, search)
            return [dict(entry["ranks"]) for entry in search.history], search.ranks

    history, last = ranks("triton")
    assert (history, last) == ranks("reference")
    assert 0 < sum(rank > 0 for rank in last.values()) < len(last)
