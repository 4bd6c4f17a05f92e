"""Patch a model in place, and undo it: apply, remove, merge, disable.

Everything is planned and checked before the first module is touched; a failure after that is rolled back.
"""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.freezing import StepHooks
from heterolora_kernels.grouping import GROUPS, MaskGroup
from heterolora_kernels.instances import check_swappable, is_swapped, restore_class, swap_class
from heterolora_kernels.layers import (
    PatchedConv1D,
    PatchedLinear,
    PatchedNorm,
    Path,
    PathSet,
    ShortcutPath,
    Switches,
    make_adapter,
)
from heterolora_kernels.ops.ledger import Collector, Ledger
from heterolora_kernels.sites import (
    SHORTCUTS,
    SITES,
    Carrier,
    LayerState,
    PatchedLayer,
    PatchedStack,
    Site,
    site_of,
    why_refused,
)

_STATE = "_heterolora_state"
_ADAPTER_NAMES = ("lora_A", "lora_B", "lora_mask")


@dataclass
class HeteroLoraState:
    """What patching added to a model; lives in the model's ``__dict__``.

    Attributes:
        paths: ``{name: Path}``, LoRA first, then shortcuts, each in the order of the model's modules.
        linears: patched linears and norms.
        layers, stacks: modules whose class was changed for the shortcuts.
        hooks: ``(module, id of its forward pre-hook)``.
        requires_grad: flags of the parameters before patching, by name.
        step_hooks: the optimizer hooks (freezing, ledger, counting).
    """

    config: HeteroLoraConfig
    switches: Switches
    paths: dict[str, Path] = field(default_factory=dict)
    linears: list[nn.Module] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    stacks: list[nn.Module] = field(default_factory=list)
    hooks: list[tuple[nn.Module, int]] = field(default_factory=list)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    step_hooks: StepHooks = field(default_factory=StepHooks)

    def __post_init__(self) -> None:
        self._register_hooks()

    def __setstate__(self, state: dict) -> None:
        # A copy gets hooks of its own: it is trained by optimizers of its own.
        self.__dict__.update(state)
        self._register_hooks()

    def _register_hooks(self) -> None:
        self.step_hooks.register(weakref.ref(self))

    def write_masks(self, gates: Mapping[str, Tensor] | None = None) -> None:
        """Bring the derived tensors of every module in line with the masks, or with ``gates`` where given."""
        for module in self.linears:
            module._heterolora.write_masks(gates)


def unwrap(model: nn.Module) -> nn.Module:
    """The patched module inside DDP's and torch.compile's wrappers."""
    while _STATE not in model.__dict__:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError("model is not patched: call apply_heterolora(model, config) first")
        model = inner
    return model


def state_of(model: nn.Module) -> HeteroLoraState:
    """The patched model's state.

    Raises:
        ValueError: the model is not patched.
    """
    return unwrap(model).__dict__[_STATE]


