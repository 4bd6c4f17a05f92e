"""Milliseconds on a GPU, by CUDA events around CUDA graphs, and around plain calls.

A graph replays what the calls launched, so that its time is the GPU's alone; plain calls show what Python adds. Contenders take
turns, sample by sample. Where a case's tensors fit in the cache, calls go round several copies of them, as a model's would.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from bench.timing import quartiles

#: A sample is about this long: an event's own time, some microseconds, is lost in it.
_SAMPLE_MS = 3.0
_MAX_CALLS = 64
_MIN_ROUNDS = 7
_MAX_ROUNDS = 100


def modes_of(mode: str) -> tuple[str, ...]:
    """What is timed: ``infer`` is a forward without grad, ``forward`` one that saves, ``both`` that and a backward."""
    return ("infer",) if mode == "infer" else ("forward", "both")


def one_call(contender, mode: str) -> Callable[[], object]:
    """A function that runs one pass."""
    def infer():
        with torch.no_grad():
            return contender.forward()

    def both():
        # Not backward(): what adds to .grad would join the streams on which the leaves were first used, which a capture forbids.
        return torch.autograd.grad(contender.forward(), leaves, contender.grad_outs)

    leaves = contender.leaves()
    return {"infer": infer, "forward": contender.forward, "both": both}[mode]


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All the calls, one after the other, in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def milliseconds(run: Callable[[], object], times: int = 1) -> float:
    """Of one run, on the device, by events."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(times):
        run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / times


def copies_for(size: int, cache: int) -> int:
    """How many copies of ``size`` bytes exceed twice the cache; 1 where one does."""
    return min(8, max(1, -(-2 * cache // max(1, size))))


def interleaved(contenders: dict[str, list], mode: str, seconds: float) -> tuple[dict, dict[str, str]]:
    """Time contenders in turn.

    Args:
        contenders: ``{name: copies of one contender}``.
        mode: of :func:`modes_of`.
        seconds: for both kinds of samples together.

    Returns:
        ``{"graph" or "events": {name: [first quartile, median, third quartile]}}``, milliseconds per call, and ``{name: reason}``
        of what could not be captured.
    """
    calls = {name: [one_call(copy, mode) for copy in copies] for name, copies in contenders.items()}
    loops, graphs, failed, first = {}, {}, {}, {}
    for name, mine in calls.items():
        for call in mine * 2:
            call()
        first[name] = max(1e-3, statistics.median(milliseconds(mine[0]) for _ in range(3)))
        rounds = max(1, min(_MAX_CALLS, round(_SAMPLE_MS / first[name])) // len(mine))
        loops[name] = mine * rounds
        try:
            graphs[name] = graph_of(loops[name])
        except Exception as error:  # whatever a library does in a capture
            failed[name] = f"not captured: {first_line(error)}"
            torch.cuda.synchronize()
    found = {}
    for kind, runs in (("graph", {name: graph.replay for name, graph in graphs.items()}),
                       ("events", {name: functools.partial(_run_all, loop) for name, loop in loops.items()})):
        found[kind] = _in_turn(runs, {name: len(loop) for name, loop in loops.items()}, seconds / 2)
    return found, failed


def _run_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        # Nothing is kept: results of all calls at once might not fit.
        call()


def _in_turn(runs: dict[str, Callable[[], object]], calls: dict[str, int], seconds: float) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, began = list(runs), perf_counter()
    for name in names:
        milliseconds(runs[name])
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and perf_counter() - began > seconds:
            break
        # Each begins in turn: what ran just before is no advantage of one of them.
        shift = turn % max(1, len(names))
        for name in [*names[shift:], *names[:shift]]:
            taken[name].append(milliseconds(runs[name]) / calls[name])
    return {name: quartiles(values) for name, values in taken.items()}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def ceilings() -> dict[str, float]:
    """What the card does at best: a copy within its memory (GB/s, bytes read and written) and a bf16 product (TFLOP/s)."""
    source = torch.randn(2 ** 28, device="cuda")
    copy = _median(functools.partial(torch.empty_like(source).copy_, source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _median(functools.partial(torch.mm, a, b, out=torch.empty_like(a)))
    return {"copy_gb_per_s": round(2 * 4 * 2 ** 28 / copy / 1e6, 1), "bf16_tflop_per_s": round(2 * 8192 ** 3 / product / 1e9, 1)}


def _median(run: Callable[[], object]) -> float:
    milliseconds(run, 3)
    return statistics.median(milliseconds(run, 3) for _ in range(10))
