"""What patching will do: targets, layers and paths, found and checked. Nothing here changes the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from heterolora_kernels.bases import features, is_experts, looks_linear
from heterolora_kernels.config import HeteroLoraConfig, Site
from heterolora_kernels.heads import Heads
from heterolora_kernels.leftovers import describe_left, tell_left
from heterolora_kernels.matching import is_excluded, is_target, matches, pattern_value
from heterolora_kernels.sites import SHORTCUTS, SITES, site_of, why_refused
from heterolora_kernels.trials import judge


def _output_embeddings(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        # Base models of some families define the getter without having the head.
        found = None
    return {id(found)} if found is not None else set()


def find_targets(model: nn.Module, config: HeteroLoraConfig, heads: Heads) -> dict[str, nn.Module]:
    """``{name: module}`` of the linears that get LoRA; a warning names what ``"all-linear"`` leaves."""
    modules = dict(model.named_modules())
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    # Each entry of a list is held to match something; a regular expression is one entry.
    entries = () if isinstance(config.target_modules, str) else config.target_modules
    head = _output_embeddings(model)
    targets, refused, touched = {}, {}, set()
    for name, module in modules.items():
        if not name:
            continue
        parent = modules[name.rpartition(".")[0]]
        if everything:
            wanted = _is_of_all(module) and id(module) not in head and not heads.holds(name)
        else:
            wanted = is_target(name, config)
        if not wanted:
            continue
        touched.update(entry for entry in entries if matches(name, (entry,)))
        # A head that is named is trained whole; one that is only a default may be adapted.
        if is_excluded(name, config) or (config.modules_to_save is not None and heads.holds(name)):
            continue
        reason = judge(module, parent).reason
        if reason is None:
            targets[name] = module
        else:
            refused[name] = reason
    if refused and not everything:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"target_modules selects modules that cannot be adapted: {listed}. Name them in exclude_modules.")
    if refused and not targets:
        raise ValueError(f"target_modules 'all-linear': nothing of the model can be adapted: {describe_left(model, refused)}")
    if refused:
        warnings.warn(tell_left(model, refused), stacklevel=5)
    if not targets:
        names = sorted({name.rpartition('.')[2] for name, module in modules.items() if looks_linear(module)})
        raise ValueError(f"target_modules {config.target_modules!r} matches no linear of the "
                         f"model{' that exclude_modules leaves' if len(config.exclude_modules) else ''}; the model's linears "
                         f"are called {names}")
    unused = [] if isinstance(config.exclude_modules, str) else [
        pattern for pattern in config.exclude_modules if not any(matches(name, (pattern,)) for name in modules)]
    if unused:
        warnings.warn(f"exclude_modules: {unused} match no module of the model", stacklevel=5)
    missed = [entry for entry in entries if entry not in touched]
    if missed:
        warnings.warn(f"target_modules: {missed} match no linear of the model", stacklevel=5)
    return targets


def _is_of_all(module: nn.Module) -> bool:
    """Tell whether a module belongs to all linears: one, or weights that who asks for all expects to be among them."""
    return looks_linear(module) or is_experts(module) or isinstance(module, nn.MultiheadAttention)


@dataclass
class PlannedPath:
    name: str
    site: str | None
    r: int
    alpha: float
    in_features: int
    out_features: int


@dataclass
class PlannedLayer:
    name: str
    module: nn.Module
    site: Site
    stack: nn.Module
    stack_key: tuple[int, str]
    index: int = 0


def plan_layers(model: nn.Module, config: HeteroLoraConfig) -> list[PlannedLayer]:
    """The layers that get shortcuts, with their place in their stack."""
    modules = dict(model.named_modules())
    layers: list[PlannedLayer] = []
    counts: dict[tuple[int, str], int] = {}
    for name, module in modules.items():
        site = site_of(module, config.sites)
        if site is None or not name:
            continue
        if not isinstance(site, Site):
            raise TypeError(f"sites[{type(module).__name__!r}] must be a Site, got {type(site).__name__}")
        container = name.rpartition(".")[0]
        owner = container
        while owner and isinstance(modules[owner], (nn.ModuleList, nn.ModuleDict)):
            owner = owner.rpartition(".")[0]
        key = (id(modules[owner]), container)
        layers.append(PlannedLayer(name, module, site, modules[owner], key, counts.get(key, 0)))
        counts[key] = counts.get(key, 0) + 1
    return layers


def check_shortcut_layers(model: nn.Module, config: HeteroLoraConfig, layers: Sequence[PlannedLayer]) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("shortcuts are not defined for encoder-decoder models; use shortcuts=()")
    if not layers:
        repeated = [child for m in model.modules() if isinstance(m, nn.ModuleList) for child in m]
        classes = sorted({type(child).__name__ for child in repeated})
        raise ValueError(
            f"shortcuts: no layer of the model is in the table of known classes {sorted(SITES)}; describe yours by "
            "sites={\"ClassName\": Site(h, f, attention, feed_forward, attention_norm=None, feed_forward_norm=None)}; "
            f"the repeated classes of this model are {classes}")
    classes = {type(module).__name__ for module in model.modules()}
    unknown = [name for name in config.sites or () if name not in classes]
    if unknown:
        raise ValueError(f"sites: the model has no module of class {unknown}")
    for layer in layers:
        reason = why_refused(layer.module)
        if reason is not None:
            raise ValueError(f"shortcuts: layer {layer.name!r} ({type(layer.module).__name__}) is refused: {reason}")
        for role in ("h", "f", "attention", "feed_forward", "attention_norm", "feed_forward_norm"):
            target = getattr(layer.site, role)
            if target is None and role.endswith("_norm"):
                continue
            try:
                module = layer.module.get_submodule(target)
            except AttributeError as error:
                raise ValueError(f"sites: {type(layer.module).__name__} has no module {target!r} ({role}): {error}") from error
            if role in ("attention", "feed_forward"):
                parent = layer.module.get_submodule(target.rpartition(".")[0])
                reason = judge(module, parent).reason
                if reason is not None:
                    raise ValueError(f"shortcuts: {layer.name}.{target} ({role}) cannot take a path: {reason}")
        for site in config.shortcuts:
            if hasattr(layer.module, site):
                raise ValueError(f"shortcuts: layer {layer.name!r} already has an attribute {site!r}")


def plan_shortcuts(layers: Sequence[PlannedLayer], config: HeteroLoraConfig) -> list[tuple[PlannedLayer, PlannedPath, str]]:
    """``(layer, path, name of the module whose output it joins)``."""
    planned = []
    for layer in layers:
        for site in config.shortcuts:
            source, part = SHORTCUTS[site]
            if source == "f_prev" and layer.index == 0:
                continue
            linear = getattr(layer.site, part)
            # Sources are the residual stream, whose width is that of the linear's output.
            width = features(layer.module.get_submodule(linear))[1]
            base = getattr(layer.site, f"{part}_norm") or linear
            r = config.shortcut_r or config.r
            planned.append((layer, PlannedPath(f"{layer.name}.{site}", site, r, config.shortcut_alpha, width, width),
                            f"{layer.name}.{base}"))
    return planned


def plan_lora(targets: Mapping[str, nn.Module], config: HeteroLoraConfig) -> list[PlannedPath]:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(pattern_value(name, {key: True}, False) for name in targets):
                raise ValueError(f"{field_name}: {key!r} matches no adapted module")
    planned = []
    for name, module in targets.items():
        r = pattern_value(name, config.rank_pattern, config.r)
        if r > 0:
            planned.append(PlannedPath(name, None, r, pattern_value(name, config.alpha_pattern, config.lora_alpha),
                                        *features(module)))
    return planned
