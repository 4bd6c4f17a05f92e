"""Change the class of one module instance, and change it back.

The generated class keeps the base's name, qualified name, module, docstring and ``forward`` signature, because accelerate
and FSDP find the classes to wrap by name and Trainer reads the signature. Instances pickle and deepcopy: they are rebuilt
from (mixin, base), which are importable.
"""

from __future__ import annotations

import functools
import inspect
import types

from torch import nn

_OLD_FORWARD = "_heterolora_old_forward"
_generated: dict[tuple[type, type], type] = {}


def generated_class(mixin: type, base: type) -> type:
    """The subclass of ``base`` whose ``forward`` is ``mixin.patched_forward(self, base.forward, *args, **kwargs)``."""
    key = (mixin, base)
    if key not in _generated:
        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            return mixin.patched_forward(self, base.forward, *args, **kwargs)

        namespace = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_ex,
            "forward": forward,
            "_heterolora_key": key,
        }
        _generated[key] = types.new_class(base.__name__, (mixin, base), {}, lambda body: body.update(namespace))
    return _generated[key]


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls = generated_class(mixin, base)
    return cls.__new__(cls)


def _reduce_ex(self, protocol):
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_rebuild, type(self)._heterolora_key, *state)


def is_swapped(module: nn.Module) -> bool:
    """Whether the instance's class was generated here."""
    return hasattr(type(module), "_heterolora_key")


def check_swappable(name: str, module: nn.Module) -> None:
    """Refuse a module whose class's ``forward`` would never be called.

    accelerate's hooks put a ``forward`` into the instance and call the class's as ``_old_forward``: that inner one can be
    replaced. Any other ``forward`` in the instance hides ours.

    Raises:
        ValueError: names the module.
    """
    if "forward" not in module.__dict__:
        return
    inner = module.__dict__.get("_old_forward")
    if not (inspect.ismethod(inner) and inner.__self__ is module and inner.__func__ is type(module).forward):
        raise ValueError(f"module {name!r} has a forward of its own in the instance ({module.__dict__['forward']!r}), "
                         "which hides the class's: it cannot be patched; remove that wrapper first")


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the behaviour of ``mixin``; :func:`restore_class` undoes it."""
    if "forward" in module.__dict__:
        module.__dict__[_OLD_FORWARD] = module.__dict__["_old_forward"]
    module.__class__ = generated_class(mixin, type(module))
    if "forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)


def restore_class(module: nn.Module) -> None:
    """Give ``module`` its class back."""
    module.__class__ = type(module)._heterolora_key[1]
    inner = module.__dict__.pop(_OLD_FORWARD, None)
    if inner is not None:
        module._old_forward = inner