# ---- planning: nothing below changes the model ----


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _pattern_value(name: str, pattern: Mapping[str, float], default):
    """The value of the first key that is the name, a suffix of it, or a regular expression that its end matches (PEFT's rule)."""
    for key, value in pattern.items():
        if name == key or re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _is_conv1d(module: nn.Module) -> bool:
    # By name and place: importing transformers for an isinstance would make it a core dependency.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _why_no_base(name: str, module: nn.Module, parent: nn.Module) -> str | None:
    """Why a module cannot be the base of paths, or None."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it as a module"
    if _is_conv1d(module):
        return None
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, and only nn.Linear and GPT-2's Conv1D can be adapted"
    if type(module).forward is not nn.Linear.forward:
        return f"its class {type(module).__name__} computes something else than nn.Linear (a quantised base?)"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it is a LazyLinear that has not seen an input yet"
    return None


def _features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    out_features, in_features = module.weight.shape
    return (out_features, in_features) if _is_conv1d(module) else (in_features, out_features)


def _below(name: str, heads: Sequence[str]) -> bool:
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


def _find_targets(model: nn.Module, config: HeteroLoraConfig) -> dict[str, nn.Module]:
    """``{name: module}`` of the linears that get LoRA."""
    modules = dict(model.named_modules())
    everything = config.target_modules == "all-linear"
    head = _output_embeddings(model)
    targets, refused, touched = {}, {}, set()
    for name, module in modules.items():
        if not name:
            continue
        parent = modules[name.rpartition(".")[0]]
        if everything:
            wanted = (isinstance(module, nn.Linear) or _is_conv1d(module)) and id(module) not in head \
                and not _below(name, config.heads)
        else:
            wanted = _matches(name, config.target_modules)
        if not wanted or _matches(name, config.exclude_modules):
            continue
        if not everything and not isinstance(config.target_modules, str):
            touched.update(t for t in config.target_modules if _matches(name, (t,)))
        reason = _why_no_base(name, module, parent)
        if reason is None:
            targets[name] = module
        else:
            refused[name] = reason
    if refused and not (everything and all(isinstance(modules[n.rpartition(".")[0]], nn.MultiheadAttention) for n in refused)):
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"target_modules selects modules that cannot be adapted: {listed}. Name them in exclude_modules.")
    if refused:
        warnings.warn(f"not adapted, because nn.MultiheadAttention never calls them as modules: {sorted(refused)}", stacklevel=4)
    if everything:
        _warn_about_experts(modules)
    if not targets and len(config.target_modules) > 0:
        names = sorted({name.rpartition('.')[2] for name, m in modules.items() if isinstance(m, nn.Linear) or _is_conv1d(m)})
        raise ValueError(f"target_modules {config.target_modules!r} matches no linear of the model; the model's linears are "
                         f"called {names}")
    if not everything and not isinstance(config.target_modules, str):
        missed = [target for target in config.target_modules if target not in touched]
        if missed:
            warnings.warn(f"target_modules: {missed} match no linear of the model", stacklevel=4)
    return targets


def _warn_about_experts(modules: Mapping[str, nn.Module]) -> None:
    experts = [name for name, module in modules.items() if not isinstance(module, nn.modules.conv._ConvNd)
               and any(p.dim() == 3 for p in module._parameters.values() if p is not None)]
    if experts:
        warnings.warn(f"not adapted, because their weights are 3-D parameters and no nn.Linear: {experts}", stacklevel=5)


@dataclass
class _PlannedPath:
    name: str
    site: str | None
    r: int
    alpha: float
    in_features: int
    out_features: int


@dataclass
class _PlannedLayer:
    name: str
    module: nn.Module
    site: Site
    stack: nn.Module
    stack_key: tuple[int, str]
    index: int = 0


def _plan_layers(model: nn.Module, config: HeteroLoraConfig) -> list[_PlannedLayer]:
    """The layers that get shortcuts, with their place in their stack."""
    modules = dict(model.named_modules())
    layers: list[_PlannedLayer] = []
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
        layers.append(_PlannedLayer(name, module, site, modules[owner], key, counts.get(key, 0)))
        counts[key] = counts.get(key, 0) + 1
    return layers


def _check_shortcut_layers(model: nn.Module, config: HeteroLoraConfig, layers: Sequence[_PlannedLayer]) -> None:
    if not layers:
        repeated = [child for m in model.modules() if isinstance(m, nn.ModuleList) for child in m]
        classes = sorted({type(child).__name__ for child in repeated})
        raise ValueError(
            f"shortcuts: no layer of the model is in the table of known classes {sorted(SITES)}; describe yours by "
            "sites={\"ClassName\": Site(h, f, attention, feed_forward, attention_norm=None, feed_forward_norm=None)}; "
            f"the repeated classes of this model are {classes}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("shortcuts are not defined for encoder-decoder models; use shortcuts=()")
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


def _plan_shortcuts(layers: Sequence[_PlannedLayer], config: HeteroLoraConfig) -> list[tuple[_PlannedLayer, _PlannedPath, str]]:
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
            planned.append((layer, _PlannedPath(f"{layer.name}.{site}", site, r, config.shortcut_alpha, width, width),
                            f"{layer.name}.{base}"))
    return planned


def _plan_lora(targets: Mapping[str, nn.Module], config: HeteroLoraConfig) -> list[_PlannedPath]:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(_pattern_value(name, {key: True}, False) for name in targets):
                raise ValueError(f"{field_name}: {key!r} matches no adapted module")
    planned = []
    for name, module in targets.items():
        r = _pattern_value(name, config.rank_pattern, config.r)
        if r > 0:
            planned.append(_PlannedPath(name, None, r, _pattern_value(name, config.alpha_pattern, config.lora_alpha),
                                        *_features(module)))
    return planned


def _check_heads(model: nn.Module, config: HeteroLoraConfig) -> None:
    if config.modules_to_save is None:
        return
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missed = [head for head in config.modules_to_save if head not in names]
    if missed:
        raise ValueError(f"modules_to_save: {missed} match no module of the model")


# ---- patching ----


class _Patcher:
    """One run of apply_heterolora after planning."""

    def __init__(self, model: nn.Module, config: HeteroLoraConfig, state: HeteroLoraState):
        self.model, self.config, self.state = model, config, state
        self.modules = dict(model.named_modules())

    def make_path(self, plan: _PlannedPath, weight: Tensor) -> tuple[Path, tuple]:
        dtype = self.config.adapter_dtype
        if dtype is None:
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        tensors = make_adapter(plan.name, plan.r, plan.in_features, plan.out_features, self.config.seed, self.config.init_B,
                               dtype, weight.device)
        root = math.sqrt(plan.r) if self.config.use_rslora else plan.r
        return Path(plan.name, self.model, plan.site, plan.r, plan.alpha / root), tensors

    def path_set(self, name: str) -> PathSet:
        """The path set of a module, patching it at the first call."""
        module = self.modules[name]
        if not is_swapped(module):
            mixin = PatchedConv1D if _is_conv1d(module) else PatchedLinear if isinstance(module, nn.Linear) else PatchedNorm
            module._heterolora = PathSet([], self.state.switches, float(self.config.lora_dropout))
            self.state.linears.append(module)
            swap_class(module, mixin)
        return module._heterolora

    def attach(self, holder: nn.Module, tensors: tuple) -> None:
        lora_A, lora_B, mask = tensors
        holder.register_parameter("lora_A", lora_A)
        holder.register_parameter("lora_B", lora_B)
        holder.register_buffer("lora_mask", mask)

    def add_lora(self, plan: _PlannedPath) -> None:
        module = self.modules[plan.name]
        path, tensors = self.make_path(plan, module.weight)
        path.holder = module
        self.path_set(plan.name).paths.append(path)
        self.attach(module, tensors)
        self.state.paths[plan.name] = path

    def add_shortcut(self, layer_state: LayerState, layer: _PlannedLayer, plan: _PlannedPath, base: str) -> None:
        linear = layer.module.get_submodule(getattr(layer.site, SHORTCUTS[plan.site][1]))
        path, tensors = self.make_path(plan, linear.weight)
        paths = self.path_set(base)
        paths.layer = layer_state
        path.holder = ShortcutPath(plan.in_features, plan.out_features, paths)
        self.attach(path.holder, tensors)
        paths.paths.append(path)
        self.state.paths[plan.name] = path
        layer.module.add_module(plan.site, path.holder)

    def patch_layer(self, layer: _PlannedLayer, state: LayerState) -> None:
        layer.module._heterolora = state
        self.state.layers.append(layer.module)
        swap_class(layer.module, PatchedLayer)

    def capture(self, layer: _PlannedLayer, state: LayerState) -> None:
        for target, hook in ((layer.site.h, state.capture_h), (layer.site.f, state.capture_f)):
            module = layer.module.get_submodule(target)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self.state.hooks.append((module, handle.id))

    def add_groups(self, layer_name: str, layer: nn.Module) -> list[MaskGroup]:
        groups = []
        for members in GROUPS.get(type(layer).__name__, ()):
            names = [f"{layer_name}.{member}" for member in members if f"{layer_name}.{member}" in self.state.paths]
            if len(names) > 1:
                group = MaskGroup(names)
                for name in names:
                    self.modules[name]._heterolora.group = group
                groups.append(group)
        return groups

    def run(self, lora: Sequence[_PlannedPath], layers: Sequence[_PlannedLayer], shortcuts) -> None:
        for plan in lora:
            self.add_lora(plan)
        carriers: dict[tuple[int, str], Carrier] = {}
        states: dict[str, LayerState] = {}
        for layer in layers:
            carrier = carriers.setdefault(layer.stack_key, Carrier())
            states[layer.name] = LayerState(layer.name, layer.index, carrier)
        for layer, plan, base in shortcuts:
            self.add_shortcut(states[layer.name], layer, plan, base)
        last = {layer.stack_key: layer.name for layer in layers}
        crosses = "shortcut_ffn" in self.config.shortcuts
        for layer in layers if self.config.shortcuts else ():
            state = states[layer.name]
            state.imports_f = crosses and layer.index > 0
            state.exports_f = crosses and layer.name != last[layer.stack_key]
            self.capture(layer, state)
            self.patch_layer(layer, state)
            if crosses and layer.stack not in self.state.stacks:
                layer.stack._heterolora_carriers = [c for key, c in carriers.items() if key[0] == id(layer.stack)]
                self.state.stacks.append(layer.stack)
                swap_class(layer.stack, PatchedStack)
        if self.config.lora_dropout > 0:
            self._share_masks(states)
        self._freeze()

    def _share_masks(self, states: dict[str, LayerState]) -> None:
        for name, module in list(self.modules.items()):
            if type(module).__name__ not in GROUPS:
                continue
            groups = self.add_groups(name, module)
            if groups and not is_swapped(module):
                states[name] = LayerState(name, 0, None)
                check_swappable(name, module)
                module._heterolora = states[name]
                self.state.layers.append(module)
                swap_class(module, PatchedLayer)
            if groups:
                states[name].groups = groups

    def _freeze(self) -> None:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            if leaf not in _ADAPTER_NAMES and not _below(owner, self.config.heads):
                parameter.requires_grad_(False)


def apply_heterolora(model: nn.Module, config: HeteroLoraConfig) -> nn.Module:
    """Patch the linears of a model in place, freeze everything but adapters and heads, and return the model.

    Right after it, the model computes what it computed before (with ``init_B="zeros"``). Parameters keep their identity and
    the base's keys of the state dict their names. Every path is on at full rank.

    Args:
        model: any module; shortcuts need a layer class of the site table or of ``config.sites``.
        config: see :class:`HeteroLoraConfig`.

    Raises:
        ValueError, TypeError: names the argument or the module; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, HeteroLoraConfig):
        raise TypeError(f"config must be a HeteroLoraConfig, got {type(config).__name__}")
    if any(is_swapped(module) for module in model.modules()):
        raise ValueError("model is already patched: call remove_heterolora(model) first")
    targets = _find_targets(model, config) if len(config.target_modules) > 0 else {}
    _check_heads(model, config)
    lora = _plan_lora(targets, config)
    layers = _plan_layers(model, config) if config.shortcuts else []
    if config.shortcuts:
        _check_shortcut_layers(model, config, layers)
    shortcuts = _plan_shortcuts(layers, config)
    if not lora and not shortcuts:
        raise ValueError("rank_pattern sets every adapted module to rank 0: nothing is left to train")
    modules = dict(model.named_modules())
    for name in {plan.name for plan in lora} | {base for _, _, base in shortcuts}:
        check_swappable(name, modules[name])
        taken = [attribute for attribute in _ADAPTER_NAMES if hasattr(modules[name], attribute)]
        if taken:
            raise ValueError(f"module {name!r} already has {taken}: is it an adapter of another library?")
    for layer in layers:
        check_swappable(layer.name, layer.module)
        check_swappable("the layers' parent", layer.stack)

    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    state = HeteroLoraState(config, Switches(Ledger({})), requires_grad=flags)
    model.__dict__[_STATE] = state
    try:
        _Patcher(model, config, state).run(lora, layers, shortcuts)
        rows = {path.name: path.r for module in state.linears for path in module._heterolora.paths}
        state.switches.ledger = Ledger(rows)
    except BaseException:
        remove_heterolora(model)
        raise
    return model


