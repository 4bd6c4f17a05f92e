"""The kernels of the CPU backend, one instruction set after the other: numbers, bits and packed weights."""

import functools
import os
from contextlib import contextmanager
from dataclasses import replace

import helpers_op
import pytest
import torch
from fuzzing import fuzz
from helpers_errors import assert_bounded, error_of
from helpers_op import CASES, Case, dense, gradients, make_inputs, packed_bytes, random_grads
from hypothesis import given
from hypothesis import strategies as st

from heterolora_kernels import _env
from heterolora_kernels.backends import unavailable_backends
from heterolora_kernels.ops.ledger import COLUMNS, NUM_COLUMNS
from heterolora_kernels.ops.schema import Flags

if "cpu" in unavailable_backends():
    pytest.skip(unavailable_backends()["cpu"], allow_module_level=True)

import heterolora_kernels.backends.cpu  # noqa: E402, F401 - registers the ops

OPS = torch.ops.heterolora_kernels
FIRST_ISA = OPS.cpu_isa()
EMULATED = "amx_bf16_emulated"
ISAS = OPS.cpu_isas()
# What the error rule forgives, relative to the largest value, where plain PyTorch happens to be exact: part of the rounding
# of a store, and in float32, where the sums themselves are what is rounded, of two sums.
#: Rounding units of the sums that are allowed in any case: the base is rounded, and the sum with the paths.
UNITS = {torch.float32: 2.0, torch.bfloat16: 0.125, torch.float16: 0.125}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}

# Sizes on both sides of every boundary: few rows (16), strips (4, 6, 12, 32 rows), tiles of 128 rows, blocks of 128 and 256
# rows, panels (16 and 32 columns), lanes (8 and 16) and, in a contraction, pairs, blocks of 32 and chains and chunks of 320-384.
LARGER = {
    "one_row": Case(m=1, k=301, outs=(37, 70), biases=(True, False), paths=((13, 0, -1), (5, 1, -1)), gates="mixed", seed=21),
    "two_rows_dropout": Case(m=2, k=64, outs=(33,), source_sizes=(45,), paths=((5, 0, -1), (1, 0, 0)), dropout_p=0.3, seed=22),
    "two_rows_on_threads": Case(m=2, k=601, outs=(610, 40), biases=(True, False), paths=((9, 0, -1), (17, 1, -1)), seed=31),
    "few_rows": Case(m=16, k=129, outs=(95,), biases=(False,), paths=((24, 0, -1),), seed=23),
    "one_row_more": Case(m=17, k=65, outs=(31,), paths=((40, 0, -1),), dropout_p=0.25, seed=24),
    "strip_and_a_half": Case(m=47, k=97, outs=(100, 63), biases=(True, False), source_sizes=(33,),
                             paths=((64, 0, -1), (13, 0, 0), (0, 1, -1), (5, 1, 0)), dropout_p=0.2, gates="mixed", seed=25),
    "one_block_and_a_row": Case(m=129, k=161, outs=(45, 77, 35), biases=(True, False, True),
                                paths=((24, 0, -1), (1, 1, -1), (13, 2, -1)), seed=26),
    "blocks": Case(m=300, k=90, outs=(131,), source_sizes=(70, 40), paths=((100, 0, -1), (40, 0, 0), (5, 0, 1)), dropout_p=0.1,
                   gates="mixed", seed=27),
    "deep": Case(m=40, k=1100, outs=(70,), paths=((8, 0, -1),), seed=28),
    "deep_dropout": Case(m=70, k=42, outs=(700, 30), biases=(True, True), paths=((8, 0, -1), (3, 1, -1)), dropout_p=0.4, seed=29),
    "base_alone_ends_in_half_a_vector": Case(m=20, k=328, outs=(392,), biases=(False,), paths=((0, 0, -1),), seed=32),
    "tall": Case(m=530, k=350, outs=(330,), paths=((13, 0, -1),), seed=30),
}
ALL_CASES = {**CASES, **LARGER}


# A mask in plain Python integers is slow, and every instruction set has the same.
_keep_matrix = functools.cache(helpers_op.keep_matrix)


@functools.cache
def _packed_mask(*args):
    return packed_bytes(_keep_matrix(*args))


@pytest.fixture(autouse=True)
def cached_masks(monkeypatch):
    monkeypatch.setattr(helpers_op, "keep_matrix", _keep_matrix)


