"""What a default leaves without adapters, said in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from heterolora_kernels.bases import is_quantised, own_tensors

_SHOWN = 12


def describe_left(model: nn.Module, left: Mapping[str, str]) -> str:
    """Name modules, those that differ only in numbers together, with their classes and the reasons.

    Args:
        left: ``{name: reason}``.
    """
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, reason in left.items():
        kind = type(model.get_submodule(name)).__name__, reason
        groups.setdefault(kind, {}).setdefault(_pattern(name), []).append(name)
    return "; ".join(f"{_listed(patterns)} [{cls}]: {reason}" for (cls, reason), patterns in groups.items())


def _listed(patterns: Mapping[str, list[str]]) -> str:
    told = [names[0] if len(names) == 1 else f"{pattern} ({len(names)})" for pattern, names in patterns.items()]
    return ", ".join(told[:_SHOWN] + ([f"and {len(told) - _SHOWN} more names"] if len(told) > _SHOWN else []))


def listed_by_pattern(names: Sequence[str]) -> str:
    """Names in short: those that differ only in numbers together."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(_pattern(name), []).append(name)
    return _listed(patterns)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def tell_left(model: nn.Module, left: Mapping[str, str]) -> str:
    """The warning about modules that stay without adapters, with their share of the model's parameters."""
    inside = {id(t): t for name in left for t in _weights(model.get_submodule(name))}
    everything = {id(t): t for module in model.modules() for t in _weights(module)}
    share = sum(t.numel() for t in inside.values()) / max(1, sum(t.numel() for t in everything.values()))
    return (f"{len(left)} module{'s' * (len(left) > 1)} with {100 * share:.3g} % of the model's parameters "
            f"stay{'s' * (len(left) == 1)} without adapters: {describe_left(model, left)}")


def _weights(module: nn.Module) -> list[Tensor]:
    """Parameters, and what stands for one among the buffers."""
    own = {id(p) for p in module._parameters.values() if p is not None}
    return [t for t in own_tensors(module) if id(t) in own or t.dim() > 1 and is_quantised(t)]
