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


def check_swappable(name: str, module: nn.Module) -> None:
    """Refuse a module whose class's ``forward`` would never be called, or whose class cannot be changed.

    accelerate's hooks put a ``forward`` into the instance and call the class's as ``_old_forward``: that inner one can be
    replaced. Any other ``forward`` in the instance hides ours.

    One that accelerate offloads is refused too: its hook looks for the adapters among the weights that it has put away.

    Raises:
        ValueError: names the module.
    """
    hook = module.__dict__.get("_hf_hook")
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        raise ValueError(f"module {name!r} is offloaded by accelerate, which brings in only the weights it knew before: load the "
                         "model without offloading (a device_map whose modules all have one device), then patch it")
    if "forward" in module.__dict__ and not _bound_names(module, type(module)):
        raise ValueError(f"module {name!r} has a forward of its own in the instance ({module.__dict__['forward']!r}), "
                         "which hides the class's: it cannot be patched; remove that wrapper first")
    cls = type(module)
    if cls not in _checked:
        try:
            # A bare instance: Python compares the layouts of the two classes alone.
            object.__setattr__(cls.__new__(cls), "__class__", generated_class(_Nothing, cls))
        except TypeError as error:
            raise ValueError(f"module {name!r} cannot be patched: the class of a {cls.__module__}.{cls.__qualname__} cannot be "
                             f"changed ({error})") from error
        _checked.add(cls)


def _bound_names(module: nn.Module, cls: type) -> list[str]:
    """The names in the instance under which ``cls``'s forward lies as a bound method."""
    values = [(name, module.__dict__.get(name)) for name in _BOUND]
    return [name for name, value in values
            if inspect.ismethod(value) and value.__self__ is module and value.__func__ is cls.forward]


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the behaviour of ``mixin``; :func:`restore_class` undoes it."""
    names = _bound_names(module, type(module))
    cls = generated_class(mixin, type(module))
    if names:
        module.__dict__[_KEPT] = {name: module.__dict__[name] for name in names}
    module.__class__ = cls
    for name in names:
        module.__dict__[name] = types.MethodType(cls.forward, module)


def restore_class(module: nn.Module) -> None:
    """Give ``module`` its class back."""
    generated = type(module)
    module.__class__ = generated._heterolora_key[1]
    kept = module.__dict__.pop(_KEPT, {})
    for name in _bound_names(module, generated):
        module.__dict__[name] = kept.get(name) or types.MethodType(type(module).forward, module)
