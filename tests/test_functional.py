"""The functional entries: leading shapes, the bits of F.linear, dropout's key, errors, and torch.compile."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers_op import CASES, RNG, Case, assert_same, delta, dense, gradients, keep_matrix, keep_scale, make_inputs, random_grads

import heterolora_kernels as hlk
from heterolora_kernels.backends import resolve
from heterolora_kernels.functional import lora_delta, lora_linear_group
from heterolora_kernels.ops.ledger import NUM_COLUMNS

ONE = replace(CASES["one_path_dropout"], gates="ones", biases=(True,), dropout_p=0.0)
SHORTCUTS = Case(m=6, k=9, outs=(7,), source_sizes=(5, 13), paths=((3, 0, -1), (9, 0, 0), (2, 0, 1)), seed=11)


SCALING = [float(s) for s in make_inputs(SHORTCUTS).scaling]


def _group(inputs, **options):
    return lora_linear_group(inputs.x, inputs.weights, [b if b.numel() else None for b in inputs.biases], inputs.sources,
                             inputs.lora_A, inputs.lora_B, inputs.scaling, inputs.gate, inputs.active, inputs.path_output,
                             inputs.path_source, rng=inputs.rng, dropout_p=inputs.dropout_p, **options)


def _linear(inputs, **options):
    """``hlk.lora_linear`` on the inputs of a case with one linear, a path of x first and then shortcuts."""
    scaling = SCALING
    shortcuts = [(u, a, b, s) for u, a, b, s in zip(inputs.sources, inputs.lora_A[1:], inputs.lora_B[1:], scaling[1:])]
    return hlk.lora_linear(inputs.x, inputs.weights[0], inputs.lora_A[0], inputs.lora_B[0],
                           bias=inputs.biases[0] if inputs.biases[0].numel() else None, scaling=scaling[0],
                           shortcuts=shortcuts, dropout_p=inputs.dropout_p, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("case", [ONE, SHORTCUTS], ids=["one_path", "shortcuts"])
def test_linear_equals_dense(case, dropout_p):
    inputs = make_inputs(replace(case, dropout_p=dropout_p)).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    out, expected = _linear(inputs, rng=inputs.rng), dense(truth)
    assert_same([out], expected)
    grads = random_grads(expected)
    assert_same(gradients([out], inputs, grads), gradients(expected, truth, grads))


def test_linear_gradcheck():
    inputs = make_inputs(replace(SHORTCUTS, m=3, dropout_p=0.4)).requires_grad_()

    def function(*leaves):
        by_name = dict(zip(inputs.leaves(), leaves))
        return _linear(inputs.mapped(lambda name, t: by_name.get(name, t)), rng=inputs.rng)

    assert torch.autograd.gradcheck(function, list(inputs.leaves().values()))


def test_linear_gate():
    inputs = make_inputs(SHORTCUTS)
    inputs.gate[::2] = 0
    assert_same([_linear(inputs, gate=inputs.gate)], dense(inputs))


def test_linear_without_adapter_is_the_base_and_its_shortcuts():
    inputs = make_inputs(SHORTCUTS)
    base = F.linear(inputs.x, inputs.weights[0], inputs.biases[0])
    out = hlk.lora_linear(inputs.x, inputs.weights[0], None, None, bias=inputs.biases[0])
    assert torch.equal(out, base)
    shortcut = (inputs.sources[0], inputs.lora_A[1], inputs.lora_B[1], SCALING[1])
    out = hlk.lora_linear(inputs.x, inputs.weights[0], None, None, bias=inputs.biases[0], shortcuts=[shortcut])
    torch.testing.assert_close(out, base + delta(inputs, 1))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_shapes(shape):
    rows = torch.Size(shape).numel()
    inputs = make_inputs(replace(SHORTCUTS, m=rows)).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    shaped = replace(inputs, x=inputs.x.reshape(*shape, 9), sources=[u.reshape(*shape, u.shape[1]) for u in inputs.sources])
    expected = dense(truth)
    for out in (_linear(shaped), _group(shaped)[0]):
        assert out.shape == (*shape, 7)
        assert_same([out.reshape(rows, 7)], expected)
        grads = random_grads(expected)
        assert_same(gradients([out.reshape(rows, 7)], inputs, grads), gradients(expected, truth, grads, retain_graph=True))


def test_no_features_give_the_bias():
    out = hlk.lora_linear(torch.zeros(2, 3, 0), torch.zeros(7, 0), torch.zeros(4, 0), torch.ones(7, 4), bias=torch.arange(7.0),
                          backend="reference")
    assert torch.equal(out, torch.arange(7.0).expand(2, 3, 7))


def test_source_may_be_flat_where_x_is_not():
    inputs = make_inputs(SHORTCUTS)
    shaped = replace(inputs, x=inputs.x.reshape(2, 3, 9), sources=[inputs.sources[0], inputs.sources[1].reshape(3, 2, 13)])
    assert_same([_linear(shaped).reshape(6, 7)], dense(inputs))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda x: x[0, 0], lambda x: x[0, :1], lambda x: x[0], lambda x: x, lambda x: x[:1, :1],
                                  lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., ::2], lambda x: x[:0],
                                  lambda x: x[0, :, ::2]],
                         ids=["one_dim", "one_row", "two_dims", "three_dims", "one_token", "transposed", "sliced", "strided",
                              "empty", "strided_two_dims"])
def test_closed_paths_give_the_bits_of_linear_on_the_reference(make, dtype, biased):
    generator = torch.Generator().manual_seed(21)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    x = make(draw(5, 6, 34))
    weight, bias, a, b = draw(19, x.shape[-1]), draw(19) if biased else None, draw(3, x.shape[-1]), draw(19, 3)
    expected = F.linear(x, weight, bias)
    args = (x, [weight], [bias], [], [a], [b], torch.ones(1))
    closed, = lora_linear_group(*args, torch.zeros(3), torch.zeros(1, dtype=torch.int32), [0], [-1], backend="reference")
    assert torch.equal(closed, expected) and closed.shape == expected.shape
    fresh, = lora_linear_group(*args[:5], [torch.zeros_like(b)], torch.ones(1), torch.ones(3),
                               torch.tensor([3], dtype=torch.int32), [0], [-1], backend="reference")
    assert torch.equal(fresh, expected)
    assert torch.equal(hlk.lora_linear(x, weight, a, torch.zeros_like(b), bias=bias, backend="reference"), expected)


def test_dropout_draws_its_key_from_the_global_generator():
    inputs = make_inputs(replace(ONE, dropout_p=0.4))
    torch.manual_seed(3)
    first, second = _linear(inputs), _linear(inputs)
    torch.manual_seed(3)
    assert torch.equal(_linear(inputs), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    key = torch.randint(0, 2**63 - 1, (1,))
    assert_same([first], dense(replace(inputs, rng=key)))


@pytest.mark.parametrize("given", [True, False], ids=["key_given", "no_dropout"])
def test_global_generator_is_left_alone_where_no_key_is_drawn(given):
    inputs = make_inputs(replace(ONE, dropout_p=0.4 if given else 0.0))
    before = torch.get_rng_state()
    _linear(inputs, rng=torch.tensor([RNG]) if given else None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("base_grad", [True, False], ids=["base_grad", "base_frozen"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.35], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["flat", "three_dims"])
def test_delta_equals_dense(shape, dropout_p, base_grad):
    # Path p reads sources[p], whose mask has source id p + 1.
    case = Case(m=6, outs=(7,), source_sizes=(5, 13), paths=((3, 0, 0), (9, 0, 1)), dropout_p=dropout_p, gates="mixed", seed=12)
    inputs = make_inputs(case)
    inputs.weights = inputs.biases = []
    inputs.requires_grad_(set(inputs.leaves()) - {"x"})
    truth = inputs.doubles().requires_grad_(set(inputs.leaves()) - {"x"})
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(6, 7, dtype=torch.float64, generator=generator).requires_grad_(base_grad)
    probe = torch.zeros(12, NUM_COLUMNS, requires_grad=True)
    out = lora_delta(base.reshape(*shape, 7), [u.reshape(*shape, u.shape[1]) for u in inputs.sources], inputs.lora_A,
                     inputs.lora_B, inputs.scaling, inputs.gate, inputs.active, rng=inputs.rng, dropout_p=dropout_p,
                     probe=probe)
    assert out.shape == (*shape, 7)
    expected = dense(truth, [base.detach()])
    assert_same([out.reshape(6, 7)], expected)
    grads = random_grads(expected)
    assert_same(gradients([out.reshape(6, 7)], inputs, grads, retain_graph=True), gradients(expected, truth, grads))
    out.reshape(6, 7).backward(grads[0])
    if base_grad:
        assert torch.equal(base.grad, grads[0])
    assert probe.grad.shape == (12, NUM_COLUMNS) and (probe.grad[:, 0] > 0).all()


GOOD = make_inputs(SHORTCUTS, torch.float32)
SHORTCUT = (GOOD.sources[0], GOOD.lora_A[1], GOOD.lora_B[1], 0.5)
# id: (overrides of the arguments of a good call, error, what the message names)
ERRORS = {
    "x_list": ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor, got list"),
    "weight_none": ({"weight": None}, TypeError, r"weight must be a torch.Tensor, got NoneType"),
    "a_alone": ({"lora_B": None}, ValueError, r"lora_A and lora_B must be given together"),
    "b_alone": ({"lora_A": None}, ValueError, r"lora_A and lora_B must be given together"),
    "a_list": ({"lora_A": [[1.0]]}, TypeError, r"lora_A\[0\] must be a torch.Tensor, got list"),
    "a_width": ({"lora_A": GOOD.lora_A[1]}, ValueError, r"lora_A\[0\] must be \[r, 9\]"),
    "b_rows": ({"lora_B": GOOD.lora_B[0][1:]}, ValueError, r"lora_B\[0\] must be \[7, 3\]"),
    "weight_width": ({"weight": GOOD.weights[0][:, 1:]}, ValueError, r"weights\[0\] must be \[N_0, 9\]"),
    "weight_dtype": ({"weight": GOOD.weights[0].double()}, TypeError, r"weights\[0\] must have the dtype of x"),
    "weight_device": ({"weight": GOOD.weights[0].to("meta")}, ValueError, r"weights\[0\] must be on the device of x"),
    "bias_size": ({"bias": torch.zeros(6)}, ValueError, r"biases\[0\] must be \[7\]"),
    "x_number": ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[M, K\], got shape \[\]"),
    "x_number_reference": ({"x": torch.tensor(1.0), "backend": "reference"}, ValueError, r"x must be \[M, K\], got shape \[\]"),
    "x_integer": ({"x": torch.ones(6, 9, dtype=torch.int64)}, TypeError, r"x must be float16"),
    "dropout_large": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout_negative": ({"dropout_p": -0.5}, ValueError, r"dropout_p must be in \[0, 1\], got -0.5"),
    "rng_dtype": ({"dropout_p": 0.5, "rng": torch.zeros(1)}, TypeError, r"rng must be torch.int64"),
    "gate_size": ({"gate": torch.ones(4)}, ValueError, r"gate must have shape \[3\], got \[4\]"),
    "shortcut_short": ({"shortcuts": [SHORTCUT[:3]]}, ValueError, r"shortcuts\[0\] must be \(source, .* got 3 entries"),
    "shortcut_source": ({"shortcuts": [SHORTCUT, (None, *SHORTCUT[1:])]}, TypeError, r"shortcuts\[1\]\[0\] must be"),
    "shortcut_rows": ({"shortcuts": [(SHORTCUT[0][:5], *SHORTCUT[1:])]}, ValueError, r"sources\[0\] must have M = 6 rows"),
    "backend_unknown": ({"backend": "abacus"}, ValueError, r"backend must be one of .* got 'abacus'"),
}


@pytest.mark.parametrize("overrides, error, match", ERRORS.values(), ids=ERRORS)
def test_bad_argument_is_named(overrides, error, match):
    good = dict(x=GOOD.x, weight=GOOD.weights[0], lora_A=GOOD.lora_A[0], lora_B=GOOD.lora_B[0], bias=GOOD.biases[0])
    hlk.lora_linear(**good)
    with pytest.raises(error, match=match):
        hlk.lora_linear(**(good | overrides))


def test_delta_with_a_missing_source_is_named():
    args = (GOOD.lora_A[1:], GOOD.lora_B[1:], torch.ones(2), torch.ones(11), torch.tensor([9, 2], dtype=torch.int32))
    lora_delta(torch.zeros(6, 7), GOOD.sources, *args)
    with pytest.raises(ValueError, match=r"path_source must have one entry per path \(2\), got 1"):
        lora_delta(torch.zeros(6, 7), GOOD.sources[:1], *args)
    with pytest.raises(ValueError, match="x must be given where path_source has -1"):
        lora_delta(torch.zeros(6, 7), GOOD.sources, *args, path_source=[-1, 0])


# torch.compile: one graph, the same numbers.

def _fresh():
    """No graphs, and the backend loaded: test_backends compiles with nothing loaded."""
    torch._dynamo.reset()
    resolve(torch.device("cpu"))


def _compiled_equals_eager(function, make, rtol=1e-6, atol=1e-6):
    """Outputs and gradients of every leaf, compiled and not."""
    def run(f, inputs):
        outs = f(inputs)
        outs = outs if isinstance(outs, list) else [outs]
        return outs, gradients(outs, inputs, random_grads(outs))

    (outs, grads), (expected, truth) = run(function, make()), run(_UNCOMPILED[function], make())
    assert_same(outs, expected, rtol, atol)
    assert_same(grads, truth, rtol, atol)


_UNCOMPILED = {}


def _compile(function, **options):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    _UNCOMPILED[compiled] = function
    return compiled


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_compiled_linear_equals_eager(dropout_p):
    _fresh()
    case = replace(SHORTCUTS, dropout_p=dropout_p)
    _compiled_equals_eager(_compile(lambda inputs: _linear(inputs, rng=inputs.rng)),
                           lambda: make_inputs(case, torch.float32).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_group_equals_eager(dtype):
    _fresh()
    case = CASES["three_linears_four_paths"]
    _compiled_equals_eager(_compile(_group), lambda: make_inputs(case, dtype, torch.float32).requires_grad_())


def test_compiled_group_emits_statistics():
    _fresh()

    def collect(run):
        inputs = make_inputs(CASES["two_linears"], torch.float32).requires_grad_()
        probe = torch.zeros(6, NUM_COLUMNS, requires_grad=True)
        probe.grad = torch.ones(6, NUM_COLUMNS)
        for _ in range(2):
            outs = run(inputs, probe=probe)
            torch.autograd.backward(outs, random_grads(outs))
        return probe.grad

    torch.testing.assert_close(collect(torch.compile(_group, fullgraph=True, backend="aot_eager")), collect(_group))


def test_compiled_delta_equals_eager():
    _fresh()
    case = Case(m=6, k=7, outs=(7,), source_sizes=(5, 13), paths=((3, 0, 0), (9, 0, 1)), dropout_p=0.2, gates="mixed")

    def run(inputs):
        return lora_delta(inputs.x, inputs.sources, inputs.lora_A, inputs.lora_B, inputs.scaling, inputs.gate,
                          inputs.active, rng=inputs.rng, dropout_p=inputs.dropout_p)

    def make():
        inputs = make_inputs(case, torch.float32)
        inputs.weights = inputs.biases = []
        return inputs.requires_grad_()

    _compiled_equals_eager(_compile(run), make)


def test_compiled_with_dynamic_shapes_is_compiled_once():
    _fresh()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_group, fullgraph=True, backend=counter, dynamic=True)
    _UNCOMPILED[compiled] = _group
    # No size equals another: equal ones would be taken for one symbol.
    counts = []
    for m in (23, 3, 17):
        case = replace(CASES["two_paths_one_output"], m=m)
        _compiled_equals_eager(compiled, lambda case=case: make_inputs(case, torch.float32).requires_grad_())
        counts.append(counter.frame_count)
    # The first call may trace twice: the float dropout_p is made a constant.
    assert counts[0] == counts[1] == counts[2]


def test_compiled_graph_follows_gates_and_scaling_without_recompiling():
    _fresh()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_group, fullgraph=True, backend=counter)
    inputs = make_inputs(CASES["two_linears"], torch.float32)
    for gates in (1.0, 0.0, 0.5):
        inputs.gate.fill_(gates)
        inputs.active.fill_(5 if gates else 0)
        inputs.scaling.mul_(2)
        assert_same(compiled(inputs), dense(inputs), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_compiled_dropout_draws_a_key_for_every_call():
    _fresh()
    inputs = make_inputs(replace(ONE, dropout_p=0.5, m=30), torch.float32)
    compiled = torch.compile(lambda inputs: _linear(inputs), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(inputs), compiled(inputs))


def test_autocast_does_not_touch_the_op():
    inputs = make_inputs(ONE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = _group(inputs)[0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, _group(inputs)[0], rtol=0.02, atol=0.02)


def test_vectors_take_python_numbers():
    inputs = make_inputs(ONE)
    for scaling in (2, 2.0, torch.tensor(2.0)):
        out = hlk.lora_linear(inputs.x, inputs.weights[0], inputs.lora_A[0], inputs.lora_B[0], scaling=scaling)
        low_rank = inputs.x @ inputs.lora_A[0].t() @ inputs.lora_B[0].t()
        torch.testing.assert_close(out, inputs.x @ inputs.weights[0].t() + 2 * low_rank)


def test_masks_of_x_and_sources_differ():
    """Equal tensors as x and as a source are dropped by different masks."""
    x = torch.ones(4, 24, dtype=torch.float64)
    eye = torch.eye(24, dtype=torch.float64)
    zero = torch.zeros(24, 24, dtype=torch.float64)
    key = torch.tensor([RNG])
    own = hlk.lora_linear(x, zero, eye, eye, dropout_p=0.5, rng=key)
    shortcut = hlk.lora_linear(x, zero, None, None, shortcuts=[(x, eye, eye, 1.0)], dropout_p=0.5, rng=key)
    for source_id, out in ((0, own), (1, shortcut)):
        torch.testing.assert_close(out, keep_scale(0.5) * keep_matrix(RNG, 4, 24, source_id, 0.5).double())
