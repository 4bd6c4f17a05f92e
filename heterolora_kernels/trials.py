"""How a module takes paths, by what it computes: a trial run on stand-ins of its tensors, which leaves no trace.

A linear of a known kind is not run. One with a forward of its own is: it is plain if it computes x W^T + b, whatever W and b
hold, in training as in evaluation; it computes its output itself if that is a tensor of the right shape with a gradient for x;
anything else cannot be a base.
"""

from __future__ import annotations

import inspect
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heterolora_kernels.bases import features, has_features, is_conv1d, is_quantised, is_quantised_linear, why_never
from heterolora_kernels.instances import hidden_by, why_not_swappable
from heterolora_kernels.undo import put_back, structure_of

#: How paths join a base: in one op with x W^T + b; with the same and x by any name; with GPT-2's transposed weight; joining the
#: output of the class's forward; joining that of a forward in the instance.
PLAIN, ANY_NAME, CONV1D, ITSELF, WRAPPED = "plain", "any_name", "conv1d", "itself", "wrapped"
ROWS = 3
#: Attributes of a module that its forward does not depend on, as far as a trial goes.
_NO_MATTER = ("training", "_non_persistent_buffers_set", "_is_hf_initialized")


@dataclass(frozen=True)
class Verdict:
    """One of the ways above, or the reason why there is none."""

    way: str | None
    reason: str | None = None


#: Trials of modules that are alike; a model has few kinds. Good for one model, as long as it is planned and patched.
_known: dict[tuple, Verdict] = {}


def forget() -> None:
    """Let every module be tried anew; before a model is planned."""
    _known.clear()


def judge(module: nn.Module, parent: nn.Module | None = None) -> Verdict:
    """Find how a module takes paths.

    Args:
        module: it is as before afterwards: its tensors, attributes, hooks and the states of random number generators.
        parent: the module that holds it, where known: some read their linears' weights past them.
    """
    is_wrapped = hidden_by(module) is not None
    reason = why_never(module, parent) or why_not_swappable(module, may_be_wrapped=True)
    if reason is not None:
        return Verdict(None, reason)
    if is_quantised_linear(module):
        # A trial on the meta device would need the kernels of another one.
        if has_features(module) or any(t.is_meta for t in _tensors(module)):
            return Verdict(WRAPPED if is_wrapped else ITSELF)
    elif not is_wrapped and is_conv1d(module):
        return Verdict(CONV1D)
    elif not is_wrapped and type(module).forward is nn.Linear.forward:
        return Verdict(PLAIN)
    key = _kind_of(module)
    if key not in _known:
        _known[key] = _try(module, is_wrapped)
    return _known[key]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for each in module.modules():
        yield from (t for table in (each._parameters, each._buffers) for t in table.values() if t is not None)


def _kind_of(module: nn.Module) -> tuple:
    """What the verdict depends on, beside the values of tensors; objects of which nothing is known by their identity."""
    if module._modules:
        return (id(module),)
    attributes = [(name, _told(value)) for name, value in sorted(module.__dict__.items()) if name not in _NO_MATTER
                  and not (name.startswith("_") and isinstance(value, Mapping))]
    tensors = [(name, None if t is None else (type(t), t.dtype, tuple(t.shape), t.device))
               for table in (module._parameters, module._buffers) for name, t in table.items()]
    return type(module), type(module).forward, tuple(attributes), tuple(tensors)


def _told(value: object) -> object:
    """A key for the value of an attribute."""
    if isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type(None))):
        return value
    function = getattr(value, "__func__", None)
    if isinstance(function, types.FunctionType) and function.__closure__ is None:
        # A method that was made for each module anew.
        return function.__code__
    # What compares by its content and cannot be a key, such as a list or the schemes of compressed-tensors.
    return (type(value), repr(value)) if type(value).__hash__ is None else (type(value), id(value))


class _Unfit(Exception):
    """The module cannot be a base, for the reason that is the message."""


def _try(module: nn.Module, is_wrapped: bool) -> Verdict:
    in_features, out_features = features(module)
    may_be_plain = not is_wrapped and not is_quantised_linear(module) and not is_conv1d(module) and "bias" in module._parameters
    name = _name_of_input(type(module).forward) if may_be_plain else None
    failure = ""
    for dtype in _dtypes(module):
        for shape in ((1, ROWS, in_features), (ROWS, in_features)):
            try:
                with _on_stand_ins(module, dtype) as (forward, device):
                    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0)).to(device, dtype)
                    outs = _outputs(module, forward, x, out_features)
                    if name is not None and all(_is_plain(module, x, out) for out in outs):
                        return Verdict(PLAIN if name == "input" else ANY_NAME)
                    _check_gradient(module, forward, x)
                    return Verdict(WRAPPED if is_wrapped else ITSELF)
            except _Unfit as unfit:
                return Verdict(None, f"its class {type(module).__name__} is no linear to be adapted: {unfit}")
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises is the answer
                failure = failure or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    return Verdict(None, f"its class {type(module).__name__} fails on a trial input ({failure})")


