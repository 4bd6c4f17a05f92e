"""The AMX kernels as they are shipped, their tile instructions executed in software; test_amx.py runs this file.

What the kernels compute is in test_cpu_kernels.py, which runs under the same plugin, software_amx.py. Here: that the
software is a processor as the manual describes it, how tiles are asked for, configured and released, and that nothing
behind a matrix is touched.
"""

import ctypes
import mmap
import os
import threading
from dataclasses import replace

import helpers_op
import pytest
import software_amx
import torch
from helpers_op import Case, gradients, make_inputs, random_grads

from heterolora_kernels.ops.ledger import NUM_COLUMNS
from heterolora_kernels.ops.schema import Flags

OPS = torch.ops.heterolora_kernels
CHOSEN = OPS.cpu_isa()
PROCESSOR = software_amx.library
BF16 = torch.bfloat16
# Rows on both sides of the strips' 32 and 16, columns and depths that end within a panel, a tile and a pair.
TALL = Case(m=83, k=97, outs=(101, 63), biases=(True, False), source_sizes=(33,),
            paths=((24, 0, -1), (8, 0, 0), (0, 1, -1), (1, 1, 0), (5, 1, -1)), dropout_p=0.2, gates="mixed", seed=51)
ONE_PANEL = Case(m=17, k=3, outs=(16,), paths=((5, 0, -1),), seed=52)


@pytest.fixture(autouse=True)
def _one_choice():
    yield
    OPS.set_cpu_isa(CHOSEN)


def _bits(inputs):
    """Outputs, gradients and statistics."""
    inputs.requires_grad_([name for name in inputs.leaves() if not name.startswith(("weights", "biases"))])
    probe = torch.zeros(inputs.gate.numel(), NUM_COLUMNS, requires_grad=True)
    outs = inputs.run(probe, backend="cpu")
    grads = random_grads(outs)
    first = gradients(outs, inputs, grads, retain_graph=True)
    torch.autograd.backward(outs, grads)
    return [*outs, *first.values(), probe.grad]


def test_the_package_asks_for_the_tiles_once_and_takes_amx():
    assert CHOSEN == os.environ.get("HETEROLORA_CPU_ISA", "amx_bf16")
    assert software_amx.counts()["permissions"] == 1


@pytest.mark.parametrize("fault", range(PROCESSOR.software_amx_num_faults()))
def test_software_refuses_what_a_processor_refuses(fault):
    refusal = PROCESSOR.software_amx_refusal(fault)
    assert refusal is not None and PROCESSOR.software_amx_fault(fault) in refusal


@pytest.mark.parametrize("rows,units,columns", [(16, 16, 16), (1, 1, 1), (5, 3, 7)])
def test_software_multiplies_in_the_order_of_the_manual(rows, units, columns):
    """Products of bf16 are exact in float32, so that a multiplication and an addition are a fused one."""
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, 2 * units, generator=generator), torch.randn(2 * units, columns, generator=generator)
    a, b = a.to(BF16), b.to(BF16)
    start = torch.randn(rows, columns, generator=generator)
    parts = [torch.zeros(rows, columns), torch.zeros(rows, columns)]
    for k in range(2 * units):
        parts[k % 2] += a[:, k, None].float() * b[k].float()
    assert torch.equal(_product(a, b, start), start + (parts[0] + parts[1]))


def _product(a, b, start):
    rows, columns = start.shape
    pairs = b.reshape(-1, 2, columns).transpose(1, 2).contiguous()
    # What is around the sum must stay.
    around = torch.full((start.numel() + 2,), 7.0)
    around[1:-1] = start.flatten()
    places = [ctypes.c_void_p(place) for place in (a.data_ptr(), pairs.data_ptr(), around.data_ptr() + 4)]
    PROCESSOR.software_amx_product(rows, len(pairs), columns, *places)
    assert around[0] == around[-1] == 7.0
    return around[1:-1].view(rows, columns)


