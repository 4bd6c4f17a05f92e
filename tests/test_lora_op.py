"""The numbers of the op: float64 autograd as truth, then 16 bits by the error rule, and what a backward may not do."""

from dataclasses import replace

import pytest
import torch
from fuzzing import fuzz
from helpers_op import (
    CASES,
    REFERENCE,
    Case,
    assert_same,
    delta,
    dense,
    dropped,
    gradients,
    keep_matrix,
    make_inputs,
    packed_bytes,
    random_grads,
)
from hypothesis import given
from hypothesis import strategies as st

from heterolora_kernels.ops.autograd import call_lora_delta, call_lora_linear
from heterolora_kernels.ops.schema import Flags, Needs

FORWARD = torch.ops.heterolora_kernels.lora_linear_reference
BACKWARD = torch.ops.heterolora_kernels.lora_linear_backward_reference
EPSILON = {torch.float32: 2.0 ** -23, torch.bfloat16: 2.0 ** -7, torch.float16: 2.0 ** -10}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _base_outs(case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(41)
    return [torch.randn(case.m, n, dtype=torch.float64, generator=generator).to(dtype) for n in case.outs]


def _check_against_dense(inputs, rtol=1e-10):
    """Values and every gradient of float64 inputs."""
    inputs.requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, expected = inputs.run(), dense(truth)
    assert_same(outs, expected, rtol)
    grads = random_grads(expected)
    assert_same(gradients(outs, inputs, grads), gradients(expected, truth, grads), rtol)


@cases
def test_linear_equals_dense(case):
    _check_against_dense(make_inputs(case))


@cases
def test_delta_equals_dense(case):
    inputs = make_inputs(case).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    bases = [base.requires_grad_() for base in _base_outs(case)]
    true_bases = [base.detach().clone().requires_grad_() for base in bases]
    outs, expected = inputs.run_delta(bases), dense(truth, true_bases)
    assert_same(outs, expected)
    grads = random_grads(expected)
    inputs.weights = inputs.biases = truth.weights = truth.biases = []
    assert_same(gradients(outs, inputs, grads, retain_graph=True), gradients(expected, truth, grads, retain_graph=True))
    assert_same(torch.autograd.grad(outs, bases, grads), torch.autograd.grad(expected, true_bases, grads))


@cases
def test_linear_gradcheck(case):
    inputs = make_inputs(case).requires_grad_()
    leaves = list(inputs.leaves().values())

    def function(*leaves):
        by_name = dict(zip(inputs.leaves(), leaves))
        return tuple(inputs.mapped(lambda name, t: by_name.get(name, t)).run())

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["two_paths_one_output", "three_linears_four_paths"])
def test_delta_gradcheck(name):
    inputs, bases = make_inputs(CASES[name]), _base_outs(CASES[name])
    inputs.weights, inputs.biases = [], []
    inputs.requires_grad_()
    names = list(inputs.leaves())

    def function(*tensors):
        by_name = dict(zip(names, tensors))
        return tuple(inputs.mapped(lambda name, t: by_name[name]).run_delta(tensors[len(names):]))

    assert torch.autograd.gradcheck(function, [*inputs.leaves().values(), *[b.requires_grad_() for b in bases]])


def test_linear_by_hand():
    # x W^T + b = [1 + 4 + 0.5, 3 + 8 - 0.5]; h = [1 * 1 - 1 * 2] = [-1]; s h B^T = 2 * -1 * [3, -1].
    inputs = replace(make_inputs(Case(m=1, k=2, outs=(2,), paths=((1, 0, -1),))),
                     x=torch.tensor([[1.0, 2.0]]), weights=[torch.tensor([[1.0, 2.0], [3.0, 4.0]])],
                     biases=[torch.tensor([0.5, -0.5])], lora_A=[torch.tensor([[1.0, -1.0]])],
                     lora_B=[torch.tensor([[3.0], [-1.0]])], scaling=torch.tensor([2.0])).requires_grad_()
    outs = inputs.run()
    assert outs[0].tolist() == [[5.5 - 6.0, 10.5 + 2.0]]
    # grad_out = [1, 10]: q = [3 - 10] = [-7].
    grads = gradients(outs, inputs, [torch.tensor([[1.0, 10.0]])])
    assert grads["x"].tolist() == [[31.0 - 14.0, 42.0 + 14.0]]
    assert grads["lora_A[0]"].tolist() == [[-14.0, -28.0]]
    assert grads["lora_B[0]"].tolist() == [[-2.0], [-20.0]]
    assert grads["weights[0]"].tolist() == [[1.0, 2.0], [10.0, 20.0]]
    assert grads["biases[0]"].tolist() == [1.0, 10.0]


