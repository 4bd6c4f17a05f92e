"""Run pytest where the tile instructions of AMX bf16 are software: ``python tests/software_amx.py [arguments]``.

``software_amx.cpp`` executes them; this file compiles it, and is the plugin that installs it before the tests are
collected. The package then finds AMX by itself, takes it, and runs the machine code that it ships. What a processor would
refuse ends the process by SIGILL. With it goes ``guarded_memory.cpp``: memory behind which no byte can be touched, and
allocations that fail.
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
COUNTS = ("configures", "releases", "zeros", "loads", "stores", "dots", "permissions", "splits")
library: ctypes.CDLL | None = None


def missing() -> str | None:
    """Why this cannot be done here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "the tiles in software are written for Linux"
    flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    if "amx_bf16" in flags:
        return "the processor has AMX bf16 itself"
    if "avx512_bf16" not in flags:
        return "the processor has no AVX-512 bf16, which the kernels of AMX use beside its tiles"
    if _compiler() is None:
        return "there is no C++ compiler"

    import torch

    from heterolora_kernels.backends import unavailable_backends

    if reason := unavailable_backends().get("cpu"):
        return reason
    reason = torch.ops.heterolora_kernels.cpu_isa_missing("amx_bf16")
    return reason if "compiler" in reason else None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def run(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Pytest with the plugin, in a process of its own; its output is captured where there is a timeout."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "software_amx.so"
        flags = ["-std=c++17", "-O2", "-ftree-vectorize", "-mavx512f", "-mfma", "-Wall", "-Werror", "-shared", "-fPIC"]
        sources = [str(HERE / name) for name in ("software_amx.cpp", "guarded_memory.cpp")]
        done = subprocess.run([_compiler(), *flags, f"-I{HERE.parent / 'csrc'}", "-o", str(path), *sources],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the tiles in software do not compile:\n{done.stderr}")
        places = [str(HERE), os.environ.get("PYTHONPATH")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place), "LD_PRELOAD": str(path)}
        return subprocess.run([sys.executable, "-m", "pytest", "-p", "software_amx", *arguments], cwd=HERE.parent, env=env,
                              timeout=timeout, capture_output=timeout is not None, text=True)


def counts() -> dict[str, int]:
    """How many instructions of each kind were executed since the process began."""
    return {name: library.software_amx_count(i) for i, name in enumerate(COUNTS)}


# Behind pytest's own handler of SIGILL.
@pytest.hookimpl(trylast=True)
def pytest_configure(config) -> None:
    """Install the software processor, and have the package look for AMX while it answers for the processor."""
    global library
    library = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    library.software_amx_count.restype = library.guarded_memory.restype = ctypes.c_uint64
    library.software_amx_fault.restype = library.software_amx_refusal.restype = ctypes.c_char_p
    library.guarded_memory_fail.argtypes, library.guarded_memory_fail.restype = [ctypes.c_int64], ctypes.c_int64
    library.software_amx_install()

    import torch

    import heterolora_kernels.backends.cpu  # noqa: F401 - registers the ops

    look = torch.ops.heterolora_kernels.cpu_isa_missing.default
    library.software_amx_step(1)
    reason = look("amx_bf16")
    library.software_amx_step(0)
    if reason:
        raise RuntimeError(f"AMX was not found: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Every test leaves all threads' tiles released."""
    result = yield
    assert library.software_amx_configured() == 0, "a thread's tiles are still configured"
    return result


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"software_amx.py: {reason}")
    sys.exit(run(*sys.argv[1:]).returncode)