def test_software_takes_denormals_for_zero_and_rounds_to_even():
    tiny, ulp = 2.0 ** -130, 2.0 ** -24
    a = torch.tensor([[tiny, 0.0], [2.0 ** -70, 0.0], [1.0, 0.0], [1.0, 0.0]]).to(BF16)
    b = torch.tensor([[1.0, 2.0 ** -60, ulp], [0.0, 0.0, 0.0]]).to(BF16)
    start = torch.tensor([[0.0, 0.0, tiny], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, tiny, 1.0 + 2 * ulp]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [2.0 ** -70, 0.0, 2.0 ** -94], [2.0, 2.0 ** -60, 1.0],
                             [2.0, 2.0 ** -60, 1.0 + 4 * ulp]])
    assert torch.equal(_product(a, b, start), expected)


def test_scopes_nest_and_end_with_an_exception():
    assert PROCESSOR.software_amx_scopes() == 0b1110


@pytest.mark.parametrize("threads", [1, 3])
def test_each_thread_configures_its_tiles_and_releases_them(threads):
    OPS.set_cpu_isa("amx_bf16")
    before, used = software_amx.counts(), PROCESSOR.software_amx_threads()
    torch.set_num_threads(threads)
    try:
        _bits(make_inputs(replace(TALL, m=300, k=130, outs=(90, 63)), BF16))
    finally:
        torch.set_num_threads(1)
    done = {name: count - before[name] for name, count in software_amx.counts().items()}
    assert done["configures"] == done["releases"] >= 2 and done["dots"] > 0 and done["permissions"] == 0
    # Rows that lie in one cache line each are read in half the time.
    assert done["splits"] == 0
    assert PROCESSOR.software_amx_threads() >= used + threads - 1


def test_tiles_are_released_when_memory_runs_out():
    """Every buffer of a forward in turn; threads that are new have none yet."""
    inputs = make_inputs(TALL, BF16)
    OPS.set_cpu_isa("amx_bf16")
    expected = OPS.lora_linear_cpu(*inputs.args(int(Flags.SAVE)))[0]
    results = []

    def call(failing):
        PROCESSOR.guarded_memory_fail(failing)
        try:
            results.append(OPS.lora_linear_cpu(*inputs.args(int(Flags.SAVE)))[0])
        except (RuntimeError, MemoryError) as error:
            results.append(error)
        if PROCESSOR.guarded_memory_fail(0) > 0:
            results.append("nothing failed")

    failing = 0
    while "nothing failed" not in results:
        failing += 1
        thread = threading.Thread(target=call, args=(failing,))
        thread.start()
        thread.join()
        assert PROCESSOR.software_amx_configured() == 0
    *errors, last, _ = results
    assert len(errors) > 8 and all("bad_alloc" in str(error) for error in errors)
    helpers_op.assert_same(last, expected, rtol=0, atol=0)


@pytest.mark.parametrize("isa", OPS.cpu_isas())
@pytest.mark.parametrize("case", [TALL, ONE_PANEL, replace(TALL, m=5)], ids=["tall", "one_panel", "few_rows"])
def test_nothing_behind_a_matrix_is_touched(isa, case):
    """Inputs, packs, outputs and the kernels' buffers end at a page that nobody may touch; what they held before is no number."""
    OPS.set_cpu_isa(isa)
    for dtypes in ((BF16, None), (torch.float32, None), (BF16, torch.float32)):
        plain = _bits(make_inputs(case, *dtypes))
        results = []

        def call(dtypes=dtypes, results=results):
            inputs = make_inputs(case, *dtypes)
            packs = [pack for weight in inputs.weights for pack in OPS.cpu_pack_weight(weight, True)]
            assert all((t.data_ptr() + t.nbytes) % mmap.PAGESIZE == 0 for t in [*inputs.leaves().values(), *packs] if t.nbytes)
            results.append(_bits(inputs))
            results.append(_bits(replace(inputs, packs=packs)))

        given = PROCESSOR.guarded_memory(1)
        try:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        finally:
            assert PROCESSOR.guarded_memory(0) > given + 20
        for result in results:
            helpers_op.assert_same(result, plain, rtol=0, atol=0)
        assert len(results) == 2
