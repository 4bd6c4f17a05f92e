"""Patch a model in place, and undo it: apply, remove, disable.

Everything is planned and checked before the first module is touched; a failure after that is undone.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heterolora_kernels import distributed
from heterolora_kernels.bases import base_tensor
from heterolora_kernels.beside import Beside
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.grouping import GROUPS, LinearGroup
from heterolora_kernels.heads import find_heads
from heterolora_kernels.instances import check_swappable, is_swapped, restore_class, swap_class
from heterolora_kernels.layers import (
    PatchedConv1D,
    PatchedLinear,
    PatchedNorm,
    PatchedQuantised,
    Path,
    PathSet,
    ShortcutPath,
    Switches,
    make_adapter,
)
from heterolora_kernels.ops.ledger import Collector, Ledger
from heterolora_kernels.packing import PackBudget, Packs
from heterolora_kernels.peft_format import read_peft
from heterolora_kernels.planning import (
    PlannedLayer,
    PlannedPath,
    check_shortcut_layers,
    find_targets,
    plan_layers,
    plan_lora,
    plan_shortcuts,
)
from heterolora_kernels.sites import SHORTCUTS, Carrier, LayerState, PatchedLayer, PatchedStack
from heterolora_kernels.state import ADAPTER_NAMES, STATE_NAME, HeteroLoraState, is_patched, state_of, unwrap, whole
from heterolora_kernels.structure import Structure
from heterolora_kernels.trials import ANY_NAME, CONV1D, ITSELF, PLAIN, WRAPPED, forget, judge
from heterolora_kernels.undo import keeps_modes, structure_of, undone_on_failure
from heterolora_kernels.wrapped import PatchedAnyName, PatchedWrapped

#: By which transformers knows a model with adapters; its Trainer refuses to train a quantised model without any.
_HAS_ADAPTERS = "_hf_peft_config_loaded"


class _SavesAsBefore:
    """Holds ``save_pretrained`` of a quantised model that has adapters, for which transformers' own would ask PEFT.

    The model holds it, so it does not hold the model: whoever drops that gets its memory back at once.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict:
        return {"model": self._model()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["model"])

    def save_pretrained(self, *args, **kwargs):
        """What it writes of any patched model: the base with the adapters' tensors."""
        model = self._model()
        model.__dict__[_HAS_ADAPTERS] = False
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            model.__dict__[_HAS_ADAPTERS] = True