@contextmanager
def using(name):
    """Run with an instruction set, and with the one before afterwards."""
    reason = OPS.cpu_isa_missing(name)
    if reason:
        pytest.skip(f"{name}: {reason}")
    before = OPS.cpu_isa()
    OPS.set_cpu_isa(name)
    try:
        yield name
    finally:
        OPS.set_cpu_isa(before)


@pytest.fixture(params=ISAS)
def isa(request):
    with using(request.param) as name:
        yield name


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _low_rank_leaves(inputs):
    """What the kernels give gradients for."""
    return [name for name in inputs.leaves() if not name.startswith(("weights", "biases"))]


def _bases(case, dtype):
    generator = torch.Generator().manual_seed(41)
    return [torch.randn(case.m, n, dtype=torch.float64, generator=generator).to(dtype) for n in case.outs]


def _check_error(inputs, dtype, bases=None, more_slack=1.0):
    """Outputs and gradients by the error rule: at most 2 and 3 times the error of plain PyTorch in the dtype."""
    asked = _low_rank_leaves(inputs)
    inputs.requires_grad_(asked)
    truth = inputs.doubles().requires_grad_(asked)
    # Some of torch's own products read what lies between the rows of a strided tensor, nan here.
    usual = inputs.mapped(lambda name, t: t.detach().contiguous().clone()).requires_grad_(asked)
    # What is added up, without a sign: where terms cancel, their rounding is still theirs.
    sizes = inputs.doubles().mapped(lambda name, t: t.abs()).requires_grad_(asked)
    outs = inputs.run(backend="cpu") if bases is None else inputs.run_delta(bases, backend="cpu")
    plain = dense(usual, bases)
    exact, summed = (dense(each, bases and [base.double() for base in bases]) for each in (truth, sizes))
    grads = random_grads(outs)
    values = {f"outs[{i}]": (2, *entry) for i, entry in enumerate(zip(outs, plain, exact, summed))}
    # Without paths nothing that is asked for may be in the graph.
    if any(out.requires_grad for out in outs):
        found = [gradients(outs, inputs, grads), gradients(plain, usual, grads),
                 gradients(exact, truth, [grad.double() for grad in grads]),
                 gradients(summed, sizes, [grad.double().abs() for grad in grads])]
        values |= {name: (3, *(each[name] for each in found)) for name in found[0]}
    for name, (factor, value, yardstick, true, size) in values.items():
        assert value.dtype == (inputs.leaves()[name].dtype if name in inputs.leaves() else dtype), name
        assert_bounded(value, yardstick, true, factor, size, more_slack * UNITS[dtype], name)


