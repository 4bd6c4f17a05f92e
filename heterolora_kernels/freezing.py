"""What optimizers may not touch: inactive paths, and inactive rows of partly active ones.

Autograd may deliver zeros where a path is inactive, and weight decay or momentum would then move it. The hooks are torch's
global ones around ``Optimizer.step``, filtered to the model's parameters: they work for any optimizer, built before or
after patching, and go with ``remove_heterolora``. Whole paths get ``.grad = None`` before the step; inactive rows are put
back after it, weights and state tensors of the parameter's shape alike.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from heterolora_kernels.allocation import get_allocator
from heterolora_kernels.distributed import count_dtensors, local_part
from heterolora_kernels.layers import Path

#: Optimizer steps after which a dynamic search that nobody drives is reported.
_STEPS_BEFORE_WARNING = 50


def _closure_of(args: tuple, kwargs: dict):
    if kwargs.get("closure") is not None:
        return kwargs["closure"]
    return next((value for value in args[1:] if callable(value)), None)


def _paths_of(optimizer: Optimizer, state) -> list[Path]:
    """The paths whose parameters the optimizer holds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held, paths = set(map(id, parameters)), list(state.paths.values())
    if count_dtensors(parameters) and not all([id(path.lora_A) in held and id(path.lora_B) in held for path in paths]):
        # An evaluation since the backward has left parameters gathered, in the places of those that are stepped.
        state.reshard()
    return [path for path in paths if id(path.lora_A) in held or id(path.lora_B) in held]


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor)[0]


def _local_index(parameter: Tensor, dim: int, rows: Sequence[bool]) -> Tensor:
    """Indices, in this process's part of a parameter and of its state, of those of the path's rows that ``rows`` says."""
    local, where = local_part(parameter)
    return torch.tensor([j for j, flag in enumerate(rows[where[dim]]) if flag], dtype=torch.int64, device=local.device)


def _elementwise_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """State tensors of the parameter's shape, by name."""
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


def _rows_of(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """The parameter and its elementwise state."""
    return [parameter, *_elementwise_state(optimizer, parameter).values()]


def _first_value(optimizer: Optimizer, name: str) -> float:
    """What a state tensor is filled with before the first step: 0, but for Adagrad's sum."""
    return optimizer.defaults.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0


#: Optimizers whose step mixes the elements of a parameter, by class name: what a closed row holds would move open ones. Of
#: torch, transformers, bitsandbytes (state in blocks), torchao and what is common beside them; other names are judged by the
#: shapes of their state.
_MIXING = frozenset((
    "LBFGS", "Muon", "Adafactor", "Shampoo", "DistributedShampoo", "SOAP", "LAMB", "Lamb", "LARS", "CAME", "GaLoreAdamW",
    "GaLoreAdafactor", "ApolloAdamW", "AdamMini", "Adam_mini", "SM3", "AdEMAMix8bit", "PagedAdEMAMix8bit"))


def _is_mixing(optimizer: object) -> bool:
    # accelerate and others wrap the optimizer that steps.
    inner = getattr(optimizer, "optimizer", optimizer)
    return any(cls.__name__ in _MIXING or cls.__name__.endswith(("8bit", "4bit", "Fp8")) for cls in type(inner).__mro__)


def check_elementwise(optimizer: object, what: str) -> None:
    """Refuse an optimizer whose step or state is not elementwise, for ``what`` freezes rows of a parameter.

    Raises:
        ValueError: names the optimizer.
    """
    if _is_mixing(optimizer):
        raise ValueError(
            f"optimizer: {type(getattr(optimizer, 'optimizer', optimizer)).__name__} mixes the elements of a parameter (in its "
            f"state or its update), so the inactive rows of partly active paths, which {what} needs, cannot be frozen; use one "
            "that works elementwise (SGD, Adam, AdamW, RMSprop, Adagrad, Lion), or ranks='binary'")


def _check_state(optimizer: Optimizer, path: Path) -> None:
    """The same for optimizers of unknown name: state that is neither of the parameter's shape nor one number."""
    for parameter in (path.lora_A, path.lora_B):
        for name, value in optimizer.state.get(parameter, {}).items():
            is_row_wise = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
            if isinstance(value, Tensor) and value.numel() > 1 and not is_row_wise:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps state {name!r} ({value.dtype}, {list(value.shape)}) for a "
                    f"parameter of shape {list(parameter.shape)}: it is not elementwise, so the inactive rows of the partly "
                    f"active path {path.name!r} cannot be frozen; use an elementwise optimizer, or ranks='binary'")


#: Packages whose optimizers leave a parameter without a gradient alone.
_KNOWN = ("torch.", "transformers.", "bitsandbytes.", "torchao.", "apex.", "deepspeed.", "peft.", "accelerate.",
          "torch_optimizer.")