class _Patcher:
    """One run of apply_heterolora after planning."""

    def __init__(self, model: nn.Module, config: HeteroLoraConfig, state: HeteroLoraState):
        self.model, self.config, self.state = model, config, state
        self.modules = dict(model.named_modules())

    def add_path(self, plan: PlannedPath, weight: Tensor, holder: nn.Module, paths: PathSet) -> None:
        """Create the path's tensors on its holder and enter it in the path set."""
        dtype = self.config.adapter_dtype
        if dtype is None:
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        lora_A, lora_B, mask = make_adapter(plan.name, plan.r, plan.in_features, plan.out_features, self.config.seed,
                                            self.config.init_B, dtype, weight.device)
        root = math.sqrt(plan.r) if self.config.use_rslora else plan.r
        path = Path(plan.name, holder, plan.site, plan.r, plan.alpha / root)
        paths.paths.append(path)
        self.state.paths[plan.name] = path
        holder.register_parameter("lora_A", lora_A)
        holder.register_parameter("lora_B", lora_B)
        holder.register_buffer("lora_mask", mask)

    def path_set(self, name: str) -> PathSet:
        """The path set of a module, patching it at the first call."""
        module = self.modules[name]
        if not is_swapped(module):
            mixin, switches = _mixin_of(module), self.state.switches
            packs = Packs(switches.packing) if issubclass(mixin, (PatchedLinear, PatchedConv1D)) else None
            module._heterolora = PathSet([], switches, float(self.config.lora_dropout), packs=packs)
            self.state.linears.append(module)
            swap_class(module, mixin)
        return module._heterolora

    def add_lora(self, plan: PlannedPath) -> None:
        module = self.modules[plan.name]
        self.add_path(plan, base_tensor(module), module, self.path_set(plan.name))

    def add_shortcut(self, layer_state: LayerState, layer: PlannedLayer, plan: PlannedPath, base: str) -> None:
        paths = self.path_set(base)
        paths.layer = layer_state
        holder = ShortcutPath(plan.in_features, plan.out_features, paths)
        linear = layer.module.get_submodule(getattr(layer.site, SHORTCUTS[plan.site][1]))
        self.add_path(plan, base_tensor(linear), holder, paths)
        layer.module.add_module(plan.site, holder)

    def patch_layer(self, module: nn.Module, state: LayerState) -> None:
        module._heterolora = state
        self.state.layers.append(module)
        swap_class(module, PatchedLayer)

    def capture(self, layer: PlannedLayer, state: LayerState) -> None:
        for target, hook in ((layer.site.h, state.capture_h), (layer.site.f, state.capture_f)):
            module = layer.module.get_submodule(target)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self.state.hooks.append((module, handle.id))

    def add_groups(self, layer_name: str, layer: nn.Module) -> list[LinearGroup]:
        groups = []
        for members in GROUPS[type(layer).__name__]:
            wanted = {f"{layer_name}.{member}" for member in members}
            # In the order of the model's modules, in which their rows lie in the ledger.
            names = [name for name in self.state.paths if name in wanted]
            if len(names) < 2:
                continue
            group, linears = LinearGroup(names), [self.modules[name] for name in names]
            for linear in linears:
                linear._heterolora.group = group
            if self.config.group == "auto" and _can_run_as_one(linears):
                group.fuse(linears, [sum(hooked is linear for hooked, _ in self.state.hooks) for linear in linears])
            groups.append(group)
        return groups

    def run(self, lora: Sequence[PlannedPath], layers: Sequence[PlannedLayer], shortcuts) -> None:
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
        for layer in layers:
            state = states[layer.name]
            state.imports_f = crosses and layer.index > 0
            state.exports_f = crosses and layer.name != last[layer.stack_key]
            self.capture(layer, state)
            self.patch_layer(layer.module, state)
            if crosses and layer.stack not in self.state.stacks:
                layer.stack._heterolora_carriers = [c for key, c in carriers.items() if key[0] == id(layer.stack)]
                self.state.stacks.append(layer.stack)
                swap_class(layer.stack, PatchedStack)
        if self.config.lora_dropout > 0 or self.config.group == "auto":
            self._form_groups(states)
        self._freeze()

    def _form_groups(self, states: dict[str, LayerState]) -> None:
        for name, module in list(self.modules.items()):
            if type(module).__name__ not in GROUPS:
                continue
            if not is_swapped(module):
                try:
                    check_swappable(name, module)
                except ValueError:
                    # Without dropout its linears do as well one by one.
                    if self.config.lora_dropout > 0:
                        raise
                    continue
            groups = self.add_groups(name, module)
            if groups and not is_swapped(module):
                states[name] = LayerState(name, 0, None)
                self.patch_layer(module, states[name])
            if groups:
                states[name].hold(groups)

    def _freeze(self) -> None:
        heads = self.state.heads.parameters(self.model)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name.rpartition(".")[2] not in ADAPTER_NAMES:
                parameter.requires_grad = id(parameter) in heads and parameter.is_floating_point()


#: How the paths of a module are run, by what it computes; of any other they join the output, as of a norm.
_MIXINS = {PLAIN: PatchedLinear, ANY_NAME: PatchedAnyName, CONV1D: PatchedConv1D, ITSELF: PatchedQuantised,
           WRAPPED: PatchedWrapped}


def _mixin_of(module: nn.Module) -> type:
    return _MIXINS.get(judge(module).way, PatchedNorm)


