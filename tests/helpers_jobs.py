"""Jobs of two processes for tests: every scenario in turn, and the same training in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_search import assert_scores_close, llama_batch, make_llama, trainable

import heterolora_kernels as hlk
from heterolora_kernels import distributed

WORLD = 2
JOB_TIMEOUT = 120
# Of one collective: a process that waits in vain fails before the job is killed.
WAIT = timedelta(seconds=40)
HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """For child processes: one thread, the loopback device, this folder and the package on the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])}


def work(scenarios: dict[str, Callable[[int], object]], rank: int, folder: str) -> None:
    """One process of a job: every scenario in turn, its result or its traceback into a file."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=WAIT)
    results = {}
    for name, scenario in scenarios.items():
        try:
            results[name] = scenario(rank)
        except Exception:
            results[name] = RuntimeError(traceback.format_exc())
        torch.save(results, f"{folder}/{rank}.pt")
    # Whoever has lost the other process cannot part in order.
    os._exit(0)


def assert_gloo_has_ended() -> None:
    """No thread of a process group is left: one that is at work when Python shuts down aborts the process."""
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    assert "pt_gloo_runloop" not in threads, f"something holds the process group: {threads}"


class Lost(str):
    """The message of the error in which a collective ended when another process was gone."""


def launch(script: str, folder: Path) -> Callable[..., list]:
    """Run a test file as both processes of a job; returns ``results(scenario, ranks)``."""
    processes = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment(),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(WORLD)]
    output = []
    try:
        for process in processes:
            output.append(process.communicate(timeout=JOB_TIMEOUT)[0])
    except subprocess.TimeoutExpired:
        output.append(f"no end within {JOB_TIMEOUT} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()

    def results(name: str, ranks=range(WORLD)) -> list:
        found = []
        for rank in ranks:
            path = folder / f"{rank}.pt"
            states = torch.load(path, weights_only=False) if path.exists() else {}
            if name not in states or isinstance(states[name], RuntimeError):
                pytest.fail(f"process {rank}: {states.get(name, 'did not get here')}\n" + "\n".join(output))
            found.append(states[name])
        return found
    return results


def full_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole."""
    return {name: distributed.full(p).clone() for name, p in model.named_parameters()}


def joined(batches: list[dict]) -> dict:
    """The global batch of which each process has one part."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def fit(wrap: Callable | None = None, rank: int = 0, *, steps: int = 5, accumulate: int = 1, reentrant: bool | None = None,
        evaluates: bool = False, dtype: torch.dtype = torch.float64, **config) -> dict:
    """A dynamic search over a few AdamW steps: in one process (``wrap=None``), or as one of a job with the wrapped model.

    The job's process takes its own micro-batches; the single process all of them, summed and divided by their number as DDP and
    FSDP average them. It probes the global batches.
    """
    model = make_llama(dtype=dtype, **{"warmup": 1, "interval": 2, **config})
    if reentrant is not None:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    wrapped = model if wrap is None else wrap(model)
    parts = range(WORLD) if wrap is None else [rank]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    probes = [joined([llama_batch(500 + 10 * number + part) for part in parts]) for number in range(2)]
    search = hlk.RankSearch(wrapped, optimizer, probes)
    search.start()
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            is_last = micro + 1 == accumulate
            if hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(is_last)
            with wrapped.no_sync() if hasattr(wrapped, "no_sync") and not is_last else nullcontext():
                for part in parts:
                    wrapped(**llama_batch(WORLD * (accumulate * step + micro) + part)).loss.backward()
        if wrap is None:
            for parameter in trainable(model):
                if parameter.grad is not None:
                    parameter.grad /= WORLD
        if evaluates:
            with torch.no_grad():
                wrapped(**llama_batch(0))
        optimizer.step()
        search.step()
    return {"history": search.history, "ranks": search.ranks, "parameters": full_parameters(model)}


def assert_like_one_process(results: list[dict], alone: dict) -> None:
    """Both processes have chosen what one process chooses, by the same scores, and trained the same parameters."""
    assert results[0]["history"] == results[1]["history"] and results[0]["ranks"] == results[1]["ranks"]
    assert len(alone["history"]) == len(results[0]["history"]) == 3 and not alone["history"][-1]["warmup"]
    for ours, theirs in zip(results[0]["history"], alone["history"]):
        assert ours["ranks"] == theirs["ranks"]
        if theirs["scores"] is not None:
            assert_scores_close(ours["scores"], theirs["scores"])
    for name, values in alone["parameters"].items():
        for result in results:
            torch.testing.assert_close(result["parameters"][name], values, rtol=1e-9, atol=1e-12)
