"""What patching will do: targets, layers and paths, found and checked. Nothing here changes the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heterolora_kernels.config import HeteroLoraConfig, Site
from heterolora_kernels.distributed import is_dtensor
from heterolora_kernels.sites import SHORTCUTS, SITES, site_of, why_refused


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _pattern_value(name: str, pattern: Mapping[str, float], default):
    """The value of the key that is the name, else of the first that is a suffix of it or that its end matches (PEFT's rule)."""
    if name in pattern:
        return pattern[name]
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def is_conv1d(module: nn.Module) -> bool:
    # By name and place: importing transformers for an isinstance would make it a core dependency.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


#: Of packed weights; bool, which masks have, and int64, which indices have, are not among them.
_PACKED_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor holds packed or 8-bit numbers, or is of a class of its own that stands for such."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, nn.parameter.UninitializedParameter):
        return not is_dtensor(tensor)
    return tensor.dtype in _PACKED_DTYPES or tensor.is_floating_point() and tensor.dtype.itemsize < 2


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that computes its output itself, from quantised weights.

    bitsandbytes, torchao, optimum-quanto, HQQ, GPTQ, AWQ and the like: ``in_features``, ``out_features``, nothing inside.
    """
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if module._modules or not all(isinstance(size, int) for size in sizes):
        return False
    weight = module._parameters.get("weight")
    tensors = (*module._parameters.values(), *module._buffers.values()) if weight is None else (weight,)
    return any(is_quantised(tensor) for tensor in tensors if tensor is not None)


def base_tensor(module: nn.Module) -> Tensor | None:
    """A tensor of the module that says where, and in which dtype, its adapter belongs: its weight, or the first it has."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next((t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None), None)


#: Modules that hand the weights of their linears to one torch op instead of calling them.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _why_no_base(name: str, module: nn.Module, parent: nn.Module) -> str | None:
    """Why a module cannot be the base of paths, or None."""
    if isinstance(parent, _BYPASSING):
        return f"nn.{type(parent).__name__} reads its weight (at least in eval mode) and does not call it as a module"
    if getattr(getattr(base_tensor(module), "quant_state", None), "packing_format_for_cpu", False):
        return ("bitsandbytes has packed its weight for inference on the CPU, in a forward without gradients in eval mode, and "
                "it has no backward any more: load the model anew")
    if is_conv1d(module) or is_quantised_linear(module):
        return None
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight_norm, a parametrization)"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, and only nn.Linear, quantised linears and GPT-2's Conv1D can be adapted"
    if type(module).forward is not nn.Linear.forward:
        return f"its class {type(module).__name__} computes something else than nn.Linear"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it is a LazyLinear that has not seen an input yet"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_quantised_linear(module)


def _features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if is_quantised_linear(module):
        return module.in_features, module.out_features
    out_features, in_features = module.weight.shape
    return (out_features, in_features) if is_conv1d(module) else (in_features, out_features)


def is_below(name: str, heads: Sequence[str]) -> bool:
    """Whether a module is one of the heads or lies below one."""
    return any(part in heads for part in name.split("."))


def _output_embeddings(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        # Base models of some families define the getter without having the head.
        found = None
    return {id(found)} if found is not None else set()


def find_targets(model: nn.Module, config: HeteroLoraConfig) -> dict[str, nn.Module]:
    """``{name: module}`` of the linears that get LoRA."""
    modules = dict(model.named_modules())
    everything = config.target_modules == "all-linear"
    # Each entry of a list is held to match something; a regular expression is one entry.
    entries = () if isinstance(config.target_modules, str) else config.target_modules
    head = _output_embeddings(model)
    targets, refused, touched = {}, {}, set()
    for name, module in modules.items():
        if not name:
            continue
        parent = modules[name.rpartition(".")[0]]
        if everything:
            wanted = _is_linear(module) and id(module) not in head and not is_below(name, config.heads)
        else:
            wanted = _matches(name, config.target_modules)
        if not wanted:
            continue
        touched.update(entry for entry in entries if _matches(name, (entry,)))
        if _matches(name, config.exclude_modules):
            continue
        reason = _why_no_base(name, module, parent)
        if reason is None:
            targets[name] = module
        else:
            refused[name] = reason
    bypassed = {name for name in refused if isinstance(modules[name.rpartition(".")[0]], _BYPASSING)}
    if refused and not (everything and len(bypassed) == len(refused)):
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"target_modules selects modules that cannot be adapted: {listed}. Name them in exclude_modules.")
    if refused:
        warnings.warn(f"not adapted, because nn.MultiheadAttention and nn.TransformerEncoderLayer do not call them as modules: "
                      f"{sorted(refused)}", stacklevel=3)
    if everything:
        _warn_about_experts(modules)
    if not targets:
        names = sorted({name.rpartition('.')[2] for name, module in modules.items() if _is_linear(module)})
        raise ValueError(f"target_modules {config.target_modules!r} matches no linear of the model"
                         f"{' that exclude_modules leaves' if len(config.exclude_modules) else ''}; the model's linears are "
                         f"called {names}")
    unused = [] if isinstance(config.exclude_modules, str) else [
        pattern for pattern in config.exclude_modules if not any(_matches(name, (pattern,)) for name in modules)]
    if unused:
        warnings.warn(f"exclude_modules: {unused} match no module of the model", stacklevel=3)
    missed = [entry for entry in entries if entry not in touched]
    if missed:
        warnings.warn(f"target_modules: {missed} match no linear of the model", stacklevel=3)
    return targets


def _warn_about_experts(modules: Mapping[str, nn.Module]) -> None:
    experts = [name for name, module in modules.items() if not isinstance(module, nn.modules.conv._ConvNd)
               and any(p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values() if p is not None)]
    if experts:
        warnings.warn(f"not adapted, because their weights are 3-D parameters and no nn.Linear: {experts}", stacklevel=4)


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
                reason = _why_no_base(target, module, parent)
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
            width = _features(layer.module.get_submodule(linear))[1]
            base = getattr(layer.site, f"{part}_norm") or linear
            r = config.shortcut_r or config.r
            planned.append((layer, PlannedPath(f"{layer.name}.{site}", site, r, config.shortcut_alpha, width, width),
                            f"{layer.name}.{base}"))
    return planned


def plan_lora(targets: Mapping[str, nn.Module], config: HeteroLoraConfig) -> list[PlannedPath]:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(_pattern_value(name, {key: True}, False) for name in targets):
                raise ValueError(f"{field_name}: {key!r} matches no adapted module")
    planned = []
    for name, module in targets.items():
        r = _pattern_value(name, config.rank_pattern, config.r)
        if r > 0:
            planned.append(PlannedPath(name, None, r, _pattern_value(name, config.alpha_pattern, config.lora_alpha),
                                        *_features(module)))
    return planned


def check_heads(model: nn.Module, config: HeteroLoraConfig) -> None:
    if config.modules_to_save is None:
        return
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missed = [head for head in config.modules_to_save if head not in names]
    if missed:
        raise ValueError(f"modules_to_save: {missed} match no module of the model")