def _can_run_as_one(linears: Sequence[nn.Module]) -> bool:
    """Whether linears that read one x have one path of it each, and weights that are alike."""
    if not all(isinstance(linear, PatchedLinear) for linear in linears):
        return False
    first = linears[0].weight
    return all([path.site for path in linear._heterolora.paths] == [None] and linear.weight.shape[1] == first.shape[1]
               and linear.weight.dtype == first.dtype and linear.weight.device == first.device for linear in linears)


@keeps_modes
def apply_heterolora(model: nn.Module, config: HeteroLoraConfig) -> nn.Module:
    """Patch the linears of a model in place, freeze everything but adapters and heads, and return the model.

    Right after it, the model computes what it computed before (with ``init_B="zeros"``), or what the adapter of ``init_from``
    makes of it. Parameters keep their identity and the base's keys of the state dict their names. Every path is on at full rank.

    Args:
        model: any module; shortcuts need a layer class of the site table or of ``config.sites``.
        config: see :class:`HeteroLoraConfig`.

    Returns:
        The model itself.

    Raises:
        ValueError, TypeError: names the argument or the module; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, HeteroLoraConfig):
        raise TypeError(f"config must be a HeteroLoraConfig, got {type(config).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        raise ValueError(f"model is wrapped ({type(model).__name__}): call apply_heterolora first, then wrap or compile; a "
                         "wrapper made before does not know the adapters")
    wrapper = distributed.wrapper_of(model)
    if wrapper is not None:
        raise ValueError(f"model is already sharded ({wrapper}): call apply_heterolora first, then fully_shard or "
                         "deepspeed.initialize, which would not know adapters that come later; tensor parallelism is not "
                         "supported")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("apply_heterolora was called under torch.inference_mode: adapters made there can never be trained")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules()):
        raise ValueError("model has adapters of PEFT, whose own linears would get adapters and whose parameters would be frozen: "
                         "take them off first (PEFT's unload), or merge them (merge_and_unload)")
    if any(is_swapped(module) for module in model.modules()):
        raise ValueError("model is already patched: call remove_heterolora(model) first")
    if config.adapter_dtype == torch.float64 and any(p.dtype != torch.float64 for p in model.parameters()
                                                     if p.is_floating_point()):
        raise ValueError("adapter_dtype float64 needs a float64 model")
    try:
        adapter = None if config.init_from is None else read_peft(config.init_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init_from: {error}") from error
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from error
    if adapter is not None:
        adapter = adapter.named_as(model)
        config = adapter.adopted_by(model, config)
    if id(model) in _planned:
        # By plan_paths, a moment ago: its trials of modules serve here too.
        _planned.discard(id(model))
    else:
        forget()
    heads, lora, layers, shortcuts = _plan(model, config)
    modules = dict(model.named_modules())
    for name in {plan.name for plan in lora} | {base for _, _, base in shortcuts}:
        check_swappable(name, modules[name], may_be_wrapped=judge(modules[name]).way == WRAPPED)
        taken = [attribute for attribute in ADAPTER_NAMES if hasattr(modules[name], attribute)]
        if taken:
            raise ValueError(f"module {name!r} already has {taken}: is it an adapter of another library?")
    for layer in layers:
        check_swappable(layer.name, layer.module)
        check_swappable(next(name for name, module in modules.items() if module is layer.stack), layer.stack)

    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    state = HeteroLoraState(config, Switches(Ledger({}), packing=PackBudget(config.pack)), requires_grad=flags,
                            heads=heads, beside=Beside(model))
    with undone_on_failure(state.step_hooks.remove), undone_on_failure(structure_of(model)):
        model.__dict__[STATE_NAME] = state
        _Patcher(model, config, state).run(lora, layers, shortcuts)
        hooked = [module for module, _ in state.hooks]
        state.structure = Structure(model, (*state.linears, *state.layers, *state.stacks, *hooked))
        state.belongs_to(model)
        state.switches.ledger = Ledger(_ledger_rows(state))
        # Now and not at the first forward, which may be one that torch.compile traces.
        for module in state.linears:
            module._heterolora.refresh()
        if getattr(model, "is_quantized", False) and not getattr(model, _HAS_ADAPTERS, False):
            overrides = {_HAS_ADAPTERS: True, "save_pretrained": _SavesAsBefore(model).save_pretrained}
            model.__dict__.update(overrides)
            state.overrides.extend(overrides)
        # The last step: it writes into heads, and undoes that itself.
        if adapter is not None:
            adapter.copy_into(model, state.paths)
        return model


def _plan(model: nn.Module, config: HeteroLoraConfig):
    """Heads, LoRA paths, layers and shortcuts of a config; the model is not changed."""
    heads = find_heads(model, config)
    targets = find_targets(model, config, heads) if len(config.target_modules) > 0 else {}
    lora = plan_lora(targets, config)
    layers = plan_layers(model, config) if config.shortcuts else []
    if config.shortcuts:
        check_shortcut_layers(model, config, layers)
    shortcuts = plan_shortcuts(layers, config)
    if not lora and not shortcuts:
        raise ValueError("rank_pattern sets every adapted module to rank 0: nothing is left to train")
    return heads, lora, layers, shortcuts


#: Models whose plan was made and is about to be carried out.
_planned: set[int] = set()


def plan_paths(model: nn.Module, config: HeteroLoraConfig) -> dict[str, PlannedPath]:
    """The paths that :func:`apply_heterolora` would make of a config, by name. Raises as it does; nothing is warned of."""
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, lora, _, shortcuts = _plan(model, config)
    _planned.add(id(model))
    return {plan.name: plan for plan in (*lora, *(plan for _, plan, _ in shortcuts))}


def _ledger_rows(state: HeteroLoraState) -> dict[str, int]:
    """``{path: r}`` in the order of the modules, the members of a group side by side: they have one probe."""
    rows: dict[str, int] = {}
    for module in state.linears:
        group = module._heterolora.group
        for linear in [module] if group is None or not group.linears else group.linears:
            rows.update({path.name: path.r for path in linear._heterolora.paths})
    return rows


@keeps_modes
def remove_heterolora(model: nn.Module) -> nn.Module:
    """Give back the model that was patched: types, tensors, flags and hooks; the adapters are dropped.

    Args:
        model: a patched model, wrapped or not. Modules of ``modules_to_save`` keep what they learnt: they are its own. If it
            fails, the model stays patched.

    Returns:
        The model inside any wrapper.

    Raises:
        ValueError: it is not patched, or it is sharded.
    """
    model = whole(model)
    state = state_of(model)
    refuse_sharded(model, "remove_heterolora")
    with undone_on_failure(state.renew_hooks), undone_on_failure(structure_of(model)):
        for module, hook_id in state.hooks:
            module._forward_pre_hooks.pop(hook_id, None)
            module._forward_pre_hooks_with_kwargs.pop(hook_id, None)
        # The modules themselves and not their names: somebody may have put others in their places.
        layers = {layer._heterolora.name: layer for layer in state.layers if is_swapped(layer)}
        for path in state.paths.values():
            layer, _, site = path.name.rpartition(".")
            if path.site is not None and layer in layers:
                layers[layer]._modules.pop(site, None)
        for module in (*state.linears, *state.layers, *state.stacks):
            for name in ADAPTER_NAMES:
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
            module.__dict__.pop("_heterolora", None)
            module.__dict__.pop("_heterolora_carriers", None)
            if is_swapped(module):
                restore_class(module)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, flag in state.requires_grad.items():
            if name in parameters:
                parameters[name].requires_grad = flag
        for name in state.overrides:
            model.__dict__.pop(name, None)
        del model.__dict__[STATE_NAME]
        state.step_hooks.remove()
        return model


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError in the name of the function ``what`` if FSDP holds the parameters."""
    if distributed.wrapper_of(model) is not None:
        raise ValueError(f"model is sharded, and FSDP cannot let go of parameters: {what} must be called before it is; "
                         "save_adapter (format='merged' for whole weights) works after it")


