"""PEFT's own LoRA layers on the fused op: the model, its parameters and its configuration stay PEFT's.

What is active, merged or disabled is read from the layer in each call, so whatever PEFT changes is followed. A call that the op
does not compute (see :func:`_active_paths` and :func:`_takes`) runs PEFT's forward.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from heterolora_kernels.bases import is_conv1d
from heterolora_kernels.instances import check_swappable, generated_from, restore_class, swap_class
from heterolora_kernels.layers import call_delta, call_linears
from heterolora_kernels.ops.rng import draw_rng
from heterolora_kernels.packing import PackBudget, Packs

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Classes of ``peft.tuners.lora`` whose forward adds ``lora_B(lora_A(dropout(x))) * scaling`` to that of the base layer.
_FORWARDS = {"layer": ("Linear",), "bnb": ("Linear8bitLt", "Linear4bit")}
_NO_LORA = "no adapter is active"


@dataclass
class _ActivePaths:
    """The adapters that are active in a layer, as paths of x."""

    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: list[float | Tensor]
    dropout_p: float


@dataclass(eq=False)
class _Fusion:
    """What a layer keeps between its calls: packs of the base's weight, and the op's vectors for the adapters last active."""

    packs: Packs
    #: (what the vectors were made for, the vectors), set at once: threads may share a model that serves.
    _made: tuple[tuple, tuple[Tensor, Tensor, Tensor]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        return {"packs": self.packs, "_made": None}

    def vectors(self, device: torch.device, paths: _ActivePaths) -> tuple[Tensor, Tensor, Tensor]:
        """(scaling, gate, active) on ``device``: every row is on."""
        ranks = [a.shape[0] for a in paths.lora_A]
        if any([isinstance(s, Tensor) for s in paths.scaling]):
            # A hot swap writes into it: read in each call, and nothing is compiled anew.
            scaling = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=device) for s in paths.scaling])
            return scaling, *_vectors(device, ranks, [])[1:]
        key = (device, ranks, paths.scaling)
        made = self._made
        if made is not None and made[0] == key:
            return made[1]
        if torch.compiler.is_compiling():
            return _vectors(device, ranks, paths.scaling)
        # Plain tensors whatever mode the call runs in: an inference tensor cannot be saved for a backward.
        with torch.inference_mode(False):
            vectors = _vectors(device, ranks, paths.scaling)
        # Not those of FakeTensorMode.
        if type(vectors[0]) is Tensor:
            self._made = key, vectors
        return vectors


def _vectors(device: torch.device, ranks: list[int], scaling: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.tensor(scaling, dtype=torch.float32, device=device),
            torch.ones(sum(ranks), dtype=torch.float32, device=device),
            torch.tensor(ranks, dtype=torch.int32, device=device))


class FusedLora:
    """Mixin of PEFT's LoRA linears. ``_heterolora_fusion`` is its :class:`_Fusion`."""

    def patched_forward(self, base_forward, x, *args, **kwargs):
        # adapter_names (a mixed batch) and the offsets of aLoRA come as keywords.
        paths = _NO_LORA if args or kwargs or _is_watched() else _active_paths(self)
        base = self._modules["base_layer"]
        weight = _plain_weight(base)
        if isinstance(paths, str) or not self.cast_input_dtype_enabled or not _takes(paths, weight, x):
            return base_forward(self, x, *args, **kwargs)
        fusion, dropout_p, path_source = self._heterolora_fusion, paths.dropout_p, [-1] * len(paths.scaling)
        scaling, gate, active = fusion.vectors(x.device, paths)
        call = dict(rng=draw_rng(x.device) if dropout_p else None, dropout_p=dropout_p)
        if weight is None:
            return call_delta(base(x), x, (), paths.lora_A, paths.lora_B, scaling, gate, active, path_source, **call)
        return call_linears(x, [weight], [base._parameters["bias"]], [fusion.packs], (), paths.lora_A, paths.lora_B, scaling,
                            gate, active, [0] * len(path_source), path_source, **call)[0]

    # PEFT writes the weight through `.data`, which counts no version.
    def merge(self, *args, **kwargs):
        self._heterolora_fusion.packs.drop()
        return super().merge(*args, **kwargs)

    def unmerge(self, *args, **kwargs):
        self._heterolora_fusion.packs.drop()
        return super().unmerge(*args, **kwargs)

    def update_layer(self, *args, **kwargs):
        self._heterolora_fusion.packs.drop()
        return super().update_layer(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self._heterolora_fusion.packs.drop()
        return super()._apply(fn, recurse)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in module.__dict__)


def _is_watched() -> bool:
    """Whether hooks of all modules are registered, which see the modules that PEFT calls."""
    known = nn.modules.module
    return bool(known._global_forward_hooks or known._global_forward_pre_hooks or known._global_backward_hooks
                or known._global_backward_pre_hooks)