def _name_of_input(forward: Callable) -> str | None:
    """The name of the only argument of a forward; None where it has others."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    is_one = len(parameters) == 1 and parameters[0].kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                                             inspect.Parameter.POSITIONAL_ONLY)
    return parameters[0].name if is_one else None


def _is_whole_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not is_quantised(tensor)


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    """Dtypes to try, the likeliest first: float32 tells a linear from one that rounds, but kernels want their own."""
    own = next((t.dtype for t in _tensors(module) if _is_whole_float(t)), torch.float32)
    wide = torch.float64 if own == torch.float64 else torch.float32
    order = [own, wide, torch.bfloat16] if is_quantised_linear(module) else [wide, own]
    return list(dict.fromkeys(order))


@contextmanager
def _on_stand_ins(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Callable, torch.device]]:
    """Put stand-ins for the tensors of a module into it for the block, random ones for its floats; yield its forward."""
    device = next((t.device for t in _tensors(module)), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    # torch.mps has one generator, which is not asked for by device.
    devices = [device] if device.type not in ("cpu", "mps") else []
    dynamo = "torch._dynamo" in sys.modules
    state = random.getstate()
    with (put_back(structure_of(module)), put_back(lambda: random.setstate(state)), warnings.catch_warnings(),
          torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.inference_mode(False),
          torch.autocast(device.type, enabled=False),
          torch.compiler.set_stance("force_eager") if dynamo else nullcontext()):
        warnings.simplefilter("ignore")
        generator = torch.Generator("cpu" if device.type == "cpu" else device).manual_seed(1)
        for each in module.modules():
            # New tables, not new entries: writing to one that is no dict may write to the tensors in it.
            for own in (each.__dict__, each._parameters, each._buffers):
                made = {name: _stand_in(tensor, dtype, device, generator) if isinstance(tensor, Tensor) else tensor
                        for name, tensor in own.items()}
                if own is each.__dict__:
                    own.update(made)
                else:
                    each.__dict__["_parameters" if own is each._parameters else "_buffers"] = made
            for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
                hooks.clear()
        # The hook of accelerate is not asked: it would bring the tensors that it knows.
        inner = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
        yield inner or module.forward, device


def _stand_in(tensor: Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    if _is_whole_float(tensor):
        # Not the values that it has: a factor of 1 may become another.
        made = torch.empty(tensor.shape, dtype=dtype, device=device).uniform_(0.25, 1.0, generator=generator)
        if tensor.dim() > 1:
            # Beyond 1, for those that round.
            made.mul_(4).sub_(2.5)
    elif tensor.is_meta:
        made = torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        made = tensor.detach().clone()
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _outputs(module: nn.Module, forward: Callable, x: Tensor, out_features: int) -> list[Tensor]:
    """The outputs in evaluation and in training.

    Raises:
        _Unfit: one of them is none of a linear.
    """
    outs = []
    for training in (False, True):
        for each in module.modules():
            each.training = training
        with torch.no_grad():
            out = forward(x.clone())
        if not isinstance(out, Tensor):
            raise _Unfit(f"it returns a {type(out).__name__}")
        if out.shape != (*x.shape[:-1], out_features):
            if x.dim() == 3:
                # Some take rows alone.
                raise ValueError
            raise _Unfit(f"of {list(x.shape)} it makes {list(out.shape)}, not {[*x.shape[:-1], out_features]}")
        if not out.is_floating_point():
            raise _Unfit(f"it returns numbers of {out.dtype}")
        outs.append(out)
    return outs


def _is_plain(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Tell whether ``out`` is x W^T + b within rounding."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if out.dtype != x.dtype or not _is_whole_float(weight):
        return False
    with torch.no_grad():
        expected = F.linear(x, weight, bias)
        size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    # Sums of the same products in any order, in blocks: far below the rounding of any number to 8 bits.
    return bool(((out - expected).abs() <= 8 * torch.finfo(x.dtype).eps * size).all())


def _check_gradient(module: nn.Module, forward: Callable, x: Tensor) -> None:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        # A view: some write to their input while they train.
        out = forward(leaf * 1)
        grad = torch.autograd.grad(out, leaf, torch.ones_like(out), allow_unused=True)[0] if out.requires_grad else None
    if grad is None or not grad.any():
        raise _Unfit("it gives no gradient to its input, so nothing before it would learn")
