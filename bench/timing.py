"""Samples of several contenders in turn, so that whatever slows the machine down for a while slows all of them.

Times are medians over rounds. They are taken by one clock and in one way for every contender; pytest-benchmark, which runs the
rounds and writes the file, times the subject as well, but a call more deep.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time

import torch

#: A sample is at least this long; short calls are repeated within it.
_SAMPLE_SECONDS = 5e-4
_MAX_CALLS = 50
#: Of calls as slow as this a second warm-up changes nothing that would be seen, and takes long.
_SLOW_SECONDS = 0.15
_MAX_ROUNDS = 200
_MIN_ROUNDS = 5


def take_sample(contender, mode: str, calls: int) -> dict[str, float]:
    """Seconds per call and phase: ``{"infer": s}`` or ``{"forward": s, "backward": s, "both": s}``."""
    if hasattr(contender, "step"):
        return contender.step()
    if mode == "infer":
        with torch.no_grad():
            began = perf_counter()
            for _ in range(calls):
                contender.forward()
            return {"infer": (perf_counter() - began) / calls}
    forward = backward = 0.0
    for _ in range(calls):
        contender.clear()
        began = perf_counter()
        outs = contender.forward()
        between = perf_counter()
        torch.autograd.backward(outs, contender.grad_outs)
        forward, backward = forward + between - began, backward + perf_counter() - between
        # Not within the time of the next call.
        del outs
    return {"forward": forward / calls, "backward": backward / calls, "both": (forward + backward) / calls}


def interleave(benchmark, contenders: Sequence, mode: str, seconds: float, max_rounds: int = _MAX_ROUNDS) -> dict:
    """Time contenders in turn, the subject (the first) by pytest-benchmark's fixture.

    Returns:
        ``{"rounds", "calls", "others", "ms": {phase: {contender: [first quartile, median, third quartile]}}}``: others as
        :class:`Others` counts them, milliseconds per call.
    """
    subject, *baselines = contenders
    first = [_seconds(take_sample(contender, mode, 1)) for contender in contenders]
    calls, spent = 1, sum(first)
    if max(first) < _SLOW_SECONDS:
        first = [_seconds(take_sample(contender, mode, 1)) for contender in contenders]
        calls = min(_MAX_CALLS, max(1, round(_SAMPLE_SECONDS / min(first))))
        # Again, now that code and data are warm.
        spent = sum(_seconds(take_sample(contender, mode, calls)) * calls for contender in contenders)
    rounds = max(_MIN_ROUNDS, min(max_rounds, round(seconds / spent)))
    samples: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}

    def time_baselines():
        # Each begins in turn: what ran just before is no advantage of one of them.
        shift = len(samples[subject.name]) % max(1, len(baselines))
        for contender in [*baselines[shift:], *baselines[:shift]]:
            samples[contender.name].append(take_sample(contender, mode, calls))

    def time_subject():
        samples[subject.name].append(take_sample(subject, mode, calls))

    others = Others()
    benchmark.pedantic(time_subject, setup=time_baselines, rounds=rounds)
    phases = samples[subject.name][0]
    return {"rounds": len(samples[subject.name]), "calls": calls, "others": others.cores(),
            "ms": {phase: {name: quartiles([1e3 * sample[phase] for sample in taken]) for name, taken in samples.items()
                           if phase in taken[0]} for phase in phases}}


def _seconds(sample: dict[str, float]) -> float:
    return sample.get("step", sample.get("both", sample.get("infer", 0.0)))


class Others:
    """How many cores other processes kept busy since this was made: beside another process every ratio tends to 1."""

    def __init__(self):
        self.before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return perf_counter(), busy, process_time()

    def cores(self) -> float | None:
        """Rounded to hundredths; None where the system does not tell."""
        after = self._now()
        if self.before is None or after is None:
            return None
        wall, busy, own = (late - early for early, late in zip(self.before, after))
        return round(max(0.0, busy - own) / wall, 2)


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(f"{value:.5g}") for value in
            (statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3)]
