"""Compilation of every kernel ahead of time, without a GPU, and what the builds need of a chip.

The builds are found by running the backend itself on tensors without storage while its launches are intercepted: so the list
holds what would be launched, with the configurations of the shipped table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from heterolora_kernels.backends import triton as backend
from heterolora_kernels.backends.triton.launch import intercepted
from heterolora_kernels.ops.schema import Flags, Needs

#: Bytes of shared memory that one block may use: CUDA C++ programming guide, technical specifications per compute capability.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024,
                 120: 99 * 1024}


_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Scenario:
    """One call of an op whose launches are wanted; paths are (rank, output, source)."""

    name: str
    rows: int
    width: int = 4096
    out_features: tuple[int, ...] = (4096,)
    source_widths: tuple[int, ...] = ()
    paths: tuple[tuple[int, int, int], ...] = ((16, 0, -1),)
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    statistics: bool = False
    has_bias: bool = False
    is_delta: bool = False
    #: Whether float32 may be rounded to it (torch.backends.cuda.matmul.fp32_precision).
    tf32: bool = False


@dataclass
class Launch:
    """One launch: the kernel, what it is for, and everything that its build depends on."""

    kernel: Any
    role: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


_QKV = {"out_features": (4096, 1024, 1024), "paths": ((16, 0, -1), (16, 1, -1), (16, 2, -1))}
_SHORTCUTS = {"source_widths": (4096, 4096), "paths": ((16, 0, -1), (8, 0, 0), (8, 0, 1))}
#: What is compiled: every rule of the table for a GPU is met by one of these.
SCENARIOS = [
    Scenario("main", 8192, statistics=True),
    Scenario("main dropout", 8192, dropout_p=0.1),
    Scenario("main float16", 8192, dtype=torch.float16),
    *[Scenario("rows", rows) for rows in (16, 256, 2048)],
    *[Scenario("rows one output", rows, out_features=(1024,)) for rows in (8192,)],
    *[Scenario("rows dropout", rows, dropout_p=0.1) for rows in (16, 256, 2048)],
    *[Scenario("rank", rows, paths=((rank, 0, -1),)) for rows in (16, 256, 8192) for rank in (32, 64)],
    Scenario("rank few rows", 16, paths=((128, 0, -1),)),
    Scenario("group", 8192, **_QKV, has_bias=True),
    Scenario("group dropout", 8192, **_QKV, dropout_p=0.1, statistics=True),
    *[Scenario("group rank", 8192, 4096, (4096, 1024, 1024), paths=((rank, 0, -1), (rank, 1, -1), (rank, 2, -1)), dropout_p=0.1)
      for rank in (32, 64)],
    Scenario("shortcuts", 8192, **_SHORTCUTS),
    Scenario("shortcuts dropout", 8192, **_SHORTCUTS, dropout_p=0.1, statistics=True),
    Scenario("delta", 8192, **_SHORTCUTS, is_delta=True, statistics=True),
    Scenario("adapters", 8192, adapter_dtype=torch.bfloat16),
    Scenario("odd sizes", 8191, width=4090, out_features=(1001,), paths=((5, 0, -1),), dropout_p=0.1, statistics=True,
             has_bias=True),
    Scenario("odd rank", 8191, 4090, (1001,), paths=((40, 0, -1),), statistics=True),
    *[Scenario("float32", rows, dtype=torch.float32) for rows in (16, 256, 8192)],
    *[Scenario("float32 tf32", rows, dtype=torch.float32, tf32=True) for rows in (256, 8192)],
    Scenario("float32 rank", 8192, dtype=torch.float32, paths=((64, 0, -1),), dropout_p=0.1, statistics=True),
]


def launches(scenario: Scenario, arch: int) -> list[Launch]:
    """What a forward and a backward of the scenario launch on an architecture; nothing runs."""
    found: list[Launch] = []

    def record(kernel, role, grid, arguments, constants, options):
        found.append(Launch(kernel, role, scenario.dtype, grid, arguments, constants, options))

    def empty(*shape: int, dtype: torch.dtype = scenario.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(scenario.rows, scenario.width)
    sources = [empty(scenario.rows, width) for width in scenario.source_widths]
    widths = (*scenario.source_widths, scenario.width)
    ranks = [rank for rank, _, _ in scenario.paths]
    lora_A = [empty(rank, widths[source], dtype=scenario.adapter_dtype if scenario.dtype != torch.float32 else torch.float32)
              for rank, _, source in scenario.paths]
    lora_B = [empty(scenario.out_features[output], rank, dtype=a.dtype) for (rank, output, _), a in zip(scenario.paths, lora_A)]
    outs = [empty(scenario.rows, n) for n in scenario.out_features]
    if scenario.is_delta:
        bases: tuple = (outs,)
    else:
        biases = [empty(n if scenario.has_bias else 0) for n in scenario.out_features]
        bases = ([empty(n, scenario.width) for n in scenario.out_features], [], biases)
    flags = Flags.SAVE | (Flags.STATISTICS if scenario.statistics else Flags.NONE)
    rest = (sources, lora_A, lora_B, empty(len(ranks), dtype=torch.float32), empty(sum(ranks), dtype=torch.float32),
            empty(len(ranks), dtype=torch.int32), empty(1, dtype=torch.int64) if scenario.dropout_p else None,
            [output for _, output, _ in scenario.paths], [source for _, _, source in scenario.paths], scenario.dropout_p,
            int(flags))
    needs = (Needs.X | Needs.SOURCES | Needs.LORA_A | Needs.LORA_B
             | (Needs.STATISTICS if scenario.statistics else Needs.NONE))
    forward, backward = ((backend._lora_delta, backend._lora_delta_backward) if scenario.is_delta else
                         (backend._lora_linear, backend._lora_linear_backward))
    with intercepted(record, arch), _tf32(scenario.tf32):
        _, hidden, mask = forward(x, *bases, *rest)
        backward(outs, x, *bases, *rest, hidden, mask, int(needs))
    return found


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Target:
    """A stand-in for Triton's driver that names an architecture and has no device."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels per device: one device per architecture.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(arch: int) -> None:
    """Make Triton compile for an architecture from now on, whatever device there is."""
    triton.runtime.driver.set_active(_Target(arch))


