"""Putting things back: after a failure, or in any case. An interrupt counts as a failure, wherever it comes.

``undo`` is a function that may be called twice: it is called once more if an interrupt comes while it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Undo = Callable[[], None]
Function = TypeVar("Function", bound=Callable)


@contextmanager
def untraced() -> Iterator[None]:
    """Let no mode and no tracer that is active (torch.export, FakeTensorMode, torch.jit.trace) see what runs in the block."""
    # As torch does it for its own bookkeeping; nothing public does.
    from torch.utils._python_dispatch import _disable_current_modes

    tracing = torch._C._get_tracing_state()
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        torch._C._set_tracing_state(None)
        try:
            yield
        finally:
            torch._C._set_tracing_state(tracing)


def keeps_modes(function: Function) -> Function:
    """Decorator: whatever interrupts the function, autograd records afterwards as it did before.

    ``torch.no_grad`` switches before its block begins, and an interrupt in between leaves it off for good.
    """
    @functools.wraps(function)
    def kept(*args, **kwargs):
        before = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _end_inference_modes(error)
            torch._C._set_grad_enabled(before)
            raise
    return kept


def _end_inference_modes(error: BaseException) -> None:
    """End those that an interrupt caught while they were entered: the traceback would hold them, and their end sets autograd
    too."""
    trace = error.__traceback__
    while trace is not None:
        mode = trace.tb_frame.f_locals.get("self")
        if isinstance(mode, torch.inference_mode):
            mode.__dict__.pop("_inference_mode_context", None)
        trace = trace.tb_next


def _run(undo: Undo) -> None:
    """Call ``undo``, which may be interrupted too."""
    try:
        undo()
    except BaseException:
        undo()
        raise


@contextmanager
def undone_on_failure(undo: Undo) -> Iterator[None]:
    """Call ``undo`` if the block fails."""
    try:
        yield
    except BaseException:
        _run(undo)
        raise


@contextmanager
def put_back(undo: Undo) -> Iterator[None]:
    """Call ``undo`` when the block ends, in whatever way."""
    try:
        yield
        undo()
    except BaseException:
        _run(undo)
        raise


def values_of(tensors: Iterable[Tensor]) -> Undo:
    """Gives the tensors the values back that they have now."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def undo() -> None:
        for tensor, values in before:
            tensor.copy_(values)
    return undo


def structure_of(model: nn.Module) -> Undo:
    """Gives every module of the model its class, attributes, children, hooks and tensors back, and every parameter its flag.

    Values are not kept.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(module, type(module), dict(module.__dict__),
             [(table, dict(table)) for table in module.__dict__.values() if isinstance(table, dict)])
            for module in model.modules()]
    # compressed-tensors keeps tensors in mappings of its own, which move what they give out.
    others = [(table, set(table)) for module in model.modules() for table in (module._parameters, module._buffers)
              if not isinstance(table, dict)]

    def undo() -> None:
        for module, cls, attributes, tables in kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, entries in tables:
                table.clear()
                table.update(entries)
        for table, names in others:
            for name in set(table) - names:
                del table[name]
        for parameter, flag in flags:
            parameter.requires_grad = flag
    return undo
