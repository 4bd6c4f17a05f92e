"""How names select modules: PEFT's rules, field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import regex

from heterolora_kernels.config import HeteroLoraConfig

#: Seconds that one pattern may take on one name; some take longer than anybody lives.
_PATIENCE = 1.0


def _bounded(match: Callable, pattern: str, name: str):
    """What ``match`` of the library regex finds, which tells as :mod:`re` does but can be stopped.

    Raises:
        ValueError: names a pattern that takes too long, or that is none.
    """
    try:
        return match(pattern, name, timeout=_PATIENCE)
    except TimeoutError as error:
        raise ValueError(f"the regular expression {pattern!r} takes too long on {name!r}: it backtracks; write it in another way"
                         ) from error
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Tell whether a regular expression matches a whole name, or one of several names is the name or a dotted end of it."""
    if isinstance(patterns, str):
        return _bounded(regex.fullmatch, patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def is_target(name: str, config: HeteroLoraConfig) -> bool:
    """Tell whether ``target_modules`` and ``layers_to_transform`` select a module, whatever ``exclude_modules`` says.

    A module that is named in full is selected in any layer.

    Source: PEFT's ``check_target_module_exists``.
    """
    targets = config.target_modules
    if isinstance(targets, str) or name in targets:
        return matches(name, targets)
    return matches(name, targets) and (not _layers(config) or _layer_of(name, config.layers_pattern) in _layers(config))


def _layers(config: HeteroLoraConfig) -> Sequence[int]:
    layers = config.layers_to_transform
    return () if layers is None else (layers,) if isinstance(layers, int) else layers


def _layer_of(name: str, patterns: str | Sequence[str] | None) -> int | None:
    """The number of the layer: the first number behind one of the patterns, or behind any name."""
    if not patterns:
        match = regex.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    else:
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        found = (_bounded(regex.match, rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in patterns)
        match = next((each for each in found if each), None)
    return None if match is None else int(match["index"])


def is_excluded(name: str, config: HeteroLoraConfig) -> bool:
    """Tell whether ``exclude_modules`` matches, or a name of ``modules_to_save`` is a part of the name."""
    if len(config.exclude_modules) and matches(name, config.exclude_modules):
        return True
    return any(_bounded(regex.match, rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ())


def pattern_value(name: str, pattern: Mapping[str, float], default):
    """The value of the first key that matches the end of a name, as a regular expression behind a dot.

    Source: PEFT's ``get_pattern_key``.
    """
    for key, value in pattern.items():
        if _bounded(regex.match, rf"(.*\.)?({key})$", name):
            return value
    return pattern.get(name, default)


def ends_in(names: Iterable[str], entries: Sequence[str]) -> list[str]:
    """The names that ``modules_to_save`` selects: they end in one of the entries, with or without a dot before it."""
    return [name for name in names if entries and name.endswith(tuple(entries))]
