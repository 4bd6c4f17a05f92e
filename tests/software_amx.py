"""Run pytest on a processor that has the tile instructions of AMX bf16 in software: ``python tests/software_amx.py [pytest's arguments]``.

``software_amx.cpp`` executes them; this file compiles it, and is the plugin that installs it before the tests are collected. The package then
finds AMX by itself, takes it, and runs the machine code that it ships. What a processor would refuse ends the process by SIGILL.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COUNTS = ("configures", "releases", "zeros", "loads", "stores", "dots", "permissions")
library: ctypes.CDLL | None = None


def compiler() -> str | None:
    """The C++ compiler of the system."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def compile_to(path: Path) -> None:
    """Compile the software processor into a shared library."""
    command = [compiler(), "-std=c++17", "-O2", "-ftree-vectorize", "-mavx512f", "-mfma", "-Wall", "-Werror", "-shared", "-fPIC",
               f"-I{HERE.parent / 'csrc'}", "-o", str(path), str(HERE / "software_amx.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"software_amx.cpp does not compile:\n{done.stderr}")


def run(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Pytest with the plugin, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "software_amx", *arguments]
    paths = [str(HERE), os.environ.get("PYTHONPATH")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path))
    return subprocess.run(command, cwd=HERE.parent, env=env, timeout=timeout, capture_output=timeout is not None, text=True)


def counts() -> dict[str, int]:
    """How many instructions of each kind were executed since the process began."""
    return {name: library.software_amx_count(i) for i, name in enumerate(COUNTS)}


# Behind pytest's own handler of SIGILL.
@pytest.hookimpl(trylast=True)
def pytest_configure(config) -> None:
    """Install the software processor, and have the package look for AMX while it answers for the processor."""
    global library
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "software_amx.so"
        compile_to(path)
        library = ctypes.CDLL(str(path))
    library.software_amx_count.restype = ctypes.c_uint64
    library.software_amx_fault.restype = library.software_amx_refusal.restype = ctypes.c_char_p
    library.software_amx_install()

    import torch

    import heterolora_kernels.backends.cpu  # noqa: F401 - registers the ops

    look = torch.ops.heterolora_kernels.cpu_isa_missing.default
    library.software_amx_step(1)
    missing = look("amx_bf16")
    library.software_amx_step(0)
    if missing:
        raise RuntimeError(f"AMX was not found: {missing}")


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]).returncode)
