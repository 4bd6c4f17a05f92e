"""The op contract: opcheck, fakes against real results, and an error that names every bad argument, once per entry."""

from dataclasses import replace

import pytest
import torch
from helpers_op import CASES, RNG, Case, make_inputs, random_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from heterolora_kernels.ops import schema
from heterolora_kernels.ops.schema import Flags, Needs

OPS = torch.ops.heterolora_kernels
FULL = int(Flags.SAVE | Flags.STATISTICS)
PICKED = ("one_path", "one_path_dropout", "sources_only", "three_linears_four_paths")
OP_NAMES = ("lora_linear", "lora_linear_backward", "lora_delta", "lora_delta_backward")


def _op(name):
    return getattr(OPS, f"{name}_reference").default


def _arguments(name, case, dtype=torch.float32, adapter_dtype=None, flags=FULL, needs=31):
    """Positional arguments of one of the four ops."""
    inputs = make_inputs(case, dtype, adapter_dtype)
    if name.startswith("lora_delta"):
        generator = torch.Generator().manual_seed(3)
        forward = (inputs.x, [torch.randn(case.m, n, generator=generator).to(dtype) for n in case.outs],
                   *inputs.path_args(flags))
    else:
        forward = inputs.args(flags)
    if not name.endswith("backward"):
        return forward
    outs, hidden, mask = _op(name.removesuffix("_backward"))(*forward)
    return (random_grads(outs), *forward, hidden, mask, needs)


@pytest.mark.parametrize("name", OP_NAMES)
def test_schema_is_registered_as_written(name):
    written = schema.SCHEMAS[name]
    text = str(_op(name)._schema).split("heterolora_kernels::", 1)[1]
    tidy = lambda s: s.replace(" ", "").replace("->(Tensor[]outs,Tensorhidden,Tensormask)", "->")  # noqa: E731
    assert tidy(text).startswith(f"{name}_reference(" + tidy(written).split("->")[0][1:])
    assert [r.name for r in _op(name)._schema.returns] == (
        ["grad_x", "grad_sources", "grad_A", "grad_B", "stats"] if name.endswith("backward") else ["outs", "hidden", "mask"])
    assert not _op(name)._schema.is_mutable and torch.Tag.pt2_compliant_tag in _op(name).tags


@pytest.mark.parametrize("dtype, adapters", [(torch.float32, None), (torch.bfloat16, torch.float32)],
                         ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [CASES[c] for c in PICKED], ids=PICKED)
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name, case, dtype, adapters):
    torch.library.opcheck(_op(name), _arguments(name, case, dtype, adapters))


@pytest.mark.parametrize("case", [Case(m=0), Case(paths=()), Case(paths=((0, 0, -1),))], ids=["no_rows", "no_paths", "rank_0"])
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck_of_edge_sizes(name, case):
    torch.library.opcheck(_op(name), _arguments(name, case), test_utils=("test_schema", "test_faketensor"))


def _flat(result):
    return [t for part in result for t in (part if isinstance(part, (list, tuple)) else [part])]


def _strided(tensor):
    """The same values in column order, where there are two dimensions."""
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("flags, needs", [(0, 0), (int(Flags.SAVE), int(Needs.X)), (int(Flags.SAVE), int(Needs.SOURCES)),
                                          (FULL, int(Needs.STATISTICS)), (FULL, int(Needs.LORA_A | Needs.LORA_B)), (FULL, 31)],
                         ids=["none", "x", "sources", "statistics", "adapters", "all"])
@pytest.mark.parametrize("name", OP_NAMES)
def test_fake_results_are_like_the_real_ones(name, flags, needs, strided):
    if name.endswith("backward"):
        flags |= Flags.SAVE
    args = [a for case in ("three_linears_four_paths", "sources_only", "two_linears")
            for a in [_arguments(name, CASES[case], torch.bfloat16, torch.float32, int(flags), needs)]]
    for arguments in args:
        if strided:
            arguments = tree_map_only(torch.Tensor, _strided, arguments)
        real = _op(name)(*arguments)
        with FakeTensorMode() as mode:
            fake = _op(name)(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        meta = _op(name)(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))
        assert len(_flat(real)) == len(_flat(fake)) == len(_flat(meta))
        for r, f, m in zip(_flat(real), _flat(fake), _flat(meta)):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()) == (m.shape, m.dtype, m.stride())
            assert r.device == f.device and m.device.type == "meta"


def test_results_do_not_alias_the_inputs():
    for name in OP_NAMES:
        arguments = _arguments(name, CASES["all_closed"])
        given = set()
        tree_map_only(torch.Tensor, lambda t: given.add(t.untyped_storage().data_ptr()), arguments)
        results = [t for t in _flat(_op(name)(*arguments)) if t.numel()]
        stored = [t.untyped_storage().data_ptr() for t in results]
        assert not given & set(stored) and len(set(stored)) == len(stored)


