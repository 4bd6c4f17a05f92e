"""What a dynamic search costs: training steps with it against steps with ``search="off"`` and the same active set.

Contenders, with default settings and AdamW: ``in_step`` and ``probe`` (the values of ``score``), ``off`` (patched, no search).
Two measurements make one row:

- *time*: one process, the contenders in turn, step by step, all with the ranks that ``in_step`` has chosen. The steps between
  reallocations, those in which statistics are collected, and the reallocations are timed apart, in intervals shortened to
  SHORT steps, and put together for the interval of the default settings.
- *memory*: a process for each contender, and the most that the system ever saw it hold beyond what it held before the
  model was built: weights, packs, saved tensors, optimizer state, statistics.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

import heterolora_kernels as hlk
from bench.timing import Others, quartiles
from bench.training import ALPHA, RANK, StepCase, StepContender
from heterolora_kernels.backends import use_backend
from heterolora_kernels.search import PROBE_BATCHES
from heterolora_kernels.state import state_of

#: Optimizer steps of an epoch: about MRPC's, 4,076 pairs in batches of 16. The default interval is a fifth of it.
EPOCH_STEPS = 250
#: Steps from one reallocation to the next in what is timed; statistics are collected in the last WINDOW of them, the default.
SHORT, WINDOW = 16, 8
#: Where memory is measured: after so many steps every path has been on, and two reallocations by scores have followed.
_MEMORY_STEPS, _MEMORY_INTERVAL = 14, 2
#: glibc gives every block of 64 KiB and more back as soon as it is freed: the peak is then of what was in use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class SearchCase(StepCase):
    """One row: a model, a dtype, and ``mode``: ``"time"`` or ``"memory"``.

    ``interval``: steps from one reallocation to the next for which the cost is told.
    """

    interval: int = round(hlk.HeteroLoraConfig().interval * EPOCH_STEPS)

    @property
    def id(self) -> str:
        return f"{super().id}.{self.mode}"


def search_cases(backend: str, quick: bool = False) -> Iterator[SearchCase]:
    """Encoder and decoder; one case with ``--quick``. The whole decoder without a probe, whose 32 batches take half a minute."""
    rows = [("encoder", "bfloat16"), ("encoder", "float32"), ("short_decoder", "bfloat16"), ("short_decoder", "float32"),
            ("decoder", "bfloat16")]
    for model, dtype in rows[:1] if quick else rows:
        contenders = ("in_step", "off") if model == "decoder" else ("in_step", "off", "probe")
        for mode in ("time",) if quick else ("time", "memory"):
            yield SearchCase("search", model, model, dtype, backend, contenders, mode)


class SearchContender(StepContender):
    """A patched model with its search.

    Args:
        name: ``"off"``, ``"in_step"`` or ``"probe"``.
        settings: of the config, where there is a search.
    """

    def __init__(self, case: SearchCase, name: str, **settings):
        self._settings = settings
        super().__init__(case, name)

    def config(self) -> hlk.HeteroLoraConfig:
        """Default settings."""
        kind = dict(search="off") if self.name == "off" else dict(score=self.name, **self._settings)
        return hlk.HeteroLoraConfig(r=RANK, lora_alpha=ALPHA, **kind)

    def start(self) -> None:
        """From here on steps are taken."""
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.search = hlk.RankSearch(self.model, self.optimizer, dataloader=[self.batch] * PROBE_BATCHES)
        with use_backend(self.backend):
            self.search.start()

    @property
    def is_collecting(self) -> bool:
        """Whether the next step's statistics are counted."""
        return state_of(self.model).switches.ledger.collecting

    def timed_step(self) -> tuple[float, float | None]:
        """Seconds of a step, and of the reallocation at its end if there is one, which is not counted into the step."""
        began = perf_counter()
        self.loss(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained = perf_counter()
        with use_backend(self.backend):
            reallocated = self.name != "off" and self.search.step()
        ended = perf_counter()
        return (trained - began, ended - trained) if reallocated else (ended - began, None)


def take_interval(contenders: Sequence[SearchContender], samples: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Run steps in turn until ranks are chosen, and add milliseconds to ``samples[phase][contender]``."""
    chooser = next(contender for contender in contenders if contender.name == "in_step")
    chosen, turn = False, 0
    while not chosen:
        phase = "window" if chooser.is_collecting else "plain"
        # Each begins in turn: what ran just before is no advantage of one of them.
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            step, reallocation = contender.timed_step()
            samples[phase][contender.name].append(1e3 * step)
            if reallocation is not None:
                samples["reallocation"][contender.name].append(1e3 * reallocation)
                chosen = True
        turn += 1
    share_ranks(contenders)


def share_ranks(contenders: Sequence[SearchContender]) -> None:
    """Give all of them the ranks of ``in_step``."""
    ranks = next(contender.search.ranks for contender in contenders if contender.name == "in_step")
    for contender in contenders:
        contender.search.apply(ranks)


def amortise(ms: Mapping[str, Mapping[str, Sequence[float]]], interval: int) -> dict[str, list[float]]:
    """A step with its share of everything, per contender: quartiles put together from those of the phases."""
    def step(name: str) -> Iterator[float]:
        for plain, window, chosen in zip(ms["plain"][name], ms["window"][name], ms["reallocation"].get(name, [0.0] * 3)):
            yield ((interval - WINDOW) * plain + WINDOW * window + chosen) / interval

    return {name: [float(f"{value:.5g}") for value in step(name)] for name in ms["plain"]}


def time_search(benchmark, contenders: Sequence[SearchContender], interval: int, seconds: float, max_rounds: int = 6) -> dict:
    """Time contenders, which are started here.

    Returns:
        ``{"rounds", "calls", "others", "ms"}`` as :func:`bench.timing.interleave` does. Phases: ``plain`` and ``window``, steps
        outside and inside the window without the reallocation; ``reallocation``; ``step``, all of it for ``interval``.
    """
    for contender in contenders:
        contender.start()
    share_ranks(contenders)
    for contender in contenders:
        contender.timed_step()
    first = {contender.name: contender.timed_step()[0] for contender in contenders}
    expected = SHORT * sum(first.values()) + PROBE_BATCHES * first.get("probe", 0.0)
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rounds, others = max(1, min(max_rounds, round(seconds / expected))), Others()
    benchmark.pedantic(lambda: take_interval(contenders, samples), rounds=rounds)
    taken = others.cores()
    ms = {phase: {name: quartiles(values) for name, values in found.items()} for phase, found in samples.items()}
    ms["step"] = amortise(ms, interval)
    # What reallocations are told in: a step of the contender that has none.
    ms["reallocation"]["off"] = ms["plain"]["off"]
    return {"rounds": rounds, "calls": 1, "others": taken, "ms": ms}


# ---- memory ----

def measure_memory(case: SearchCase) -> dict[str, float]:
    """MiB beyond an empty process of each contender, in processes of their own; ``off`` has the last ranks of ``in_step``."""
    found: dict[str, dict] = {}
    for name in sorted(case.contenders, key=lambda name: name == "off"):
        task = {"case": asdict(case), "name": name, "threads": torch.get_num_threads(),
                "ranks": found["in_step"]["ranks"] if name == "off" else None}
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "bench.search_cost"], cwd=_ROOT, input=json.dumps(task),
                              env={**os.environ, **_ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
    return {name: found[name]["mib"] for name in case.contenders}


def peak_memory(case: SearchCase, name: str, ranks: Mapping[str, int] | None = None) -> dict:
    """What :func:`measure_memory` runs: MiB at the peak beyond those now, and the ranks in the end."""
    gc.collect()
    before = _status("VmRSS")
    contender = SearchContender(case, name, interval=_MEMORY_INTERVAL, num_batches=_MEMORY_INTERVAL)
    contender.start()
    if ranks is not None:
        contender.search.apply(ranks)
    for _ in range(_MEMORY_STEPS):
        contender.timed_step()
    return {"mib": round(_status("VmHWM") - before, 1), "ranks": contender.search.ranks}


def _status(field: str) -> float:
    """MiB of this process, from the system."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _task = json.load(sys.stdin)
    torch.set_num_threads(_task["threads"])
    _task["case"]["contenders"] = tuple(_task["case"]["contenders"])
    print(json.dumps(peak_memory(SearchCase(**_task["case"]), _task["name"], _task["ranks"])))
