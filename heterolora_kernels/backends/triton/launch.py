"""How kernels are launched: on the device of their tensors, or recorded for a compilation ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton

from heterolora_kernels import _env

#: ``interceptor(kernel, grid, arguments, options)``: takes a launch instead of the device; one at most.
_interceptor: list[Callable[..., None] | None] = [None]
#: The architecture that is compiled for, where that is not the one of the device.
_compiled_arch: list[int | None] = [None]


def launch(kernel: Any, role: str, grid: tuple[int, ...], device: torch.device, config: dict[str, Any], *arguments: Any,
           **constants: Any) -> None:
    """Launch ``kernel`` with ``arguments``, constexpr ``constants`` and a configuration; an empty grid launches nothing.

    Args:
        role: what the launch is for; the name that the report of ``heterolora compile`` gives it.
        config: of the table; its upper-case entries that the kernel takes become constants.
    """
    if 0 in grid:
        return
    taken = {name: value for name, value in config.items() if name in kernel.arg_names}
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"], "enable_fp_fusion": True}
    if _interceptor[0] is not None:
        _interceptor[0](kernel, role, grid, arguments, {**constants, **taken}, options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if constants.get("TMA"):
            triton.set_allocator(_scratch)
        kernel[grid](*arguments, **constants, **taken, **options)


@contextmanager
def intercepted(interceptor: Callable[..., None], arch: int | None = None) -> Iterator[None]:
    """Hand every launch in the block to ``interceptor(kernel, role, grid, arguments, constants, options)``.

    Args:
        arch: choose configurations for this architecture (80, 90, ...).
    """
    previous = _interceptor[0], _compiled_arch[0]
    _interceptor[0], _compiled_arch[0] = interceptor, arch
    try:
        yield
    finally:
        _interceptor[0], _compiled_arch[0] = previous


def architecture(device: torch.device) -> int | str:
    """Key of the configuration table: 80, 90, ... or "interpreter"."""
    if _compiled_arch[0] is not None:
        return _compiled_arch[0]
    if _env.triton_interprets():
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Programs of a persistent launch: one per multiprocessor; few where there is none, so that each takes several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor descriptors that a kernel makes, from torch's allocator."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