@pytest.mark.parametrize("rank, padded", [(0, 0), (1, 8), (8, 8), (9, 16)], ids=str)
def test_padded_rank(rank, padded):
    assert schema.padded_rank(rank) == padded


def test_offsets():
    assert schema.hidden_offsets([3, 0, 9, 8]) == [0, 8, 8, 24, 32]
    assert schema.rank_offsets([3, 0, 9, 8]) == [0, 3, 3, 12, 20]
    x, sources = torch.zeros(2, 9), [torch.zeros(2, 8), torch.zeros(2, 17)]
    assert schema.mask_offsets(x, sources, [0, -1, 1]) == {-1: (0, 2), 0: (2, 3), 1: (3, 6)}
    assert schema.mask_offsets(x, sources, [1, 0]) == {0: (0, 1), 1: (1, 4)}


# Errors: the arguments of a good call as a dictionary, one of them spoilt.

GOOD = Case(m=4, k=9, outs=(7, 5), biases=(True, False), source_sizes=(6, 3),
            paths=((3, 0, -1), (2, 1, 0), (4, 0, 1)), dropout_p=0.25)


def _named(name, arguments):
    names = [argument.name for argument in _op(name)._schema.arguments]
    return dict(zip(names, arguments))


def _put(argument, index, value):
    """Spoil one entry of a list; value may be a function of the good entry."""
    def change(named):
        entries = list(named[argument])
        entries[index] = value(entries[index]) if callable(value) else value
        named[argument] = entries
    return change


def _set(argument, value):
    def change(named):
        named[argument] = value(named[argument]) if callable(value) else value
    return change