def remove_heterolora(model: nn.Module) -> nn.Module:
    """Give back the model that was patched: types, tensors, flags and hooks; the adapters are dropped.

    Modules of ``modules_to_save`` keep what they learnt: they are the model's own.
    """
    model = unwrap(model)
    state = state_of(model)
    state.step_hooks.remove()
    for module, hook_id in state.hooks:
        module._forward_pre_hooks.pop(hook_id, None)
        module._forward_pre_hooks_with_kwargs.pop(hook_id, None)
    for path in state.paths.values():
        if path.site is not None:
            layer, _, site = path.name.rpartition(".")
            model.get_submodule(layer)._modules.pop(site, None)
    for module in (*state.linears, *state.layers, *state.stacks):
        for name in _ADAPTER_NAMES:
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        module.__dict__.pop("_heterolora", None)
        module.__dict__.pop("_heterolora_carriers", None)
        if is_swapped(module):
            restore_class(module)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, flag in state.requires_grad.items():
        if name in parameters:
            parameters[name].requires_grad_(flag)
    del model.__dict__[_STATE]
    return model


def merge_heterolora(model: nn.Module, drop_shortcuts: bool = False) -> nn.Module:
    """Add every active LoRA path to its weight, ``W += s B A`` over the active rows, and remove the patch.

    Args:
        model: a patched model.
        drop_shortcuts: a shortcut reads another tensor than the linear whose output it joins, so it cannot become part of
            a weight. True leaves active shortcuts out, which changes the outputs.

    Raises:
        ValueError: shortcuts are active, a weight is shared with another module, or a merged weight would not be finite.
            The model is then as it was.
    """
    model = unwrap(model)
    state = state_of(model)
    active = [path.name for path in state.paths.values() if path.site is not None and any(path.active_rows())]
    if active and not drop_shortcuts:
        raise ValueError(f"{len(active)} active shortcuts cannot be merged into weights ({active[0]}, ...); save the adapter, "
                         "or pass drop_shortcuts=True to leave them out")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    lora = [path for path in state.paths.values() if path.site is None and any(path.active_rows())]
    # Everything is checked before anything is written; computing twice is cheaper than a second copy of all weights.
    for path in lora:
        names = owners[id(path.holder.weight)]
        if len(names) > 1:
            raise ValueError(f"the weight of {path.name!r} is shared ({names}): merging would change all of them")
        if not bool(torch.isfinite(_merged_weight(path)).all()):
            raise ValueError(f"the merged weight of {path.name!r} is not finite")
    for path in lora:
        with torch.no_grad():
            path.holder.weight.copy_(_merged_weight(path))
    return remove_heterolora(model)


