"""The op and patched linears against the frozen linear, PEFT, and LoRA by plain matmuls."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from bench.cases import SECONDS, TARGET
from bench.checks import WrongResult, check
from bench.contenders import OURS, is_checked, make_contender
from bench.memory import held_bytes
from bench.problem import Problem, Results, make_problem, run_reference
from bench.timing import interleave


@functools.lru_cache(maxsize=1)
def _solved(key) -> tuple[Problem, Results, Results]:
    problem = make_problem(key)
    # float32 adapters of a 16-bit x may be rounded to its type, as autocast does; their gradients may not.
    usual = run_reference(problem.to(getattr(torch, key.dtype)))
    usual.grads = {name: grad if name == "x" else grad.to(problem.lora_A[0].dtype) for name, grad in usual.grads.items()}
    return problem, run_reference(problem.to(torch.float64)), usual


def solve(case) -> tuple[Problem, Results, Results]:
    """The tensors, the float64 truth, and what plain PyTorch gets; kept for the next case with the same tensors."""
    key = replace(case, block="", name="", backend="", contenders=(), mode="", adapters=case.adapter_dtype)
    problem, truth, usual = _solved(key)
    return replace(problem, case=case), truth, usual


def checked(case, tolerance: float = 1.0) -> list:
    """The case's contenders, each compared with the truth.

    Raises:
        WrongResult: names the contender.
    """
    problem, truth, usual = solve(case)
    contenders = []
    try:
        for name in case.contenders:
            contenders.append(make_contender(name, problem))
            if not is_checked(name, problem):
                continue
            try:
                expected = truth if name != "no_path" else Results(truth.outs, {"x": truth.grads["x"]})
                check(contenders[-1].results(case.mode), expected, usual, getattr(torch, case.dtype), strict=name in OURS,
                      tolerance=tolerance)
            except WrongResult as wrong:
                raise WrongResult(f"{name}: {wrong}") from None
    except BaseException:
        for contender in contenders:
            contender.close()
        raise
    return contenders


def test_linear(benchmark, case, about, options):
    benchmark.group = case.block
    contenders = checked(case, options.lora_tolerance)
    try:
        # Shapes on which no mean is taken, and forwards alone, get less.
        seconds = SECONDS[case.block] / (3 if options.quick or case.mode == "infer" or case.name not in TARGET else 1)
        measured = interleave(benchmark, contenders, case.mode, seconds)
        held = {each.name: held_bytes(each.forward, each.own()) for each in contenders
                if case.mode == "train" and each.name in ("op", "layer", "peft")}
    finally:
        for contender in contenders:
            contender.close()
    benchmark.extra_info.update(about(case), **measured, held=held)