def _meta(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _wide(tensor):
    return torch.cat([tensor, tensor[..., :1]], dim=-1)


def _tall(tensor):
    return torch.cat([tensor, tensor[:1]])


# id: (change, error, what the message names)
PATH_ERRORS = {
    "x_one_dimension": (_set("x", lambda t: t[0]), ValueError, r"x must be \[M, K\]"),
    "x_three_dimensions": (_set("x", lambda t: t[None]), ValueError, r"x must be \[M, K\]"),
    "x_integer": (_set("x", lambda t: t.long()), TypeError, r"x must be float16"),
    "source_dimensions": (_put("sources", 1, lambda t: t[0]), ValueError, r"sources\[1\] must be \[M, K_1\]"),
    "source_rows": (_put("sources", 0, _tall), ValueError, r"sources\[0\] must have M = 4 rows .* got 5"),
    "source_dtype": (_put("sources", 0, lambda t: t.half()), TypeError, r"sources\[0\] must have the dtype of x"),
    "source_device": (_put("sources", 1, _meta), ValueError, r"sources\[1\] must be on the device of x \(cpu\), got meta"),
    "source_unread": (_set("path_source", [-1, 0, 0]), ValueError, r"sources\[1\] is read by no path"),
    "a_missing": (_set("lora_A", lambda a: a[:2]), ValueError, r"lora_B must have one entry per path \(2\), got 3"),
    "b_missing": (_set("lora_B", lambda b: b[:2]), ValueError, r"lora_B must have one entry per path \(3\), got 2"),
    "a_width": (_put("lora_A", 2, _wide), ValueError, r"lora_A\[2\] must be \[r, 3\]"),
    "a_dimensions": (_put("lora_A", 0, lambda t: t[0]), ValueError, r"lora_A\[0\] must be \[r, 9\]"),
    "a_integer": (_put("lora_A", 0, lambda t: t.int()), TypeError, r"lora_A\[0\] must be a floating type"),
    "a_float64": (_put("lora_A", 1, lambda t: t.double()), TypeError, r"lora_A\[1\] may be float64 only where x is"),
    "a_device": (_put("lora_A", 1, _meta), ValueError, r"lora_A\[1\] must be on the device of x"),
    "b_rows": (_put("lora_B", 1, _tall), ValueError, r"lora_B\[1\] must be \[5, 2\], got shape \[6, 2\]"),
    "b_rank": (_put("lora_B", 0, _wide), ValueError, r"lora_B\[0\] must be \[7, 3\], got shape \[7, 4\]"),
    "b_dtype": (_put("lora_B", 0, lambda t: t.half()), TypeError, r"lora_B\[0\] must have the dtype of lora_A\[0\]"),
    "b_device": (_put("lora_B", 2, _meta), ValueError, r"lora_B\[2\] must be on the device of x"),
    "scaling_size": (_set("scaling", torch.ones(2)), ValueError, r"scaling must have shape \[3\], got \[2\]"),
    "scaling_dtype": (_set("scaling", lambda t: t.double()), TypeError, r"scaling must be torch.float32"),
    "scaling_device": (_set("scaling", _meta), ValueError, r"scaling must be on the device of x"),
    "gate_size": (_set("gate", torch.ones(8)), ValueError, r"gate must have shape \[9\], got \[8\]"),
    "gate_dimensions": (_set("gate", torch.ones(9, 1)), ValueError, r"gate must have shape \[9\], got \[9, 1\]"),
    "gate_dtype": (_set("gate", lambda t: t.bool()), TypeError, r"gate must be torch.float32"),
    "gate_device": (_set("gate", _meta), ValueError, r"gate must be on the device of x"),
    "active_size": (_set("active", torch.ones(4, dtype=torch.int32)), ValueError, r"active must have shape \[3\], got \[4\]"),
    "active_dtype": (_set("active", lambda t: t.long()), TypeError, r"active must be torch.int32"),
    "active_device": (_set("active", _meta), ValueError, r"active must be on the device of x"),
    "rng_missing": (_set("rng", None), ValueError, r"rng must be given exactly where dropout_p > 0"),
    "rng_without_dropout": (_set("dropout_p", 0.0), ValueError, r"rng must be given exactly where dropout_p > 0"),
    "rng_size": (_set("rng", torch.tensor([1, 2])), ValueError, r"rng must have shape \[1\], got \[2\]"),
    "rng_dtype": (_set("rng", torch.tensor([1], dtype=torch.int32)), TypeError, r"rng must be torch.int64"),
    "rng_device": (_set("rng", _meta), ValueError, r"rng must be on the device of x"),
    "output_large": (_set("path_output", [0, 2, 0]), ValueError, r"path_output\[1\] must be in \[0, 2\), got 2"),
    "output_negative": (_set("path_output", [0, 1, -1]), ValueError, r"path_output\[2\] must be in \[0, 2\), got -1"),
    "output_count": (_set("path_output", [0, 1]), ValueError, r"path_output must have one entry per path \(3\), got 2"),
    "source_id_large": (_set("path_source", [2, 0, 1]), ValueError, r"path_source\[0\] must be in \[-1, 2\), got 2"),
    "source_id_negative": (_set("path_source", [-2, 0, 1]), ValueError, r"path_source\[0\] must be in \[-1, 2\), got -2"),
    "source_id_count": (_set("path_source", [-1, 0, 1, 1]), ValueError, r"path_source must have one entry per path"),
    "dropout_negative": (_set("dropout_p", -0.1), ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
    "dropout_large": (_set("dropout_p", 1.1), ValueError, r"dropout_p must be in \[0, 1\], got 1.1"),
    "dropout_nan": (_set("dropout_p", float("nan")), ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    "flags_unknown": (_set("flags", 4), ValueError, r"flags must be a union of Flags, got 4"),
    "flags_negative": (_set("flags", -1), ValueError, r"flags must be a union of Flags, got -1"),
}
LINEAR_ERRORS = {
    "weights_none": (_set("weights", []), ValueError, r"weights must hold at least one weight"),
    "weight_width": (_put("weights", 1, _wide), ValueError, r"weights\[1\] must be \[N_1, 9\], got shape \[5, 10\]"),
    "weight_dimensions": (_put("weights", 0, lambda t: t[0]), ValueError, r"weights\[0\] must be \[N_0, 9\]"),
    "weight_dtype": (_put("weights", 0, lambda t: t.half()), TypeError, r"weights\[0\] must have the dtype of x"),
    "weight_device": (_put("weights", 1, _meta), ValueError, r"weights\[1\] must be on the device of x"),
    "packs_count": (_set("packs", [torch.zeros(1)] * 2), ValueError, r"packs must be empty or hold two .* \(4\), got 2"),
    "biases_count": (_set("biases", lambda b: b[:1]), ValueError, r"biases must have one entry per weight \(2\)"),
    "bias_size": (_put("biases", 0, torch.zeros(6)), ValueError, r"biases\[0\] must be \[7\] or empty, got shape \[6\]"),
    "bias_dimensions": (_put("biases", 0, torch.zeros(1, 7)), ValueError, r"biases\[0\] must be \[7\] or empty"),
    "bias_dtype": (_put("biases", 0, lambda t: t.double()), TypeError, r"biases\[0\] must have the dtype of x"),
    "bias_device": (_put("biases", 0, _meta), ValueError, r"biases\[0\] must be on the device of x"),
}
DELTA_ERRORS = {
    "bases_none": (_set("base_outs", []), ValueError, r"base_outs must hold at least one output"),
    "base_rows": (_put("base_outs", 1, _tall), ValueError, r"base_outs\[1\] must be \[4, N_1\], got shape \[5, 5\]"),
    "base_dimensions": (_put("base_outs", 0, lambda t: t[0]), ValueError, r"base_outs\[0\] must be \[4, N_0\]"),
    "base_dtype": (_put("base_outs", 0, lambda t: t.double()), TypeError, r"base_outs\[0\] must have the dtype of x"),
    "base_device": (_put("base_outs", 0, _meta), ValueError, r"base_outs\[0\] must be on the device of x"),
}
BACKWARD_ERRORS = {
    "grads_count": (_set("grad_outs", lambda g: g[:1]), ValueError, r"grad_outs must have one entry per output \(2\), got 1"),
    "grad_shape": (_put("grad_outs", 1, _wide), ValueError, r"grad_outs\[1\] must be \[4, 5\], got shape \[4, 6\]"),
    "grad_dtype": (_put("grad_outs", 0, lambda t: t.double()), TypeError, r"grad_outs\[0\] must have the dtype of x"),
    "grad_device": (_put("grad_outs", 0, _meta), ValueError, r"grad_outs\[0\] must be on the device of x"),
    "hidden_not_saved": (_set("hidden", torch.zeros(0)), ValueError, r"hidden must be \[4, 24\], got \[0\].*Flags.SAVE"),
    "hidden_width": (_set("hidden", _wide), ValueError, r"hidden must be \[4, 24\], got \[4, 25\]"),
    "hidden_dtype": (_set("hidden", lambda t: t.double()), TypeError, r"hidden must have the dtype of x"),
    "hidden_device": (_set("hidden", _meta), ValueError, r"hidden must be on the device of x"),
    "mask_device": (_set("mask", _meta), ValueError, r"mask must be on the device of x"),
    "mask_not_saved": (_set("mask", torch.zeros(0, dtype=torch.uint8)), ValueError, r"mask must be \[4, 4\], got \[0\]"),
    "mask_width": (_set("mask", _wide), ValueError, r"mask must be \[4, 4\], got \[4, 5\]"),
    "mask_dtype": (_set("mask", lambda t: t.int()), TypeError, r"mask must be torch.uint8"),
    "needs_unknown": (_set("needs", 32), ValueError, r"needs must be a union of Needs, got 32"),
    "needs_negative": (_set("needs", -1), ValueError, r"needs must be a union of Needs, got -1"),
}
PER_OP = {"lora_linear": LINEAR_ERRORS, "lora_linear_backward": LINEAR_ERRORS | BACKWARD_ERRORS, "lora_delta": DELTA_ERRORS,
          "lora_delta_backward": DELTA_ERRORS | BACKWARD_ERRORS}
ERRORS = {f"{op}-{what}": (op, *row) for op, errors in PER_OP.items() for what, row in (errors | PATH_ERRORS).items()}


def _faked(mode, tensor):
    """A fake of the tensor; the mode does not convert meta tensors, but makes them."""
    return mode.from_tensor(tensor) if tensor.device.type != "meta" else _meta(tensor)


def _spoilt(op, change):
    named = _named(op, _arguments(op, GOOD))
    change(named)
    return named


@pytest.mark.parametrize("op, change, error, match", ERRORS.values(), ids=ERRORS)
def test_bad_argument_is_named_eagerly(op, change, error, match):
    with pytest.raises(error, match=match):
        _op(op)(**_spoilt(op, change))


@pytest.mark.parametrize("op, change, error, match", ERRORS.values(), ids=ERRORS)
def test_bad_argument_is_named_by_the_fake(op, change, error, match):
    named = _spoilt(op, change)
    with FakeTensorMode() as mode:
        named = tree_map_only(torch.Tensor, lambda t: _faked(mode, t), named)
        with pytest.raises(error, match=match):
            _op(op)(**named)


@pytest.mark.parametrize("op", OP_NAMES)
def test_good_arguments_pass(op):
    named = _named(op, _arguments(op, GOOD))
    _op(op)(**named)
    with FakeTensorMode() as mode:
        _op(op)(**tree_map_only(torch.Tensor, mode.from_tensor, named))


def test_packs_are_ignored_by_the_reference():
    inputs = make_inputs(GOOD, torch.float32)
    plain = _op("lora_linear")(*inputs.args(FULL))
    packed = _op("lora_linear")(*replace(inputs, packs=[torch.full((3,), torch.nan)] * 4).args(FULL))
    assert all(torch.equal(p, q) for p, q in zip(_flat(plain), _flat(packed)))


def test_error_tells_whether_an_rng_came():
    inputs = replace(make_inputs(Case()), rng=torch.tensor([RNG]))
    with pytest.raises(ValueError, match=r"got dropout_p=0.0 and rng=a tensor"):
        inputs.run()
