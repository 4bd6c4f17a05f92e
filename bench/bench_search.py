"""Training steps with a search against steps without one: time, and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.search_cost import SHORT, SearchContender, measure_memory, time_search
from bench.training import check_steps


def test_search(benchmark, search_case, about, options):
    benchmark.group = search_case.block
    if search_case.mode == "memory":
        if not Path("/proc/self/status").exists():
            pytest.skip("the system does not tell how much memory a process has used (/proc/self/status)")
        mib = benchmark.pedantic(measure_memory, args=(search_case,), rounds=1)
        # Its own processes are others than this one.
        measured = {"rounds": 1, "calls": 1, "others": None, "ms": {}, "mib": mib}
    else:
        contenders = [SearchContender(search_case, name, interval=SHORT, warmup=1) for name in search_case.contenders]
        check_steps(search_case, contenders, options.lora_tolerance)
        measured = time_search(benchmark, contenders, search_case.interval, 10.0 if options.quick else 40.0)
    benchmark.extra_info.update(about(search_case), **measured)