@torch.no_grad()
def _merged_weight(path: Path) -> Tensor:
    weight = path.holder.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = path.scaling * (path.lora_B.to(dtype)[:, path.mask] @ path.lora_A.to(dtype)[path.mask])
    return (weight.to(dtype) + (delta.t() if _is_conv1d(path.holder) else delta)).to(weight.dtype)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, bit for bit (heads of ``modules_to_save`` as they are)."""
    switches = state_of(model).switches
    before, switches.enabled = switches.enabled, False
    try:
        yield
    finally:
        switches.enabled = before


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[Collector]:
    """Collect the ledger's columns over every backward in the block.

    Yields:
        A reader whose ``table()`` gives ``{path: {column: float32 [r]}}``, the raw sums (a loss scale is not divided out)
        since entry or ``zero_()``, inside the block and after it.
    """
    ledger = state_of(model).switches.ledger
    collector = ledger.open()
    try:
        yield collector
    finally:
        ledger.close(collector)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``trainable``, ``all`` and ``active``: trainable parameters of heads, and of the active rows of every path."""
    state = state_of(model)
    parameters = {id(p): p for p in unwrap(model).parameters()}
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    inactive = sum(path.active_rows().count(False) * (path.lora_A.shape[1] + path.lora_B.shape[0])
                   for path in state.paths.values())
    return {"trainable": trainable, "all": sum(p.numel() for p in parameters.values()), "active": trainable - inactive}


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line, and the active parameters after it."""
    counts = count_parameters(model)
    print(f"trainable params: {counts['trainable']:,d} || all params: {counts['all']:,d} || "
          f"trainable%: {100 * counts['trainable'] / max(counts['all'], 1):.4f} || active params: {counts['active']:,d}")
