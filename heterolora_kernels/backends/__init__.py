"""Registry of backends and the choice among them.

A backend is a set of four ops (see :mod:`heterolora_kernels.ops.schema`). It is resolved once, in the forward call, and
is part of the op's name from then on; so backward passes, recomputes and compiled graphs cannot pick another one.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from heterolora_kernels import _env
from heterolora_kernels.undo import put_back, untraced


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: suffix of its ops.
        module: imported at the first use; importing it defines and registers the ops.
        device_types: ``torch.device.type`` of the tensors it takes; empty for any.
        why_unavailable: returns None where it can run, else the reason in one line.
        dtypes: those of x; empty for any.
        on_request: further device types, taken where the backend is asked for by name and never chosen for.
        remark: what a user should know of its state, in a few words; shown by ``heterolora info`` wherever it runs or not.
    """

    name: str
    module: str
    device_types: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = lambda: None
    dtypes: tuple[torch.dtype, ...] = ()
    on_request: Callable[[], tuple[str, ...]] = lambda: ()
    remark: str = ""

    def takes(self, device_type: str, dtype: torch.dtype | None = None) -> bool:
        """Whether it can compute on a kind of device, and with a dtype of x (None: any)."""
        return ((not self.device_types or device_type in self.device_types)
                and (dtype is None or not self.dtypes or dtype in self.dtypes))


_backends: dict[str, Backend] = {}
_loaded: set[str] = set()
_chosen: list[str | None] = [None]
#: What :func:`resolve` found for a name (None: the automatic choice), since every forward call asks.
_resolved: dict[tuple[str | None, torch.device, torch.dtype | None], str] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend. Those registered later are preferred where several take a device.

    Args:
        backend: its description; the module is imported at the first use.
    """
    _backends[backend.name] = backend
    _resolved.clear()


def available_backends() -> list[str]:
    """The backends that can run here; see :func:`unavailable_backends` for the others.

    Returns:
        Their names, the preferred first.
    """
    return [name for name, backend in reversed(_backends.items()) if backend.why_unavailable() is None]


def unavailable_backends() -> dict[str, str]:
    """The backends that cannot run here.

    Returns:
        ``{name: reason in one line}``.
    """
    reasons = {name: backend.why_unavailable() for name, backend in _backends.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def backend_remarks() -> dict[str, str]:
    """``{name: remark}`` of the backends about which something is to be known, those that cannot run here included."""
    return {name: backend.remark for name, backend in _backends.items() if backend.remark}


class use_backend:  # noqa: N801 - reads as a function, in both uses
    """Compute with one backend: for the process when called, for a block when used as a context manager.

    Args:
        name: one of :func:`available_backends`, or None for the automatic choice.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says why.
    """

    def __init__(self, name: str | None):
        if name is not None:
            _require(name)
        self._name = name
        self._previous = _chosen[0]
        _chosen[0] = name

    def __enter__(self) -> None:
        _chosen[0] = self._name

    def __exit__(self, *exception) -> None:
        _chosen[0] = self._previous


@contextmanager
def computing_with(name: str) -> Iterator[None]:
    """:class:`use_backend` for a block, of which nothing stays if an interrupt comes before the block begins."""
    before = _chosen[0]
    with put_back(lambda: _chosen.__setitem__(0, before)):
        use_backend(name)
        yield


def _require(name: str) -> Backend:
    if name not in _backends:
        raise ValueError(f"backend must be one of {sorted(_backends)}, got {name!r}")
    reason = _backends[name].why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
    return _backends[name]


def resolve(device: torch.device, backend: str | None = None, dtype: torch.dtype | None = None) -> str:
    """The backend of a forward call on ``device``: the one asked for, the chosen one, else the first that takes it.

    Args:
        dtype: of x; None asks for none in particular. A chosen backend that does not take it raises a TypeError.
    """
    return _resolve(backend if backend is not None else _chosen[0], device, dtype)


@torch.compiler.assume_constant_result
def _resolve(name: str | None, device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend, loaded; under torch.compile while tracing, since neither a probe nor an import can be traced."""
    key = (name, device, dtype)
    found = _resolved.get(key)
    if found is None:
        found = _automatic(device.type, dtype) if name is None else _named(name, device, dtype)
        _load(found)
        _resolved[key] = found
    return found


def _named(name: str, device: torch.device, dtype: torch.dtype | None) -> str:
    found = _require(name)
    is_requested = device.type in found.on_request()
    if not is_requested and not found.takes(device.type):
        raise RuntimeError(f"backend {name!r} takes tensors on {list(found.device_types)}, got {device}")
    if not found.takes(found.device_types[0] if is_requested else device.type, dtype):
        raise TypeError(f"backend {name!r} takes x of {[str(d) for d in found.dtypes]}, got {dtype}")
    return name


def _automatic(device_type: str, dtype: torch.dtype | None) -> str:
    return next(b.name for b in reversed(_backends.values()) if b.takes(device_type, dtype) and b.why_unavailable() is None)


@torch.compiler.assume_constant_result
def _load(name: str) -> bool:
    """Import the backend's module, once; under torch.compile while tracing, since an import cannot be traced."""
    if name not in _loaded:
        with untraced():
            importlib.import_module(_backends[name].module)
        _loaded.add(name)
    return True


def extra(name: str, function: str) -> Callable | None:
    """What a backend's module offers beside its ops.

    ``packed_bytes(weight, needs_grad) -> int`` and ``pack_weight(weight, needs_grad) -> [forward, grad_x]``: packed copies of
    a frozen weight; 0 bytes where packing it does not help. ``row_statistics(lora_A, lora_B, grad_A, grad_B) -> float32 [R,
    columns]``: the ledger's rows of accumulated gradients, all paths in one pass.

    Args:
        name: of the backend.
        function: one of those.

    Returns:
        The function, or None where the module has none of its own.
    """
    _load(name)
    module = sys.modules[_backends[name].module]
    found = getattr(module, function, None)
    # Its own: what the reference imports to compute with is not offered.
    return found if getattr(found, "__module__", None) == module.__name__ else None


@functools.cache
def _cpu_missing() -> str | None:
    """Why the compiled extension cannot be used; loads it, so it is asked when a backend is needed and not before."""
    try:
        importlib.import_module("heterolora_kernels._C")
    except ModuleNotFoundError:
        return ("the package was installed without its compiled kernels; with a C++ compiler at hand, in a checkout: "
                "pip install --no-build-isolation .")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        return f"heterolora_kernels._C does not load with torch {torch.__version__} (build it again): {reason}"
    return None


register_backend(Backend("reference", "heterolora_kernels.backends.reference"))
register_backend(Backend("cpu", "heterolora_kernels.backends.cpu", ("cpu",), _cpu_missing,
                         (torch.float32, torch.bfloat16, torch.float16)))
register_backend(Backend("triton", "heterolora_kernels.backends.triton", ("cuda",), _env.triton_missing,
                         (torch.float32, torch.bfloat16, torch.float16), lambda: ("cpu",) if _env.triton_interprets() else (),
                         remark="not yet measured on hardware"))