def _active_paths(layer: nn.Module) -> _ActivePaths | str:
    """The paths of a layer as it is now, or why PEFT's forward has to run."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged"
    modules = layer._modules
    of_A, of_B, of_dropout = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    paths, dropouts = _ActivePaths([], [], [], 0.0), set()
    for name in layer.active_adapters:
        if name not in of_A:
            continue
        variant = layer.lora_variant.get(name)
        if variant is not None:
            return type(variant).__name__.removesuffix("Variant").removesuffix("Linear")
        A, B, dropout = of_A[name], of_B[name], of_dropout[name]
        for module, kinds in ((A, (nn.Linear,)), (B, (nn.Linear,)), (dropout, (nn.Identity, nn.Dropout))):
            if type(module) not in kinds:
                return f"an adapter has a {type(module).__name__}"
            if not _is_plain(module):
                return "hooks on an adapter"
        if B.bias is not None:
            return "lora_bias"
        paths.lora_A.append(A.weight)
        paths.lora_B.append(B.weight)
        scaling = layer.scaling[name]
        if not isinstance(scaling, Tensor):
            scaling = float(scaling)
        elif scaling.requires_grad or scaling.numel() != 1:
            return "a scaling that is trained or is no number"
        paths.scaling.append(scaling if not isinstance(scaling, Tensor) else scaling.detach().reshape(()))
        dropouts.add(dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)
    if not paths.lora_A:
        return _NO_LORA
    if len(dropouts) > 1:
        return "active adapters differ in lora_dropout"
    paths.dropout_p = dropouts.pop()
    return paths


def _takes(paths: _ActivePaths, weight: Tensor | None, x: Tensor) -> bool:
    """Whether the op takes this input: what it does not take is PEFT's to compute or to refuse. weight: of a plain base."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        return False
    for a, b in zip(paths.lora_A, paths.lora_B):
        # A DTensor or a quantised adapter is a class of its own.
        if (type(a) not in (nn.Parameter, Tensor) or type(b) not in (nn.Parameter, Tensor) or a.device != x.device
                or b.device != x.device or a.dtype not in _DTYPES or a.dtype != b.dtype):
            return False
        if a.dtype == torch.float64 and x.dtype != torch.float64:
            return False
    if weight is not None:
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if weight.device != x.device or weight.dtype != x.dtype and not autocast:
            return False
    # The op's scaling is float32.
    return x.dtype != torch.float64 or all(
        not isinstance(s, Tensor) and torch.tensor(s, dtype=torch.float32, device="cpu").item() == s for s in paths.scaling)


def _plain_weight(base: nn.Module) -> Tensor | None:
    """The weight [N, K] of a linear that computes ``x W^T + bias`` and is not watched; None for any other base."""
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or not _is_plain(base):
        return None
    if type(base).forward is nn.Linear.forward:
        return weight
    return weight.t() if is_conv1d(base) else None


def _lora_modules(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """PEFT's LoRA layers by name: those whose forward the op can stand for, and the others."""
    known = sys.modules.get("peft.tuners.lora.layer")
    found = [(name, module) for name, module in model.named_modules() if known and isinstance(module, known.LoraLayer)]
    forwards = []
    for file, names in _FORWARDS.items():
        module = sys.modules.get(f"peft.tuners.lora.{file}")
        forwards += [getattr(module, name).forward for name in names if hasattr(module, name)]
    linears = [entry for entry in found if generated_from(entry[1], FusedLora) or type(entry[1]).forward in forwards]
    return linears, [entry for entry in found if entry not in linears]


def accelerate_peft(model: nn.Module) -> nn.Module:
    """Let the LoRA linears of a PEFT model run on the fused op, in place.

    For models of ``get_peft_model``, ``PeftModel.from_pretrained`` or ``model.add_adapter``. Parameters, their names, files
    and the configuration stay PEFT's, and so do its methods: adapters may be switched, combined, merged, added and deleted.
    Layers that only an adapter added later targets run PEFT's forward until this is called again.

    Without dropout a layer computes what PEFT's does, without its roundings in between. Dropout has masks of its own, and
    adapters that are active together share one. DoRA and other variants, ``lora_bias``, different dropouts in one layer, mixed
    batches, and layers of other kinds keep PEFT's forward; a warning counts those. There are no second derivatives.

    Args:
        model: any module with LoRA layers of PEFT in it.

    Returns:
        The model.

    Raises:
        ValueError: the model has no LoRA layer of PEFT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    linears, others = _lora_modules(model)
    if not linears and not others:
        raise ValueError("model has no LoRA layer of PEFT: wrap it first, with get_peft_model or PeftModel.from_pretrained")
    budget = next((module._heterolora_fusion.packs.budget for _, module in linears if generated_from(module, FusedLora)),
                  PackBudget())
    reasons = Counter(f"{type(module).__name__} layer" for _, module in others)
    for name, module in linears:
        if not generated_from(module, FusedLora):
            try:
                check_swappable(name, module)
            except ValueError:
                reasons["forward of the instance's own"] += 1
                continue
            module._heterolora_fusion = _Fusion(Packs(budget))
            swap_class(module, FusedLora)
        paths = _active_paths(module)
        if isinstance(paths, str):
            reasons[paths] += 1
        else:
            # Now and not at the first forward, which may be one that torch.compile traces.
            module._heterolora_fusion.vectors(paths.lora_A[0].device, paths)
    total = len(linears) + len(others)
    summary = f"{total - reasons.total()} of {total} LoRA layers run on the fused op"
    if reasons:
        listed = ", ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
        warnings.warn(f"{summary}; the others keep PEFT's forward ({listed})", stacklevel=2)
    else:
        _logger.info(summary)
    return model


def restore_peft(model: nn.Module) -> nn.Module:
    """Give PEFT's layers their own forward back.

    Args:
        model: of :func:`accelerate_peft`; one that was not accelerated stays as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if generated_from(module, FusedLora):
            module.__dict__.pop("_heterolora_fusion")
            restore_class(module)
    return model