def compiled(arch: int, scenarios: list[Scenario]) -> Iterator[dict[str, Any]]:
    """Compile what the scenarios launch on an architecture, each distinct build once, and report on each.

    Leaves Triton's driver replaced: to be run in a process of its own.
    """
    compile_for(arch)
    seen: set[str] = set()
    for scenario in scenarios:
        for launch in launches(scenario, arch):
            build = build_of(launch)
            key = build.metadata.hash
            if key not in seen:
                seen.add(key)
                yield report_on(arch, scenario, launch, build)


def build_of(launch: Launch) -> Any:
    """What Triton compiles for a launch, on its active target; nothing runs."""
    build = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **launch.options)
    return build.result() if hasattr(build, "result") else build


def report_on(arch: int, scenario: Scenario, launch: Launch, build: Any) -> dict[str, Any]:
    """What a build needs of the chip, as ``heterolora compile`` reports it."""
    config = {name: value for name, value in launch.constants.items() if name.isupper()}
    config |= {name: launch.options[name] for name in ("num_warps", "num_stages")}
    registers, stack = _resources(build.asm["cubin"])
    requires = (arch == 90 and launch.dtype.itemsize == 2 and launch.role in ("forward", "grad_x")
                and config["BLOCK_M"] >= 64 and config["num_warps"] >= 4)
    return {
        "kernel": launch.kernel.__name__, "arch": f"sm_{arch}", "dtype": str(launch.dtype).removeprefix("torch."),
        "config": config, "registers": registers, "stack_bytes": stack,
        "spills": _local_accesses(build.asm["cubin"]) if stack else 0, "shared_bytes": build.metadata.shared,
        "shared_limit": SHARED_LIMITS.get(arch, min(SHARED_LIMITS.values())),
        "uses_wgmma": "wgmma.mma_async" in build.asm["ptx"], "requires_wgmma": requires, "role": launch.role,
        "scenario": scenario.name, "rows": scenario.rows,
    }


def ptxas_version(arch: int) -> str:
    """Release of the assembler that Triton uses for an architecture: registers and spills depend on it."""
    name = "ptxas-blackwell" if arch >= 100 and (_BIN / "ptxas-blackwell").exists() else "ptxas"
    text = subprocess.run([_BIN / name, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_BIN / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    text = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage named no registers: {text!r}")
    return int(found[1]), int(found[2])


def _local_accesses(cubin: bytes) -> int:
    """Loads and stores of local memory in the machine code: what a spill is."""
    return len(re.findall(r"\b(?:STL|LDL)\b", _cuobjdump("-sass", cubin)))
