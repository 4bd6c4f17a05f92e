"""The GPU benchmark: checks and times the cases of gpu_cases.py on one CUDA device and writes what it found after every case.

example:
  python -m bench.gpu --json gpu.json --seconds 200
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from torch.nn import functional as F

from bench import machine
from bench.cases import Case
from bench.checks import WrongResult, check
from bench.contenders import OURS, make_contender
from bench.gpu_cases import gpu_cases
from bench.gpu_report import write_whole
from bench.gpu_timing import ceilings, copies_for, first_line, interleaved, modes_of
from bench.problem import Problem, Results, make_problem, run_reference

#: Exit code where there is no device to measure on: neither right nor wrong.
NO_DEVICE = 3
#: Computes the linears alone.
_BASES = ("no_path", "frozen")
#: Seconds of samples per mode of a case.
_SECONDS = 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for the results; rewritten after each case")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this long (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first few cases, and fewer samples")


def main(arguments: list[str] | None = None) -> int:
    """0: measured; 1: something computes something else, and was not timed; 3: there is no device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(arguments)
    if reason := why_not():
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return NO_DEVICE
    found = {"machine": about_device(), "ceilings": ceilings(), "results": [], "wrong": [], "left_out": []}
    return run_cases(list(gpu_cases(args.quick)), found, args)


def why_not() -> str | None:
    """Why nothing can be measured here, in one line."""
    from heterolora_kernels._env import triton_interprets, triton_missing

    if not torch.cuda.is_available():
        return "no CUDA device"
    # Numbers of the interpreter would look like times.
    return "TRITON_INTERPRET is set: there is no time in the interpreter" if triton_interprets() else triton_missing()


def about_device() -> dict:
    """The card, driver-side versions and the code that was measured."""
    import triton

    card = torch.cuda.get_device_properties(0)
    about = machine.describe()
    return {**about, "device": "cuda", "card": card.name, "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count, "l2_bytes": card.L2_cache_size, "memory_bytes": card.total_memory,
            "versions": {**about["versions"], "triton": triton.__version__, "cuda": torch.version.cuda}}


def run_cases(cases: list[Case], found: dict, args: argparse.Namespace) -> int:
    """Measure until the time is up; ``found`` is written after every case."""
    began = perf_counter()
    for index, case in enumerate(cases):
        if perf_counter() - began > args.seconds:
            found["left_out"] = [left.id for left in cases[index:]]
            break
        started = perf_counter()
        try:
            result = measure(case, _SECONDS / (3 if args.quick else 1))
        except torch.cuda.OutOfMemoryError as error:
            result = {"ms": {}, "failed": {"case": first_line(error)}, "wrong": []}
        torch.cuda.empty_cache()
        found["wrong"] += [f"{case.id}: {line}" for line in result.pop("wrong")]
        found["results"].append({"case": asdict(case), **result, "seconds": round(perf_counter() - started, 1)})
        write_whole(args.json, json.dumps(found, indent=1) + "\n")
        print(f"{perf_counter() - began:5.0f} s  {case.id}  {result['failed'] or ''}", flush=True)
    write_whole(args.json, json.dumps(found, indent=1) + "\n")
    for line in [*found["wrong"], *[f"no time was left for {name}" for name in found["left_out"]]]:
        print(line, flush=True)
    return 1 if found["wrong"] else 0


def measure(case: Case, seconds: float, device: str = "cuda") -> dict:
    """Check a case's contenders, and time those that are right.

    Returns:
        ``{"ms": {mode: {"graph" or "events": {contender: quartiles}}}, "copies", "failed":
        {contender: reason}, "wrong": [text]}``.
    """
    problem = make_problem(case, device)
    made, failed, wrong = checked(problem)
    size = sum(t.nbytes for t in (problem.x, *problem.weights, *problem.grad_outs))
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    # A compiled contender would be compiled again for every copy.
    copies = 1 if "peft_compiled" in case.contenders else copies_for(size, cache)
    problems = [problem, *[problem.copy() for _ in range(copies - 1)]]
    sets = {name: [contender, *[make_contender(name, other) for other in problems[1:]]] for name, contender in made.items()}
    times = {}
    for mode in modes_of(case.mode):
        times[mode], missed = interleaved(sets, mode, seconds)
        failed |= missed
    return {"ms": times, "copies": copies, "failed": failed, "wrong": wrong}


def checked(problem: Problem) -> tuple[dict, dict[str, str], list[str]]:
    """The contenders that compute what they should, ``{name: reason}`` of those that do not run, and what is wrong with others.

    Where dropout's masks are a contender's own it is compared without dropout.
    """
    case = problem.case
    truth, usual = _solve(problem)
    dry = None
    made, failed, wrong = {}, {}, []
    for name in case.contenders:
        try:
            contender = make_contender(name, problem)
            if case.dropout_p and name.startswith("peft"):
                plain = replace(problem, case=replace(case, dropout_p=0.0), rng=None)
                dry = dry or _solve(plain)
                tested, expected = make_contender(name, plain), dry
            else:
                tested, expected = contender, _solve_bases(problem) if name in _BASES else (truth, usual)
            check(tested.results(case.mode), *expected, getattr(torch, case.dtype), strict=name in OURS)
            made[name] = contender
        except WrongResult as error:
            wrong.append(f"{name}: {error}")
        except (RuntimeError, ImportError, ValueError, TypeError) as error:
            # A baseline that cannot run here is a gap in the table; ours that cannot is a fault.
            (wrong.append(f"{name}: {first_line(error)}") if name in OURS else failed.setdefault(name, first_line(error)))
    return made, failed, wrong


def _solve(problem: Problem) -> tuple[Results, Results]:
    """The float64 truth, and what plain PyTorch gets in the problem's own dtype."""
    usual = run_reference(problem.to(getattr(torch, problem.case.dtype)))
    usual.grads = {name: grad if name == "x" else grad.to(problem.lora_A[0].dtype) for name, grad in usual.grads.items()}
    return run_reference(problem.to(torch.float64)), usual


def _solve_bases(problem: Problem) -> tuple[Results, Results]:
    """The same of the linears alone."""
    def run(problem: Problem) -> Results:
        x = problem.x.detach().requires_grad_()
        outs = [F.linear(x, weight) for weight in problem.weights]
        torch.autograd.backward(outs, problem.grad_outs)
        return Results([out.detach() for out in outs], {"x": x.grad})

    return run(problem.to(torch.float64)), run(problem)


if __name__ == "__main__":
    sys.exit(main())
