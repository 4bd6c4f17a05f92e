"""What patching adds to a model, and how it is found: also inside wrappers and in copies."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn

from heterolora_kernels import distributed
from heterolora_kernels.beside import Beside
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.freezing import StepHooks
from heterolora_kernels.heads import Heads
from heterolora_kernels.layers import Path, Switches
from heterolora_kernels.reach import Reach
from heterolora_kernels.structure import PEFT_REMEDY, Structure, peft_layers, refuse_peft_beside

#: Leaves of the names of a path's tensors.
ADAPTER_NAMES = ("lora_A", "lora_B", "lora_mask")
#: Where it stands in the ``__dict__`` of the patched module.
STATE_NAME = "_heterolora_state"


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
        structure: where the patched modules lay in the model.
        heads: the modules of ``modules_to_save``.
        beside: what else is trained.
        reach: which paths training reaches.
        overrides: names of attributes that were put into the model's ``__dict__`` later, and go with the patch.
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
    structure: Structure | None = None
    heads: Heads | None = None
    beside: Beside | None = None
    reach: Reach = field(default_factory=Reach)
    overrides: list[str] = field(default_factory=list)
    _model: weakref.ref | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None}

    def __post_init__(self) -> None:
        self._register_hooks()

    def __setstate__(self, state: dict) -> None:
        # A copy gets hooks of its own: it is trained by optimizers of its own.
        self.__dict__.update(state)
        self._register_hooks()

    def _register_hooks(self) -> None:
        self.step_hooks.register(weakref.ref(self))

    def renew_hooks(self) -> None:
        """The optimizer hooks are there, once, whatever became of them."""
        self.step_hooks.remove()
        self._register_hooks()

    @property
    def device(self) -> torch.device:
        """Where numbers about all paths are brought together: the first path's device."""
        return next(iter(self.paths.values())).lora_A.device

    def belongs_to(self, model: nn.Module) -> None:
        """Know the model, also as a copy."""
        self._model = weakref.ref(model)

    def is_own(self, name: str) -> bool:
        """Tell whether a parameter or buffer is an adapter's or a head's, by its name in the model."""
        return name.rpartition(".")[2] in ADAPTER_NAMES or self.heads.has(name)

    def notice(self, optimizer: torch.optim.Optimizer, paths: Sequence[Path]) -> None:
        """Remember what an optimizer trains: which paths had a gradient, and what is neither adapter nor head."""
        model = None if self._model is None else self._model()
        self.reach.observe(paths)
        if model is not None:
            self.beside.notice(model, optimizer, self.is_own, self.paths.values())
            if not self.reach.is_told and distributed.is_first():
                self.reach.tell(model)

    def check_structure(self, alone: bool = False, searched: bool = False) -> None:
        """Refuse a model in which somebody has moved or replaced patched modules.

        Args:
            alone: refuse adapters of PEFT in it too.
            searched: refuse engines under which ranks cannot be chosen, where the config means to.

        Raises:
            ValueError: names the modules, and the remedy.
        """
        model = None if self._model is None else self._model()
        if model is not None and self.structure is not None:
            if alone:
                refuse_peft_beside(model)
            self.structure.check(model)
        if searched and self.config.search != "off":
            distributed.refuse_zero(next(iter(self.paths.values())).lora_A, "search")

    def reshard(self) -> None:
        """Let FSDP2 put the sharded parameters in their places, those that optimizers hold."""
        model = None if self._model is None else self._model()
        if model is not None:
            distributed.reshard(model)

    def write_masks(self) -> None:
        """Bring the derived tensors of every module in line with the masks."""
        for module in self.linears:
            module._heterolora.write_masks()

    def paths_of_zero_B(self) -> list[str]:
        """Names of the paths whose lora_B is 0; a collective where there are several processes."""
        lives = torch.stack([distributed.local_part(path.lora_B)[0].any().to(self.device, torch.int32)
                             for path in self.paths.values()])
        return [name for name, on in zip(self.paths, distributed.sum_(lives).tolist()) if not on]

    def rows(self) -> dict[str, tuple[bool, ...]]:
        """Which rows of each path are active."""
        return {name: path.active_rows() for name, path in self.paths.items()}

    def masks_of(self, ranks: Mapping[str, int | Tensor | Iterable[bool]]) -> dict[str, Tensor]:
        """The bool masks [r] that ``{path: first k rows or mask}`` means.

        Raises:
            ValueError: an unknown path, or a rank outside 0 ... r.
        """
        masks: dict[str, Tensor] = {}
        for name, value in ranks.items():
            if name not in self.paths:
                raise ValueError(f"ranks: there is no path {name!r}")
            path = self.paths[name]
            if isinstance(value, Integral) and not isinstance(value, bool):
                if not 0 <= value <= path.r:
                    raise ValueError(f"ranks[{name!r}] must be in 0 ... {path.r}, got {value}")
                masks[name] = torch.arange(path.r, device="cpu") < int(value)
            else:
                mask = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
                if mask.dtype != torch.bool or tuple(mask.shape) != (path.r,):
                    raise ValueError(f"ranks[{name!r}] must be an int or a bool mask of shape [{path.r}], "
                                     f"got {mask.dtype} of shape {list(mask.shape)}")
                masks[name] = mask
        return masks


def whole(model: nn.Module) -> nn.Module:
    """The patched module inside DDP's and torch.compile's wrappers.

    Raises:
        ValueError: the model is not patched, or only a part of it is, which is named.
    """
    inner = inside_wrappers(model)
    if STATE_NAME not in inner.__dict__:
        raise ValueError(_why_unpatched(model))
    return inner


def unwrap(model: nn.Module) -> nn.Module:
    """The same, or the one part of the model that is patched: an encoder in a model of somebody's own.

    Raises:
        ValueError: nothing is patched, or several parts are.
    """
    inner = inside_wrappers(model)
    if STATE_NAME in inner.__dict__:
        return inner
    parts = [module for module in inner.modules() if STATE_NAME in module.__dict__]
    if len(parts) != 1 or peft_layers(inner):
        raise ValueError(_why_unpatched(model))
    return parts[0]


def inside_wrappers(model: nn.Module) -> nn.Module:
    """What DDP's and torch.compile's wrappers hold, down to a patched module where one is met."""
    while STATE_NAME not in model.__dict__:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _why_unpatched(model: nn.Module) -> str:
    inside = [name for name, module in model.named_modules() if STATE_NAME in module.__dict__]
    if not inside:
        return "model is not patched: call apply_heterolora(model, config) first"
    if peft_layers(model):
        return f"model is PEFT's {type(model).__name__} around a patched model (at {inside[0]!r}). {PEFT_REMEDY}"
    if len(inside) > 1:
        return (f"model is not patched, but its parts {inside} are: pass one of them, model.get_submodule({inside[0]!r}), or "
                "patch the whole model")
    return (f"model is not patched, but its part {inside[0]!r} is: pass that part, model.get_submodule({inside[0]!r}), or "
            "patch the whole model")


def is_patched(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, is patched as a whole."""
    return STATE_NAME in inside_wrappers(model).__dict__


def state_of(model: nn.Module) -> HeteroLoraState:
    """The patched model's state.

    Raises:
        ValueError: the model is not patched.
    """
    inner = unwrap(model)
    state = inner.__dict__[STATE_NAME]
    state.belongs_to(inner)
    return state