@pytest.mark.parametrize("dtype,adapters", [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
                                            (torch.bfloat16, torch.float32)], ids=["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_error_is_bounded_by_plain_pytorch(isa, case, dtype, adapters):
    _check_error(make_inputs(case, dtype, adapters), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["three_linears_four_paths", "few_rows", "strip_and_a_half", "blocks"])
def test_error_of_delta_is_bounded_by_plain_pytorch(isa, name, dtype):
    _check_error(make_inputs(ALL_CASES[name], dtype), dtype, _bases(ALL_CASES[name], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one_row", "strip_and_a_half", "one_block_and_a_row"])
def test_strides_and_transposed_weights(isa, name, dtype):
    def strided(name, t):
        if t.dim() != 2:
            return t
        if name.startswith("weights[0]") or name.startswith("lora_B"):
            return t.t().contiguous().t()
        if name.startswith("weights"):
            return t.repeat_interleave(2, dim=1)[:, ::2]
        return torch.cat([t, t.new_full((t.shape[0], 3), torch.nan)], dim=1)[:, :t.shape[1]]

    _check_error(make_inputs(ALL_CASES[name], dtype).mapped(strided), dtype)


def test_grad_outs_of_any_stride(isa):
    inputs = make_inputs(LARGER["strip_and_a_half"], torch.bfloat16)
    inputs.requires_grad_(_low_rank_leaves(inputs))
    outs = inputs.run(backend="cpu")
    grads = random_grads(outs)
    dense_grads = gradients(outs, inputs, grads, retain_graph=True)
    turned = gradients(outs, inputs, [grad.t().contiguous().t() for grad in grads], retain_graph=True)
    row = [grad[:1].expand_as(grad) for grad in grads]
    expanded = gradients(outs, inputs, row, retain_graph=True)
    helpers_op.assert_same(turned, dense_grads, rtol=0, atol=0)
    helpers_op.assert_same(expanded, gradients(outs, inputs, [grad.contiguous() for grad in row]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype,adapters", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
                         ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_statistics(isa, case, dtype, adapters):
    """Every column against the reference backend in float64, relative to the largest of the column in its path."""
    inputs = make_inputs(case, dtype, adapters)
    rows = []
    for variant, backend in ((inputs, "cpu"), (inputs.doubles(), "reference")):
        probe = torch.zeros(inputs.gate.numel(), NUM_COLUMNS, requires_grad=True)
        outs = variant.run(probe, backend=backend)
        torch.autograd.backward(outs, [grad.to(outs[0].dtype) for grad in random_grads([out.to(dtype) for out in outs])])
        rows.append(probe.grad.double())
    for place in helpers_op.path_slices(inputs.ranks):
        got, want = rows[0][place], rows[1][place]
        for column, name in enumerate(COLUMNS):
            # gate_grad is a sum of terms of both signs: what it is made of is the product of two norms.
            size = want[:, column].abs().max().item() if len(want) else 0.0
            if name == "gate_grad" and len(want):
                norms = want[:, COLUMNS.index("hidden_sq")].max() * want[:, COLUMNS.index("grad_B_sq")].max()
                size = max(size, norms.sqrt().item())
            assert error_of(got[:, column], want[:, column]) <= TOLERANCE[dtype] * size, name


@pytest.mark.parametrize("name", ["one_row", "one_row_more", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_rows_may_hold_nan(isa, name, dtype):
    inputs = make_inputs(replace(LARGER[name], gates="ones"), dtype)
    inputs.active[:] = torch.tensor(inputs.ranks, dtype=torch.int32)
    closed = [place.start + j for place in helpers_op.path_slices(inputs.ranks) for j in range(0, place.stop - place.start, 3)]
    inputs.gate[closed] = 0.0
    results = []
    for poison in (False, True):
        for p, place in enumerate(helpers_op.path_slices(inputs.ranks)):
            rows = [j - place.start for j in closed if place.start <= j < place.stop]
            if poison:
                inputs.lora_A[p].data[rows] = torch.nan
                inputs.lora_B[p].data[:, rows] = torch.nan
        inputs.requires_grad_(_low_rank_leaves(inputs))
        outs = inputs.run(backend="cpu")
        results.append([*outs, *gradients(outs, inputs, random_grads(outs)).values()])
    helpers_op.assert_same(results[1], results[0], rtol=0, atol=0)


def _all_bits(case, dtype):
    """Outputs, gradients and statistics of a case, the backward run twice."""
    inputs = make_inputs(case, dtype)
    inputs.requires_grad_(_low_rank_leaves(inputs))
    probe = torch.zeros(inputs.gate.numel(), NUM_COLUMNS, requires_grad=True)
    outs = inputs.run(probe, backend="cpu")
    grads = random_grads(outs)
    first = gradients(outs, inputs, grads, retain_graph=True)
    helpers_op.assert_same(gradients(outs, inputs, grads, retain_graph=True), first, rtol=0, atol=0)
    torch.autograd.backward(outs, grads)
    return [*outs, *first.values(), probe.grad]


@pytest.mark.parametrize("name", ["two_rows_on_threads", "few_rows", "strip_and_a_half", "blocks", "tall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_again_and_with_any_number_of_threads(isa, name, dtype):
    first = _all_bits(LARGER[name], dtype)
    for count in (1, 2, 5):
        with threads(count):
            helpers_op.assert_same(_all_bits(LARGER[name], dtype), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, case in ALL_CASES.items() if case.dropout_p])
def test_masks_bit_for_bit(isa, name):
    case = ALL_CASES[name]
    inputs = make_inputs(case, torch.bfloat16)
    mask = OPS.lora_linear_cpu(*inputs.args(int(Flags.SAVE)))[2]
    read = ([(inputs.x, 0)] if -1 in inputs.path_source else []) + [(u, j + 1) for j, u in enumerate(inputs.sources)]
    expected = [_packed_mask(int(inputs.rng), *u.shape, key, case.dropout_p) for u, key in read]
    assert torch.equal(mask, torch.cat(expected, dim=1))


def _layout(isa, dtype):
    """What a pack depends on: units of float32 or pairs of bf16, the width of a panel, and the padding of AMX."""
    pairs = dtype == torch.bfloat16 and isa in ("avx512_bf16", "amx_bf16", EMULATED)
    return pairs, isa in ("portable", "avx2"), pairs and isa != "avx512_bf16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_give_the_same_bits_and_are_the_engines_own(isa, dtype):
    """Packs are used (spoilt ones spoil the result), and those of another layout or another weight are not."""
    if not OPS.cpu_packed_bytes(torch.ones(64, 96, dtype=dtype), True):
        pytest.skip(f"{isa} does not pack {dtype}")
    inputs = make_inputs(Case(m=40, k=96, outs=(64,), paths=((5, 0, -1),)), dtype)
    plain = inputs.run(backend="cpu")[0]
    pack = OPS.cpu_pack_weight(inputs.weights[0], True)
    helpers_op.assert_same(replace(inputs, packs=pack).run(backend="cpu"), [plain], rtol=0, atol=0)

    def spoilt(packs):
        header = 64
        return [torch.cat([pack[:header], torch.zeros_like(pack[header:])]) for pack in packs]

    assert not torch.equal(replace(inputs, packs=spoilt(pack)).run(backend="cpu")[0], plain)
    other_weight = spoilt(OPS.cpu_pack_weight(inputs.weights[0] + 1, True))
    helpers_op.assert_same(replace(inputs, packs=other_weight).run(backend="cpu"), [plain], rtol=0, atol=0)
    for other in ISAS:
        if OPS.cpu_isa_missing(other):
            continue
        with using(other):
            wants = OPS.cpu_packed_bytes(inputs.weights[0], True) > 0
            foreign = spoilt(OPS.cpu_pack_weight(inputs.weights[0], True)) if wants else []
        if foreign and _layout(other, dtype) != _layout(isa, dtype):
            helpers_op.assert_same(replace(inputs, packs=foreign).run(backend="cpu"), [plain], rtol=0, atol=0)


def test_few_rows_of_amx_are_those_of_avx512_bf16():
    results = []
    for name in ("avx512_bf16", EMULATED):
        with using(name):
            results.append(_all_bits(LARGER["few_rows"], torch.bfloat16))
    helpers_op.assert_same(*results, rtol=0, atol=0)


def test_tiles_of_the_processor_give_the_bits_of_those_in_memory():
    for case in ALL_CASES.values():
        results = []
        for name in ("amx_bf16", EMULATED):
            with using(name):
                results.append(_all_bits(case, torch.bfloat16))
        helpers_op.assert_same(*results, rtol=0, atol=0)


def test_emulation_is_never_chosen_by_itself():
    assert FIRST_ISA == (_env.cpu_isa() or FIRST_ISA)
    if not os.environ.get("HETEROLORA_CPU_ISA"):
        assert FIRST_ISA != EMULATED


def test_unknown_and_missing_instruction_sets_are_named():
    with pytest.raises(ValueError, match="instruction set abacus cannot be used: no such instruction set"):
        OPS.set_cpu_isa("abacus")
    for name in ISAS:
        if OPS.cpu_isa_missing(name):
            with pytest.raises(ValueError, match=f"instruction set {name} cannot be used: .*"):
                OPS.set_cpu_isa(name)


@st.composite
def _cases(draw):
    outs = tuple(draw(st.lists(st.integers(1, 80), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 50), max_size=2)))
    path = st.tuples(st.integers(0, 40), st.integers(0, len(outs) - 1), st.integers(-1, len(sizes) - 1))
    paths = draw(st.lists(path, max_size=3))
    paths += [(draw(st.integers(0, 20)), draw(st.integers(0, len(outs) - 1)), j) for j in range(len(sizes))]
    return Case(m=draw(st.integers(0, 50)), k=draw(st.integers(1, 80)), outs=outs, source_sizes=sizes, paths=tuple(paths),
                biases=tuple(draw(st.booleans()) for _ in outs), dropout_p=draw(st.sampled_from([0.0, 0.3])),
                gates=draw(st.sampled_from(["ones", "mixed", "closed_first"])), seed=draw(st.integers(0, 99)))


@fuzz(100)
@given(case=_cases(), name=st.sampled_from([name for name in ISAS if not OPS.cpu_isa_missing(name)]),
       dtypes=st.sampled_from([(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32),
                               (torch.float16, None)]))
def test_fuzz_error_is_bounded_by_plain_pytorch(case, name, dtypes):
    # In tensors of few numbers plain PyTorch is exact by chance more often.
    with using(name):
        _check_error(make_inputs(case, *dtypes), dtypes[0], more_slack=4.0)
