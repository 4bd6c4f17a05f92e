"""Environment variables and probes of the machine, read when asked and never at import."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch


def cache_dir() -> Path:
    """Folder for files that commands fetch: ``HETEROLORA_CACHE``, else ``~/.cache/heterolora_kernels``."""
    chosen = os.environ.get("HETEROLORA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "heterolora_kernels"


def cpu_isa() -> str | None:
    """Instruction set that the CPU backend must use: ``HETEROLORA_CPU_ISA``; None leaves the choice to it."""
    return os.environ.get("HETEROLORA_CPU_ISA") or None


def triton_interprets() -> bool:
    """Whether ``TRITON_INTERPRET`` asks Triton to run kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_not_installed() -> str | None:
    """Why Triton kernels cannot even be compiled here, in one line; None where they can."""
    return None if importlib.util.find_spec("triton") else "triton is not installed; on Linux: pip install triton"


def triton_missing() -> str | None:
    """Why Triton kernels cannot run here, in one line; None where they can."""
    if reason := triton_not_installed():
        return reason
    if triton_interprets():
        return None
    if torch.version.hip is not None:
        return "its kernels are made for CUDA, and torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0 or later, the device has {major}.{minor}"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds and does not use is free for it.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [_system_memory(), _container_memory()]
    return min((limit for limit in limits if limit is not None), default=None)


def _system_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def how_to_install(extra: str) -> str:
    """What an error says where a library of an extra is missing."""
    return f"in a checkout: pip install --no-build-isolation '.[{extra}]'"


def _container_memory() -> int | None:
    """What a control group (version 2) leaves; cached files that it can drop count as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used + int(statistics.get("inactive_file", 0)), 0)