def _leaves_alone(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of a known package: another may average weights, swap or project them, with or without
    gradients."""
    return type(optimizer).__module__.startswith(_KNOWN)


@torch.no_grad()
def _complete_state(optimizer: Optimizer, state_dict: dict) -> None:
    """Enter a first state for parameters that have none, paths that were never on: torch.distributed.checkpoint loads no other.

    A hook of an optimizer of sharded parameters. Moments of zero at step 0 are what a first step would begin with.
    """
    states = state_dict["state"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    known = next((number for number in numbers if states.get(number)), None)
    if known is None:
        return
    like = held[numbers.index(known)]
    for number, parameter in zip(numbers, held):
        if states.get(number) or not parameter.requires_grad:
            continue
        states[number] = {
            name: torch.full_like(parameter, _first_value(optimizer, name)) if isinstance(value, Tensor)
            and value.shape == like.shape
            else torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in states[known].items()}


@dataclass
class _Kept:
    """What is put back after a step."""

    #: (parameter, dimension of its rows, local indices of the inactive ones, {id of tensor: (tensor, their values)})
    rows: list[tuple[Tensor, int, Tensor, dict[int, tuple[Tensor, Tensor]]]] = field(default_factory=list)
    #: (local part of a parameter of a path that is off, its values)
    whole: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class StepHooks:
    """The hooks of one patched model.

    Attributes:
        observers: objects with ``before_step(optimizer)``, held weakly.
        driven: whether a search has been stepped (static: started).
        steps: optimizer steps that held adapters.
    """

    def __init__(self) -> None:
        self.observers: weakref.WeakSet = weakref.WeakSet()
        self.driven = False
        self._handles: list = []
        weakref.finalize(self, _orphans.extend, self._handles).atexit = False
        #: What each running step puts back, by optimizer: one may step another inside.
        self._saved: dict[int, _Kept] = {}
        self._taken: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        #: Whose state dicts name every parameter.
        self._completed: weakref.WeakSet = weakref.WeakSet()
        #: ``{parameter: rows}`` whose optimizer state starts anew at the next step.
        self._resets: dict[str, list[bool]] = {}
        self.steps = 0

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def register(self, state_ref: weakref.ref) -> None:
        """Begin. ``state_ref`` leads to the object with ``paths``, ``config`` and ``reshard()``; the hooks end with it."""
        hooks = weakref.ref(self)

        def before(optimizer, args, kwargs):
            state, own = state_ref(), hooks()
            if state is not None and own is not None:
                return own._before(state, optimizer, args, kwargs)
            return None

        def after(optimizer, args, kwargs):
            state, own = state_ref(), hooks()
            if state is not None and own is not None:
                own._after(state, optimizer)

        remove_orphans()
        self._handles.append(register_optimizer_step_pre_hook(before))
        self._handles.append(register_optimizer_step_post_hook(after))

    def remove(self) -> None:
        """End."""
        _remove_all(self._handles)

    def reset_rows(self, path: Path, rows: Sequence[bool]) -> None:
        """Let the optimizer state of these rows of a path start anew when its parameters are next stepped."""
        if any(rows):
            for leaf in ("lora_A", "lora_B"):
                name = f"{path.name}.{leaf}"
                self._resets[name] = [bool(a or b) for a, b in zip(self._resets.get(name, [False] * path.r), rows)]

    def pending_resets(self) -> dict[str, list[bool]]:
        """What :meth:`reset_rows` was told since the last step, ``{parameter: rows}``."""
        return {name: list(rows) for name, rows in self._resets.items()}

    def set_pending_resets(self, resets: Mapping[str, Sequence[bool]]) -> None:
        """Go on with :meth:`pending_resets` of another run."""
        self._resets = {name: list(rows) for name, rows in resets.items()}

    @torch.no_grad()
    def _reset(self, optimizer: Optimizer, paths: Sequence[Path]) -> None:
        """Carry out what is pending of these paths, for those of their parameters that the optimizer holds.

        Rows forget their moments; a path that was off as a whole everything, the count of steps included.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, (leaf, dim) in product(paths, (("lora_A", 0), ("lora_B", 1))):
            name, parameter = f"{path.name}.{leaf}", getattr(path, leaf)
            if name not in self._resets or id(parameter) not in held:
                continue
            rows = self._resets.pop(name)
            # Its rows that stay off lose their state too, which they would when they are switched on.
            whole = all(rows[j] for j, on in enumerate(path.active_rows()) if on)
            state = optimizer.state.get(parameter, {})
            # Adagrad makes its state when it is built, in some versions: it is not made again.
            if whole and "sum" not in state:
                optimizer.state.pop(parameter, None)
                continue
            index = _local_index(parameter, dim, rows)
            for key, tensor in _elementwise_state(optimizer, parameter).items():
                value = _first_value(optimizer, key)
                _local(tensor).fill_(value) if whole else _local(tensor).index_fill_(dim, index, value)
            if whole and isinstance(state.get("step"), Tensor):
                state["step"].zero_()

    def _before(self, state, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Freeze before the step; where it gets a closure, which makes the gradients inside, as soon as that has run."""
        paths = _paths_of(optimizer, state)
        if not paths:
            return None
        state.check_structure()
        if state.config.search != "off" and get_allocator(state.config.ranks).per_rank:
            check_elementwise(optimizer, f"ranks={state.config.ranks!r}")
        if optimizer not in self._completed and count_dtensors([paths[0].lora_A, paths[0].lora_B]):
            self._completed.add(optimizer)
            optimizer.register_state_dict_post_hook(_complete_state)
        closure = _closure_of(args, kwargs)
        if closure is None:
            self._freeze(state, optimizer, paths)
            return None
        self._saved.pop(id(optimizer), None)
        calls = 0

        def check_calls() -> None:
            closed = [path for path in paths if not all(path.active_rows())]
            if closed:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step calls its closure more than once and moves parameters in between, "
                    f"inactive ones too; {len(closed)} paths are inactive ({closed[0].name}, ...). Use another optimizer, or "
                    "search='off'")

        if any(cls.__name__ == "LBFGS" for cls in type(optimizer).__mro__):
            check_calls()

        def closure_then_freeze(*given, **named):
            nonlocal calls
            calls += 1
            if calls > 1:
                check_calls()
            result = closure(*given, **named)
            if calls == 1:
                self._freeze(state, optimizer, paths)
            return result

        swapped = tuple(closure_then_freeze if each is closure else each for each in args)
        return swapped, {name: closure_then_freeze if each is closure else each for name, each in kwargs.items()}

    def _freeze(self, state, optimizer: Optimizer, paths: Sequence[Path]) -> None:
        rows = {path.name: path.active_rows() for path in paths}
        closed = [path for path in paths if not all(rows[path.name])]
        ranks_rows = state.config.search != "off" and get_allocator(state.config.ranks).per_rank
        state.notice(optimizer, paths)
        for observer in list(self.observers):
            observer.before_step(optimizer)
        if self._resets:
            self._reset(optimizer, paths)
        kept = self._saved[id(optimizer)] = _Kept()
        for path in closed:
            if any(rows[path.name]):
                if ranks_rows:
                    _check_state(optimizer, path)
                self._save_rows(optimizer, path, kept.rows)
                continue
            if not _leaves_alone(optimizer):
                kept.whole += [(_local(parameter), _local(parameter).clone()) for parameter in (path.lora_A, path.lora_B)]
            path.lora_A.grad = None
            path.lora_B.grad = None

    @torch.no_grad()
    def _save_rows(self, optimizer: Optimizer, path: Path, kept: list) -> None:
        """Copy the inactive rows of lora_A and the inactive columns of lora_B, and those of their state."""
        closed = [not on for on in path.active_rows()]
        for parameter, dim in ((path.lora_A, 0), (path.lora_B, 1)):
            index = _local_index(parameter, dim, closed)
            values = {id(tensor): (tensor, _local(tensor).index_select(dim, index)) for tensor in _rows_of(optimizer, parameter)}
            kept.append((parameter, dim, index, values))

    @torch.no_grad()
    def _restore_rows(self, optimizer: Optimizer) -> None:
        kept = self._saved.pop(id(optimizer), None) or _Kept()
        for parameter, values in kept.whole:
            if not torch.equal(parameter, values):
                parameter.copy_(values)
        for parameter, dim, index, values in kept.rows:
            _local(parameter).index_copy_(dim, index, values[id(parameter)][1])
            for name, tensor in _elementwise_state(optimizer, parameter).items():
                if id(tensor) in values:
                    _local(tensor).index_copy_(dim, index, values[id(tensor)][1])
                else:
                    # State that this step made: rows that take no part in it are as before a first step.
                    _local(tensor).index_fill_(dim, index, _first_value(optimizer, name))

    def _after(self, state, optimizer: Optimizer) -> None:
        if not _paths_of(optimizer, state):
            return
        self._restore_rows(optimizer)
        # Optimizers of one loop, and those that step another inside, take a step each.
        taken = self._taken[optimizer] = self._taken.get(optimizer, 0) + 1
        if taken > self.steps:
            self.steps = taken
            if self.steps == _STEPS_BEFORE_WARNING:
                self.warn_if_undriven(state.config.search)

    def warn_if_undriven(self, search: str) -> None:
        """Say that nobody drives the config's search, if steps were taken."""
        if search != "off" and self.steps > 0 and not self.driven:
            missed, when = ("step", "after optimizer.step()") if search == "dynamic" else ("start", "before training")
            warnings.warn(
                f"{self.steps} optimizer steps were taken and search.{missed}() was never called: no rank was chosen. Use "
                f"HeteroLoraCallback with the HF Trainer, call RankSearch.{missed}() {when}, or set search='off'", stacklevel=3)


def _remove_all(handles: list) -> None:
    for handle in list(handles):
        handle.remove()
        handles.remove(handle)


#: Hooks of models that are gone, which do nothing. The garbage collector may find them while torch walks through its hooks, which
#: fails if one is taken away: they go when the next model is patched.
_orphans: list = []


def remove_orphans() -> None:
    """Remove the hooks of models that are gone; not while an optimizer steps."""
    _remove_all(_orphans)
