"""The state of a search that comes from a file, held field by field to be one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from torch import Tensor

Check = Callable[[object], bool]


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _flags(value: object) -> bool:
    return isinstance(value, list) and all(map(_flag, value))


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, Mapping) and all(isinstance(name, str) and check(each) for name, each in value.items())


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _generator(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == torch.Generator().get_state().shape


def _window(value: object) -> bool:
    if value is None:
        return True
    return (isinstance(value, Mapping) and isinstance(value.get("committed"), Tensor) and value["committed"].is_floating_point()
            and value["committed"].dim() == 2 and _count(value.get("steps")))


#: ``{field: (check, what it has to be)}``.
_FIELDS: dict[str, tuple[Check, str]] = {
    "ranks": (lambda value: isinstance(value, str), "the name of an allocator"), "started": (_flag, "true or false"),
    "steps": (_count, "a count"), "last": (_count, "a count"), "reallocations": (_count, "a count"),
    "times_on": (_by_name(_list_of(_count)), "counts by path"), "covered": (_flag, "true or false"),
    "average": (_by_name(lambda value: _number(value) or _list_of(_number)(value)), "finite numbers by path"),
    "reset": (_by_name(_flags), "flags by parameter"), "generator": (_generator, "the state of a torch generator"),
    "history": (_list_of(lambda value: isinstance(value, Mapping)), "a list of objects"), "window": (_window,
                                                                                                     "null or a table of sums"),
    "warned": (_texts, "a list of strings"), "masks": (_by_name(_flags), "flags by path"), "unreached": (_texts,
                                                                                                         "names of paths"),
}


def check_search_state(state: Mapping, where: str = "state", sizes: Mapping[str, int] | None = None) -> None:
    """Refuse a state of which a field is missing or is not what a search writes.

    Args:
        where: for the error, the file.
        sizes: ``{path: rank}`` of the model that it is for, where there is one.

    Raises:
        ValueError: names ``where`` and the field.
    """
    if state.get("version") != 2:
        raise ValueError(f"{where}: field 'version' must be 2, got {state.get('version')!r}")
    for name, (check, meaning) in _FIELDS.items():
        # Of an earlier version.
        if name == "unreached" and name not in state:
            continue
        if name not in state:
            raise ValueError(f"{where} is incomplete: field {name!r} is missing")
        if not check(state[name]):
            raise ValueError(f"{where}: field {name!r} must be {meaning}, got {_short(state[name])}")
    if state["last"] > state["steps"]:
        raise ValueError(f"{where}: field 'last' is {state['last']}, after the {state['steps']} steps of field 'steps'")
    if sizes is not None:
        _check_sizes(state, where, sizes)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _check_sizes(state: Mapping, where: str, sizes: Mapping[str, int]) -> None:
    for field in ("times_on", "average", "reset", "masks"):
        for name, value in state[field].items():
            path = name.removesuffix(".lora_A").removesuffix(".lora_B") if field == "reset" else name
            if path not in sizes:
                raise ValueError(f"{where}: field {field!r} speaks of {name!r}, which the model does not have")
            expected = (sizes[path],) if field in ("masks", "reset") else (1, sizes[path])
            if isinstance(value, list) and len(value) not in expected:
                raise ValueError(f"{where}: field {field!r} of {name!r} must have {sizes[path]} entries, got {len(value)}")
    unknown = sorted(set(state.get("unreached", ())) - set(sizes))
    if unknown:
        raise ValueError(f"{where}: field 'unreached' speaks of {unknown[0]!r}, which the model does not have")
