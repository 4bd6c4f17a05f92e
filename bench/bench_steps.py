"""Whole training steps against PEFT, the reference backend and the frozen model."""

from __future__ import annotations

from bench.timing import interleave
from bench.training import StepContender, check_steps


def test_step(benchmark, step_case, about, options):
    benchmark.group = step_case.block
    contenders = [StepContender(step_case, name) for name in step_case.contenders]
    check_steps(step_case, contenders, options.lora_tolerance)
    try:
        for contender in contenders:
            contender.start()
        measured = interleave(benchmark, contenders, step_case.mode, 4.0 if options.quick else 7.0, max_rounds=25)
    finally:
        for contender in contenders:
            contender.close()
    benchmark.extra_info.update(about(step_case), **measured)