@keeps_modes
@torch.no_grad()
def reset_adapters(model: nn.Module) -> None:
    """Draw every adapter anew as right after patching, in place: ranks stay, so a static search can train from fresh weights.

    Args:
        model: a patched model. Optimizers and heads of ``modules_to_save`` are not touched.
    """
    state = state_of(model)
    state.reshard()
    for path in state.paths.values():
        (out_features, r), in_features = path.lora_B.shape, path.lora_A.shape[1]
        fresh = make_adapter(path.name, r, in_features, out_features, state.config.seed, state.config.init_B,
                             path.lora_A.dtype, path.lora_A.device)
        distributed.copy_(path.lora_A, fresh[0])
        distributed.copy_(path.lora_B, fresh[1])


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, bit for bit (heads of ``modules_to_save`` as they are).

    A forward with activation checkpointing must also run its backward inside: what is recomputed outside has the adapters.

    Args:
        model: a patched model, wrapped or not.
    """
    switches = state_of(model).switches
    before, switches.enabled = switches.enabled, False
    try:
        yield
    finally:
        switches.enabled = before


@keeps_modes
def reference_model(model: nn.Module) -> nn.Module:
    """The base model as a module of its own, in eval mode, that shares the frozen weights: ``DPOTrainer(model, ref_model=...)``.

    It costs no memory but for heads of ``modules_to_save``, which are copied as they are now, and buffers. FSDP and DeepSpeed
    take weights apart, which cannot be shared then.

    Args:
        model: a patched model, before a trainer has it.

    Returns:
        The copy.

    Raises:
        ValueError: the model is not patched, or its forward was replaced in the instance.
    """
    model = whole(model)
    try:
        check_swappable("", model)
    except ValueError as error:
        # A closure over the patched model's own forward, which a copy would still call.
        raise ValueError("model has a forward in the instance, as a trainer puts one there: make the reference model before the "
                         "trainer") from error
    heads = state_of(model).heads
    own = heads.parameters(model)
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own})
    # The flags of shared parameters are the patched model's.
    state_of(twin).requires_grad.clear()
    remove_heterolora(twin)
    for parameter in heads.parameters(twin).values():
        parameter.requires_grad_(False)
    return twin.eval()


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[Collector]:
    """Collect the ledger's columns over every backward in the block.

    Args:
        model: a patched model, wrapped or not.

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


