"""Build entry point. Everything else is declared in pyproject.toml.

The extension ``heterolora_kernels._C`` is built against the torch that is installed, so pip has to see it:
``pip install --no-build-isolation .``. Where that cannot be done (no torch, no compiler, Windows), the package is installed
without it and computes with plain PyTorch. HETEROLORA_BUILD=1 makes a failed build an error, HETEROLORA_BUILD=0 leaves the
extension out. HETEROLORA_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ASKED = os.environ.get("HETEROLORA_BUILD", "auto")


def missing() -> str | None:
    """Why the extension cannot be built here; None where it can be tried."""
    if ASKED == "0":
        return "HETEROLORA_BUILD=0"
    if sys.platform == "win32":
        return "it has not been built on Windows yet"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not visible to the build: pip install --no-build-isolation"
    return None


def extension() -> dict:
    """setup()'s arguments for the extension."""
    from setuptools.errors import BaseError, CompileError
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """A build that may fail unless it was asked for."""

        def run(self):
            if ASKED == "1":
                return super().run()
            try:
                super().run()
            except (BaseError, CompileError, OSError, RuntimeError) as error:
                self.extensions = []
                report(str(error).splitlines()[0])

    # The kernels choose their instruction set at run time: nothing here may depend on the processor that builds.
    flags = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    link = ["-fopenmp"]
    if os.environ.get("HETEROLORA_SANITIZE") == "1":
        sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        flags, link = ["-O1", *flags[1:], *sanitizers, "-fno-sanitize-recover=undefined"], [*link, *sanitizers]
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    depends = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    kernels = CppExtension("heterolora_kernels._C", sources, depends=depends, include_dirs=[str(Path("csrc").absolute())],
                           extra_compile_args=flags, extra_link_args=link)
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": OptionalBuild},
    }


def report(reason: str) -> None:
    """Tell that the package comes without compiled kernels."""
    print(f"heterolora_kernels: installed without its compiled kernels ({reason}). It works, at the speed of plain PyTorch.",
          file=sys.stderr)


reason = missing()
if reason is not None and ASKED == "1":
    sys.exit(f"heterolora_kernels: HETEROLORA_BUILD=1, but {reason}")
if reason is not None:
    report(reason)
setup(**({} if reason is not None else extension()))
