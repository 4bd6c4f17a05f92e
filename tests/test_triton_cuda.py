"""The Triton backend on a CUDA device: every number of triton_interpreted.py with the device's own tiles, large calls against
float64, torch.compile and CUDA graphs.

HETEROLORA_TEST_DEVICE=cpu with TRITON_INTERPRET=1 runs those of these tests that make sense in the interpreter.
"""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import helpers_search as hs
import pytest
import torch
from helpers_op import Case, make_inputs, random_grads
from torch._dynamo.testing import CompileCounterWithBackend

import heterolora_kernels as hlk
from bench import cases, checks, problem
from bench.contenders import make_contender
from heterolora_kernels import _env
from heterolora_kernels.backends import resolve
from heterolora_kernels.ops.schema import Flags

DEVICE = torch.device(os.environ.get("HETEROLORA_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if _env.triton_missing() is not None:
    pytest.skip(_env.triton_missing(), allow_module_level=True)
resolve(DEVICE, "triton")

TESTS = Path(__file__).parent
ops = torch.ops.heterolora_kernels
on_device = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device: the interpreter has no streams")


@on_device
def test_numbers_on_the_device():
    """bf16, fp16 and float32 by the error rule, statistics, mask bits, mixed ranks, determinism."""
    env = {**os.environ, "TRITON_INTERPRET": "", "HETEROLORA_TEST_DEVICE": "cuda",
           "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/triton_interpreted.py"], capture_output=True, text=True,
                          env=env, timeout=1500, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---- large calls, which take the table's large tiles ----

def _call(m, k, outs, rank, dtype="bfloat16", adapters="", dropout_p=0.0):
    return cases.Case("device", "", m, k, outs, dtype, "triton", ("op", "no_statistics"), rank=rank, adapters=adapters,
                      dropout_p=dropout_p)


CALLS = {
    "large": _call(2184, 1032, (2056,), 16), "large_dropout": _call(2184, 1032, (2056,), 16, dropout_p=0.1),
    "large_float16": _call(2184, 1032, (2056,), 16, "float16"), "rank_64": _call(2184, 1032, (2056,), 64, dropout_p=0.1),
    "rank_5": _call(2184, 1032, (2056,), 5), "float32_adapters": _call(2184, 1032, (2056,), 16, adapters="float32"),
    "group": _call(2184, 1032, (2056, 520, 520), 16, dropout_p=0.1), "unaligned": _call(2183, 1029, (2051,), 13),
    "whole_tiles": _call(4096, 1024, (2048,), 16), "small_output": _call(2184, 1032, (264,), 16),
    "middle": _call(1032, 520, (1032,), 16), "few_hundred": _call(257, 1032, (520,), 24, dropout_p=0.1),
    "decoding": _call(16, 1032, (2056, 520), 16), "one_row": _call(1, 1032, (2056,), 40),
    "float32": _call(1032, 1032, (1032,), 16, "float32"), "float32_unaligned": _call(1031, 515, (517,), 13, "float32", "", 0.1),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_large_calls_are_bounded_by_plain_pytorch(case):
    """Outputs, gradients and statistics; the rule is that of test_lora_op.py, the yardstick PyTorch on this device."""
    if DEVICE.type != "cuda":
        case = replace(case, m=case.m % 64 + 1, k=case.k % 64 + 8, outs=tuple(n % 64 + 8 for n in case.outs))
    made = problem.make_problem(case, DEVICE)
    truth = problem.run_reference(made.to(torch.float64))
    usual = problem.run_reference(made.to(getattr(torch, case.dtype)))
    usual.grads = {name: grad if name == "x" else grad.to(made.lora_A[0].dtype) for name, grad in usual.grads.items()}
    for name in case.contenders:
        contender = make_contender(name, made)
        first, second = contender.results("train"), contender.results("train")
        checks.check(first, truth, usual, getattr(torch, case.dtype))
        for one, other in zip([*first.outs, *first.grads.values()], [*second.outs, *second.grads.values()]):
            assert torch.equal(one, other), "two runs differ"


@on_device
def test_elements_beyond_two_to_the_thirty_one_are_reached():
    rows, n, k = 2 ** 16 + 8, 2 ** 15 + 8, 64
    if torch.cuda.mem_get_info()[0] < 30 * 2 ** 30:
        pytest.skip("needs 30 GiB of free device memory")
    made = problem.make_problem(_call(rows, k, (n,), 8), DEVICE)
    op, x = make_contender("no_statistics", made), made.x[-8:]
    got = op.results("train")
    small = problem.Problem(made.case, x, made.weights, made.lora_A, made.lora_B, [made.grad_outs[0][-8:]], None)
    want = problem.run_reference(small.to(torch.float32))
    torch.testing.assert_close(got.outs[0][-8:].float(), want.outs[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.grads["x"][-8:].float(), want.grads["x"], rtol=2e-2, atol=2 * n ** 0.5 * 2 ** -8)
    del made, op, got, small
    gc.collect()
    torch.cuda.empty_cache()


# ---- torch.compile and CUDA graphs ----

def _on_device(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


def _grads(call, model, batch):
    model.zero_grad(set_to_none=True)
    call(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(got, want, rtol=1e-4, atol=1e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@on_device
def test_compiled_model_follows_new_ranks_without_compiling_again():
    model, batch = hs.make_llama(layers=1).to(DEVICE), _on_device(hs.llama_batch(0))
    search = hlk.RankSearch(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    _assert_close(_grads(compiled, model, batch), _grads(model, model, batch))
    for ranks in (0, 2, 1):
        search.apply({name: ranks for name in list(search.paths)[::2]})
        _assert_close(_grads(compiled, model, batch), _grads(model, model, batch))
    assert counter.frame_count == 1


def _captured(model, batch):
    """A graph of forward and backward, the loss it writes, and the gradients it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(**batch).loss
        loss.backward()
    return graph, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _replayed(graph, loss, grads):
    for grad in grads.values():
        # What a replay does not write would pass otherwise.
        grad.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return {"loss": loss.clone(), **{name: grad.clone() for name, grad in grads.items()}}


@on_device
def test_captured_graph_follows_new_ranks():
    model = hs.make_net().to(DEVICE).eval()
    batch = _on_device(hs.net_batch(0))
    search = hlk.RankSearch(model)
    captured = _captured(model, batch)
    for ranks in (4, 0, 3, 1):
        search.apply({name: ranks for name in list(search.paths)[::2]})
        got = _replayed(*captured)
        kept = {name: p.grad for name, p in model.named_parameters()}
        loss = model(**batch).loss.detach()
        want = {"loss": loss, **_grads(model, model, batch)}
        for name, p in model.named_parameters():
            p.grad = kept[name]
        _assert_close(got, want)


@on_device
def test_every_replay_draws_a_mask_of_its_own():
    model = hs.make_net(lora_dropout=0.5).to(DEVICE)
    model.norm.eval()
    captured = _captured(model, _on_device(hs.net_batch(0)))
    losses = {_replayed(*captured)["loss"].item() for _ in range(4)}
    assert len(losses) > 1


@on_device
def test_a_call_does_not_wait_for_the_device():
    case = Case(m=70, k=48, outs=(72, 40), biases=(True, False), paths=((5, 0, -1), (9, 1, -1)), dropout_p=0.1, gates="mixed")
    inputs = make_inputs(case, torch.bfloat16, torch.float32).to(DEVICE)
    flags = int(Flags.SAVE | Flags.STATISTICS)
    outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
    grads = random_grads(outs)
    ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, 31)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs, hidden, mask = ops.lora_linear_triton(*inputs.args(flags))
        ops.lora_linear_backward_triton(grads, *inputs.args(flags), hidden, mask, 31)
    finally:
        torch.cuda.set_sync_debug_mode("default")