@pytest.mark.parametrize("flags", [Flags.SAVE, Flags.SAVE | Flags.STATISTICS], ids=["plain", "statistics"])
@cases
def test_hidden_layout(case, flags):
    inputs = make_inputs(case)
    _, hidden, _ = FORWARD(*inputs.args(int(flags)))
    first = 0
    for p, rank in enumerate(inputs.ranks):
        rows = rank if flags & Flags.STATISTICS else int(inputs.active[p])
        expected = torch.zeros(case.m, -(-rank // 8) * 8, dtype=torch.float64)
        expected[:, :rows] = (dropped(inputs, p) @ inputs.lora_A[p].t())[:, :rows]
        torch.testing.assert_close(hidden[:, first:first + expected.shape[1]], expected, rtol=1e-12, atol=1e-12)
        first += expected.shape[1]
    assert hidden.shape == (case.m, first)


@cases
def test_mask_layout(case):
    inputs = make_inputs(case)
    mask = FORWARD(*inputs.args(int(Flags.SAVE)))[2]
    assert mask.dtype == torch.uint8
    if not case.dropout_p:
        assert mask.numel() == 0
        return
    read = ([(inputs.x, 0)] if -1 in inputs.path_source else []) + [(u, j + 1) for j, u in enumerate(inputs.sources)]
    expected = [packed_bytes(keep_matrix(int(inputs.rng), *u.shape, key, case.dropout_p)) for u, key in read]
    assert torch.equal(mask, torch.cat(expected, dim=1))


def test_forward_saves_nothing_without_the_flag():
    outs, hidden, mask = FORWARD(*make_inputs(CASES["three_linears_four_paths"]).args(0))
    assert len(outs) == 3 and hidden.numel() == 0 and mask.numel() == 0


def test_rows_from_active_on_are_not_computed():
    inputs = make_inputs(Case(k=10, source_sizes=(6,), paths=((9, 0, -1), (4, 0, 0))))
    inputs.active[:] = torch.tensor([3, 0], dtype=torch.int32)
    clean = dense(inputs)
    for a, b, rows in zip(inputs.lora_A, inputs.lora_B, (3, 0)):
        a[rows:] = torch.nan
        b[:, rows:] = torch.nan
    inputs.requires_grad_()
    outs = inputs.run()
    assert_same(outs, clean)
    grads = gradients(outs, inputs, random_grads(outs))
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert (grads["lora_A[0]"][:3] != 0).any() and not grads["lora_A[0]"][3:].any() and not grads["lora_B[0]"][:, 3:].any()
    assert not any(grads[name].any() for name in ("lora_A[1]", "lora_B[1]", "sources[0]"))


def test_every_row_is_computed_with_statistics():
    inputs = make_inputs(replace(CASES["all_closed"], dropout_p=0.2))
    plain, stats = (FORWARD(*inputs.args(int(Flags.SAVE | more))) for more in (Flags.NONE, Flags.STATISTICS))
    assert not plain[1].any()
    assert stats[1][:, :4].all() and stats[1][:, 8:11].all()
    assert_same(stats[0], plain[0], rtol=0, atol=0)


def test_scaling_and_gate_written_in_place_are_followed():
    inputs = make_inputs(CASES["two_linears"])
    inputs.run()
    inputs.scaling.copy_(torch.tensor([-3.0, 0.125]))
    inputs.gate.copy_(1 - inputs.gate)
    inputs.active.fill_(5)
    assert_same(inputs.run(), dense(inputs))


def test_gate_between_zero_and_one_scales_a_path():
    inputs = make_inputs(CASES["two_linears"])
    inputs.gate.fill_(0.3)
    inputs.active.copy_(torch.tensor(inputs.ranks))
    _check_against_dense(inputs)


def test_dropout_of_one_leaves_the_base():
    inputs = make_inputs(replace(CASES["two_paths_one_output"], dropout_p=1.0)).requires_grad_()
    outs = inputs.run()
    assert_same(outs, dense(replace(inputs, lora_A=[], path_output=[])))
    grads = gradients(outs, inputs, random_grads(outs))
    assert not any(grads[name].any() for name in grads if name.startswith(("lora", "sources")))


def test_dropped_values_may_be_infinite():
    inputs = make_inputs(CASES["one_path_dropout"])
    keep = keep_matrix(int(inputs.rng), *inputs.x.shape, 1, 0.4)
    inputs = replace(inputs, sources=[inputs.x.masked_fill(~keep, torch.inf)], path_source=[0])
    assert torch.isfinite(inputs.run()[0]).all()


@pytest.mark.parametrize("case", [
    Case(m=0), Case(m=0, source_sizes=(5,), paths=((3, 0, -1), (2, 0, 0)), dropout_p=0.3),
    Case(m=1, k=13, source_sizes=(5,), paths=((9, 0, -1), (2, 0, 0)), dropout_p=0.3), Case(paths=()),
    Case(paths=(), dropout_p=0.5), Case(paths=((0, 0, -1),)), Case(paths=((0, 0, -1), (0, 0, 0)), source_sizes=(3,),
                                                                  dropout_p=0.5), Case(k=1, outs=(1,), paths=((1, 0, -1),)),
], ids=["no_rows", "no_rows_dropout", "one_row", "no_paths", "no_paths_dropout", "rank_0", "rank_0_dropout", "all_ones"])
def test_edge_sizes_equal_dense(case):
    _check_against_dense(make_inputs(case))


def _strided(tensor, how):
    """The same values on other strides."""
    if how == "transposed":
        return tensor.t().contiguous().t()
    spread = tensor.new_zeros(tensor.shape[0] * 2, tensor.shape[1] * 3)
    spread[::2, ::3] = tensor
    return spread[::2, ::3]


@pytest.mark.parametrize("how", ["transposed", "spread"])
@pytest.mark.parametrize("name", ["one_path_dropout", "three_linears_four_paths"])
def test_strided_inputs_equal_dense(name, how):
    inputs = make_inputs(CASES[name]).mapped(lambda name, t: _strided(t, how) if t.dim() == 2 else t)
    assert not inputs.x.is_contiguous() and not inputs.weights[0].is_contiguous()
    _check_against_dense(inputs)


@pytest.mark.parametrize("make", [lambda outs: outs[1].sum(), lambda outs: outs[0].t()[1:].square().sum(),
                                  lambda outs: (outs[0] @ outs[1].t()[:, :1]).tanh().sum()],
                         ids=["one_output_expanded", "transposed", "both"])
def test_losses_of_some_outputs(make):
    case = replace(CASES["two_linears"], outs=(6, 6))
    inputs = make_inputs(case).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    got = torch.autograd.grad(make(inputs.run()), list(inputs.leaves().values()), allow_unused=True)
    want = torch.autograd.grad(make(dense(truth)), list(truth.leaves().values()), allow_unused=True)
    for name, g, w in zip(inputs.leaves(), got, want):
        # What reaches no output of the loss gets None, not zeros.
        assert (g is None) == (w is None), name
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("asked", [{"x"}, {"weights[0]"}, {"weights[2]", "biases[0]"}, {"sources[1]"}, {"lora_A[2]"},
                                   {"lora_B[0]", "lora_A[3]"}, {"lora_A[0]", "lora_B[0]", "lora_A[1]", "lora_B[1]"}],
                         ids=lambda names: "_".join(sorted(names)))
def test_only_what_requires_grad_gets_one(asked):
    inputs = make_inputs(CASES["three_linears_four_paths"]).requires_grad_(asked)
    truth = inputs.doubles().requires_grad_()
    outs, expected = inputs.run(), dense(truth)
    grads = random_grads(outs)
    torch.autograd.backward(outs, grads)
    wanted = gradients(expected, truth, grads)
    for name, tensor in inputs.leaves().items():
        if name in asked:
            torch.testing.assert_close(tensor.grad, wanted[name], rtol=1e-10, atol=1e-11)
        else:
            assert tensor.grad is None, name


def test_each_need_alone_gives_the_same_bits_and_nothing_else():
    inputs = make_inputs(CASES["three_linears_four_paths"])
    outs, hidden, mask = FORWARD(*inputs.args(int(Flags.SAVE | Flags.STATISTICS)))
    grads = random_grads(outs)
    flatten = lambda result: [t for part in result for t in (part if isinstance(part, list) else [part])]  # noqa: E731
    full = BACKWARD(grads, *inputs.args(int(Flags.SAVE | Flags.STATISTICS)), hidden, mask, 31)
    for place, need in enumerate((Needs.X, Needs.SOURCES, Needs.LORA_A, Needs.LORA_B, Needs.STATISTICS)):
        result = BACKWARD(grads, *inputs.args(int(Flags.SAVE | Flags.STATISTICS)), hidden, mask, int(need))
        for part in range(5):
            got, want = flatten([result[part]]), flatten([full[part]])
            assert all(torch.equal(g, w) if part == place else g.numel() == 0 for g, w in zip(got, want, strict=True))


def test_no_graph_where_nothing_requires_grad():
    inputs = make_inputs(CASES["two_linears"])
    assert all(out.grad_fn is None for out in inputs.run())
    inputs.requires_grad_()
    with torch.no_grad():
        assert all(out.grad_fn is None for out in inputs.run())
    with torch.inference_mode():
        assert_same(inputs.run(), dense(inputs))


@pytest.mark.parametrize("name", ["one_path_dropout", "three_linears_four_paths"])
def test_backward_twice_is_bitwise_equal(name):
    inputs = make_inputs(CASES[name], torch.float32).requires_grad_()
    outs = inputs.run()
    grads = random_grads(outs)
    first = gradients(outs, inputs, grads, retain_graph=True)
    assert_same(gradients(outs, inputs, grads), first, rtol=0, atol=0)


def test_double_backward_is_refused():
    inputs = make_inputs(CASES["one_path"]).requires_grad_()
    grad, = torch.autograd.grad(inputs.run()[0].square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(dtype):
    def run():
        inputs = make_inputs(CASES["three_linears_four_paths"], dtype).requires_grad_()
        outs = inputs.run()
        return [*outs, *gradients(outs, inputs, random_grads(outs)).values()]

    assert_same(run(), run(), rtol=0, atol=0)


@pytest.mark.parametrize("op", ["linear", "delta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_input_is_written(op, dtype):
    inputs = make_inputs(CASES["three_linears_four_paths"], dtype).requires_grad_()
    bases = [base.requires_grad_() for base in _base_outs(CASES["three_linears_four_paths"], dtype)]
    tensors = [*inputs.leaves().values(), *bases, inputs.scaling, inputs.gate, inputs.active, inputs.rng]
    before = [(t._version, t.detach().clone()) for t in tensors]
    outs = inputs.run() if op == "linear" else inputs.run_delta(bases)
    grads = random_grads(outs)
    kept = [grad.clone() for grad in grads]
    torch.autograd.backward(outs, grads)
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(tensors, before))
    assert_same(grads, kept, rtol=0, atol=0)


def _error(actual, truth):
    return (actual.double() - truth).abs().max().item() if truth.numel() else 0.0


@pytest.mark.parametrize("adapters", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases
def test_error_is_bounded_by_plain_pytorch(case, dtype, adapters):
    inputs = make_inputs(replace(case, m=case.m + 30, k=case.k + 50), dtype,
                         torch.float32 if adapters == "float32" else dtype).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, plain, exact = inputs.run(), dense(inputs), dense(truth)
    grads = random_grads(outs)
    fused = gradients(outs, inputs, grads)
    usual = gradients(plain, inputs, grads)
    wanted = gradients(exact, truth, [grad.double() for grad in grads])
    for i, (out, yardstick, value) in enumerate(zip(outs, plain, exact)):
        assert out.dtype == dtype
        slack = EPSILON[dtype] * value.abs().max().item() / 8
        assert _error(out, value) <= 2 * _error(yardstick, value) + slack, f"outs[{i}]"
    for name, value in wanted.items():
        assert fused[name].dtype == inputs.leaves()[name].dtype
        slack = EPSILON[dtype] * value.abs().max().item() / 8 if value.numel() else 0.0
        assert _error(fused[name], value) <= 3 * _error(usual[name], value) + slack, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_delta_is_bounded_by_plain_pytorch(dtype):
    case = replace(CASES["three_linears_four_paths"], m=40)
    inputs, bases = make_inputs(case, dtype, torch.float32), _base_outs(case, dtype)
    exact = dense(inputs.doubles(), [base.double() for base in bases])
    for out, plain, value in zip(inputs.run_delta(bases), dense(inputs, bases), exact):
        assert _error(out, value) <= 2 * _error(plain, value)


@st.composite
def _cases(draw):
    outs = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 18), max_size=2)))
    path = st.tuples(st.integers(0, 13), st.integers(0, len(outs) - 1), st.integers(-1, len(sizes) - 1))
    paths = draw(st.lists(path, max_size=3))
    paths += [(draw(st.integers(0, 13)), draw(st.integers(0, len(outs) - 1)), j) for j in range(len(sizes))]
    return Case(m=draw(st.integers(0, 6)), k=draw(st.integers(1, 18)), outs=outs, source_sizes=sizes, paths=tuple(paths),
                biases=tuple(draw(st.booleans()) for _ in outs), dropout_p=draw(st.sampled_from([0.2, 0.0, 0.7])),
                gates=draw(st.sampled_from(["ones", "mixed", "closed_first"])), seed=draw(st.integers(0, 99)))


@fuzz(120)
@given(case=_cases(), dtype=st.sampled_from([torch.float64, torch.float32]), strided=st.booleans())
def test_fuzz_equals_dense(case, dtype, strided):
    inputs = make_inputs(case, dtype)
    if strided:
        inputs = inputs.mapped(lambda name, t: _strided(t, "spread") if t.dim() == 2 else t)
    inputs.requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, expected = inputs.run(), dense(truth)
    grads = random_grads(expected)
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (1e-4, 1e-4)
    assert_same([out.double() for out in outs], expected, rtol, atol)
    got = gradients(outs, inputs, [grad.to(dtype) for grad in grads])
    assert_same({name: grad.double() for name, grad in got.items()}, gradients(expected, truth, grads), rtol, atol)


@pytest.mark.parametrize("gate_value", [0.0, 1.0], ids=["closed", "open"])
def test_output_is_the_base_and_the_sum_of_its_paths(gate_value):
    inputs = make_inputs(CASES["two_paths_one_output"])
    inputs.gate.fill_(gate_value)
    base = torch.nn.functional.linear(inputs.x, inputs.weights[0], inputs.biases[0])
    ones = [torch.full((rank,), gate_value) for rank in inputs.ranks]
    torch.testing.assert_close(inputs.run()[0], base + delta(inputs, 0, ones[0]) + delta(inputs, 1, ones[1]))


def test_call_without_paths_takes_empty_vectors():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    empty = torch.zeros(0)
    args = ([], [], [], empty, empty, torch.zeros(0, dtype=torch.int32), None, [], [], 0.0)
    out, = call_lora_linear(REFERENCE, x, [weight], [], [empty], *args)
    assert torch.equal(out, torch.nn.functional.linear(x, weight))
    base = torch.randn(3, 4)
    out, = call_lora_delta(REFERENCE, x, [base], *args)
    assert torch.equal(out, base) and out.data_ptr() != base.data_ptr()
