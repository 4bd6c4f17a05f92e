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

# Where a bound method of the class's forward may lie in an instance, and hides the class's when its class changes:
# transformers 5.0 leaves one as `forward` after output_hidden_states=True, accelerate's hooks keep theirs.
_BOUND = ("_old_forward", "forward")
_KEPT = "_heterolora_forwards"
#: The forward in an instance that hides the class's, while ``joined_forward`` of the mixin stands in its place.
HIDDEN = "_heterolora_hidden"
_generated: dict[tuple[type, type], type] = {}
#: Classes whose instances take a generated class.
_checked: set[type] = set()


class _Nothing:
    """A mixin that adds nothing."""


def generated_class(mixin: type, base: type) -> type:
    """The subclass of ``base`` whose ``forward`` is ``mixin.patched_forward(self, base.forward, *args, **kwargs)``."""
    key = (mixin, base)
    if key not in _generated:
        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            # A reference that outlived the patch: transformers 5.0 and accelerate keep bound forwards in instances.
            # Not `type(self) is`: FSDP2 gives the instance a subclass of this one.
            if not isinstance(self, _generated[key]):
                return base.forward(self, *args, **kwargs)
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


def generated_from(module: nn.Module, mixin: type) -> bool:
    """Whether the instance's class was generated here from ``mixin``."""
    return is_swapped(module) and isinstance(module, mixin)


def hidden_by(module: nn.Module) -> str | None:
    """The name in the instance of a forward that hides the class's, or None.

    accelerate's hooks put a ``forward`` into the instance and call the class's as ``_old_forward``: that inner one can be
    replaced. Any other ``forward`` in the instance hides ours.
    """
    if "forward" not in module.__dict__ or _bound_names(module, type(module)):
        return None
    return next(name for name in _BOUND if name in module.__dict__)


def why_not_swappable(module: nn.Module, may_be_wrapped: bool = False) -> str | None:
    """Why the class of a module cannot be changed, or its class's ``forward`` would never be called; None if neither is so.

    One that accelerate offloads is refused too: its hook looks for the adapters among the weights that it has put away.

    Args:
        may_be_wrapped: whether a forward in the instance may be moved aside, because the mixin has a ``joined_forward``.
    """
    hook = module.__dict__.get("_hf_hook")
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        return ("is offloaded by accelerate, which brings in only the weights it knew before: load the model without offloading "
                "(a device_map whose modules all have one device), then patch it")
    if any(not isinstance(table, dict) and any(table[name] is not table[name] for name in table)
           for table in (module._parameters, module._buffers)):
        return ("is offloaded: its tensors are copied to their device when they are read, and adapters would be copies too; load "
                "the model without offloading, then patch it")
    if HIDDEN in module.__dict__ and not is_swapped(module):
        return "has a forward in the instance that still calls the one of an earlier patch: remove that wrapper first"
    if hidden_by(module) is not None and not may_be_wrapped:
        return (f"has a forward of its own in the instance ({module.__dict__['forward']!r}), which hides the class's: it cannot "
                "be patched; remove that wrapper first")
    cls = type(module)
    if cls not in _checked:
        try:
            # A bare instance: Python compares the layouts of the two classes alone.
            object.__setattr__(cls.__new__(cls), "__class__", generated_class(_Nothing, cls))
        except TypeError as error:
            return f"cannot be patched: the class of a {cls.__module__}.{cls.__qualname__} cannot be changed ({error})"
        _checked.add(cls)
    return None


def check_swappable(name: str, module: nn.Module, may_be_wrapped: bool = False) -> None:
    """Refuse a module for the reasons of :func:`why_not_swappable`.

    Raises:
        ValueError: names the module.
    """
    reason = why_not_swappable(module, may_be_wrapped)
    if reason is not None:
        raise ValueError(f"module {name!r} {reason}")


def _bound_names(module: nn.Module, cls: type) -> list[str]:
    """The names in the instance under which ``cls``'s forward lies as a bound method."""
    values = [(name, module.__dict__.get(name)) for name in _BOUND]
    return [name for name, value in values
            if inspect.ismethod(value) and value.__self__ is module and value.__func__ is cls.forward]


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the behaviour of ``mixin``; :func:`restore_class` undoes it."""
    hidden, names = hidden_by(module), _bound_names(module, type(module))
    cls = generated_class(mixin, type(module))
    if names:
        module.__dict__[_KEPT] = {name: module.__dict__[name] for name in names}
    if hidden is not None:
        module.__dict__[HIDDEN] = module.__dict__[hidden]
    module.__class__ = cls
    for name in names:
        module.__dict__[name] = types.MethodType(cls.forward, module)
    if hidden is not None:
        module.__dict__[hidden] = types.MethodType(mixin.joined_forward, module)


def restore_class(module: nn.Module) -> None:
    """Give ``module`` its class back."""
    generated = type(module)
    module.__class__ = generated._heterolora_key[1]
    kept = module.__dict__.pop(_KEPT, {})
    for name in _bound_names(module, generated):
        module.__dict__[name] = kept.get(name) or types.MethodType(type(module).forward, module)
    joined = getattr(generated, "joined_forward", None)
    # Where a wrapper that came later still calls ours, ours goes on to call the one that it hides.
    for name in _BOUND:
        if HIDDEN in module.__dict__ and getattr(module.__dict__.get(name), "__func__", module) is joined:
            module.__dict__[name] = module.__dict__.pop(HIDDEN)
