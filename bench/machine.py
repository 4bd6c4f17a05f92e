"""The machine and the code that a measurement belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from heterolora_kernels.cli.info import machine

_PACKAGES = ("heterolora-kernels", "python", "torch", "peft", "transformers")


def describe() -> dict:
    """Processor, instruction set of the CPU backend, threads, versions and commit."""
    found = machine()
    return {"device": "cpu", "processor": found["processor"], "model": _model(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "isa": cpu_isa(), "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "system": platform.system(), "versions": {name: found["versions"].get(name) for name in _PACKAGES},
            "commit": commit()}


def cpu_isa() -> str | None:
    """What the CPU backend runs on; None where there is no such backend."""
    from heterolora_kernels.backends import available_backends, resolve

    if "cpu" not in available_backends():
        return None
    resolve(torch.device("cpu"), "cpu")
    return torch.ops.heterolora_kernels.cpu_isa()


def _model() -> str:
    """Vendor, family and model: the name alone often hides the generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return ", ".join(f"{label} {fields[key]}" if label else fields[key] for label, key in
                     (("", "vendor_id"), ("family", "cpu family"), ("model", "model")) if key in fields)


def commit() -> str | None:
    """Of the checkout; ``-changed`` where files differ from it."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # New results do not change what was measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
