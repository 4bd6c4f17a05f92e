"""Errors raised at any line of the package, and everything about a model that must be as before after them."""

from __future__ import annotations

import ast
import functools
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from families import snapshot
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import heterolora_kernels as hlk
from heterolora_kernels import backends
from heterolora_kernels.freezing import remove_orphans

PACKAGE = str(Path(hlk.__file__).parent)


@functools.cache
def _with_lines(file: str) -> frozenset[int]:
    return frozenset(node.lineno for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.With))


class Trace:
    """Notes the lines of the package that run in the block, and raises ``error`` before the one of number ``at``.

    Not where a ``with`` block ends: a tracer sees that line once more, while Python looks for signals at calls and loops, and
    never between the end of a block and the call of ``__exit__``.
    """

    def __init__(self, at: int | None = None, error: BaseException | None = None):
        self.at, self.error, self.lines, self._seen = at, error, [], set()

    def _enter(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            ends = line in self._seen and line[1] in _with_lines(line[0])
            self._seen.add(line)
            self.lines.append(line)
            if self.at is not None and len(self.lines) > self.at and not ends:
                raise self.error
        return self._line

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *exc):
        sys.settrace(self._before)


def points(lines: list[tuple[str, int]]) -> list[int]:
    """Where to fail: the first and the last time that each line runs."""
    first, last = {}, {}
    for index, line in enumerate(lines):
        first.setdefault(line, index)
        last[line] = index
    return sorted({*first.values(), *last.values()})


def _registries() -> list[dict]:
    return [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]


def _new_hooks(before: list[set], model: nn.Module) -> bool:
    """Whether optimizers have hooks that they had not; the model's own may have been made anew."""
    state = model.__dict__.get("_heterolora_state")
    own = set() if state is None else {handle.id for handle in state.step_hooks._handles}

    def new() -> bool:
        return any(set(registry) - ids - own for registry, ids in zip(_registries(), before))

    if new():
        gc.collect()  # those of models that nobody holds any more do nothing
        remove_orphans()
    return new()


def state_of_everything(model: nn.Module, *others) -> dict:
    """Types, attributes, hooks, flags and gradients by module, tensors bit for bit, torch's random state, optimizers' hooks.

    ``others``: objects whose ``state_dict()`` belongs to it.
    """
    found = {"modules": snapshot(model), "rng": torch.get_rng_state(), "python": random.getstate(),
             "others": [other.state_dict() for other in others], "backend": list(backends._chosen)}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    found["tensors"] = {name: (id(tensor), tensor.detach().clone(), tensor.requires_grad,
                               None if tensor.grad is None else tensor.grad.clone()) for name, tensor in tensors.items()}
    state = model.__dict__.get("_heterolora_state")
    if state is not None:
        found["hooks"] = [handle.id in registry for handle, registry in zip(state.step_hooks._handles, _registries())]
        derived = [module._heterolora.derived for module in state.linears]
        found["patch"] = {
            "derived": [(d.gate.clone(), d.active.clone(), d.scaling.clone(), d.everything_on) for d in derived],
            "layers": [vars(layer._heterolora._running.now()) for layer in state.layers],
            "ledger": state.switches.ledger.collecting, "enabled": state.switches.enabled, "driven": state.step_hooks.driven,
            "steps": state.step_hooks.steps, "resets": state.step_hooks.pending_resets(), "overrides": list(state.overrides),
            "observers": len(state.step_hooks.observers)}
    return found


def difference(one, other, where: str = "") -> str | None:
    """Where two such states differ, or None."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))
        return None if same else where
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        return next(filter(None, (difference(one[key], other[key], f"{where}.{key}") for key in one)), None)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)}"
        return next(filter(None, (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other)))), None)
    return None if one is other or one == other else where


def fail_everywhere(make: Callable[[], tuple], action: Callable, share: float = 1.0,
                    is_done: Callable[..., bool] = lambda *subjects: False) -> tuple[int, list[str]]:
    """Run ``action(*make())`` with an error at every line, an interrupt and a lack of memory in turn.

    Args:
        make: fresh subjects, the same each time: a model, and objects with a ``state_dict()``.
        share: of the points, drawn at random.
        is_done: whether subjects that are not as before are as after the action, where that is allowed.

    Returns:
        How often the action failed, and the places after which something had changed.
    """
    subjects = make()
    with Trace() as trace:
        action(*subjects)
    where, failed, wrong = points(trace.lines), 0, []
    if share < 1:
        where = sorted(random.Random(0).sample(where, int(share * len(where))))
    for number, at in enumerate(where):
        subjects = make()
        before, hooks = state_of_everything(*subjects), [set(registry) for registry in _registries()]
        fault = Trace(at, (KeyboardInterrupt, MemoryError)[number % 2]("on purpose"))
        try:
            with fault:
                action(*subjects)
            continue  # what failed can be done without
        except (KeyboardInterrupt, MemoryError):
            fault.error = None  # its traceback holds what was made
        failed += 1
        found = difference(before, state_of_everything(*subjects))
        if found is None and _new_hooks(hooks, subjects[0]):
            found = "hooks of optimizers"
        if found is not None and not is_done(*subjects):
            file, line = fault.lines[-1]
            wrong.append(f"{Path(file).name}:{line} (event {len(fault.lines)} of {len(trace.lines)}): {found}")
    return failed, wrong