def invalidate(model: nn.Module) -> None:
    """Drop the packed copies of frozen weights; the next forward makes them anew.

    Needed after a write through ``.data`` to *a part* of a frozen weight, which nothing sees. In-place operations, loading a
    state, moving the model and writes of a whole weight are seen.

    Args:
        model: a patched model, wrapped or not, or one that :func:`~heterolora_kernels.accelerate_peft` was given.
    """
    fusions = [fusion for fusion in (module.__dict__.get("_heterolora_fusion") for module in model.modules())
               if fusion is not None]
    owners = fusions if fusions and not is_patched(model) else [module._heterolora for module in state_of(model).linears]
    for owner in owners:
        if owner.packs is not None:
            owner.packs.drop()


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``trainable``, ``all`` and ``active``: trainable parameters of heads, and of the active rows of every path."""
    state = state_of(model)
    parameters = {id(p): p for p in unwrap(model).parameters()}
    trainable = sum(distributed.shape_of(p).numel() for p in parameters.values() if p.requires_grad)
    inactive = sum(path.active_rows().count(False) * (distributed.shape_of(path.lora_A)[1] + distributed.shape_of(path.lora_B)[0])
                   for path in state.paths.values())
    return {"trainable": trainable, "all": sum(distributed.shape_of(p).numel() for p in parameters.values()),
            "active": trainable - inactive}


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line, and after it the active parameters: heads, and the rows of every path that are on.

    Args:
        model: a patched model, wrapped or not.
    """
    counts = count_parameters(model)
    print(f"trainable params: {counts['trainable']:,d} || all params: {counts['all']:,d} || trainable%: "
          f"{100 * counts['trainable'] / max(counts['all'], 1):.4f} || active params: {counts['active']:,d}")
