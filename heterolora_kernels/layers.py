"""The patched linear: a base module, the paths that join its output, and what is derived from their masks.

A path's parameters live on its *holder*: the linear itself for its LoRA, a :class:`ShortcutPath` inside the layer for a
shortcut. Beside each ``lora_A`` stands ``lora_mask``, a persistent bool buffer that says which rows are active: it alone is
the truth. scaling, gate, active and the probe are derived from it, on the weight's device, and written in place when ranks
change, so that no compiled graph or captured CUDA graph has to be made again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from heterolora_kernels.backends import resolve
from heterolora_kernels.functional import lora_delta, lora_linear_group
from heterolora_kernels.grouping import MaskGroup
from heterolora_kernels.ops.ledger import NUM_COLUMNS, Ledger
from heterolora_kernels.ops.rng import draw_rng
from heterolora_kernels.packing import PackBudget, Packs
from heterolora_kernels.sites import SHORTCUTS, LayerState

_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Switches:
    """What all patched modules of one model share."""

    ledger: Ledger
    enabled: bool = True
    packing: PackBudget = field(default_factory=PackBudget)


@dataclass
class Path:
    """One low-rank path.

    Attributes:
        name: the linear's name for LoRA, ``<layer>.<site>`` for a shortcut.
        holder: the module with ``lora_A`` [r, K], ``lora_B`` [N, r] and ``lora_mask`` [r].
        site: None for LoRA, else the shortcut's name.
        r: full rank.
        scaling: s.
    """

    name: str
    holder: nn.Module
    site: str | None
    r: int
    scaling: float
    _host: tuple[Tensor, int, tuple[bool, ...]] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        # A copy's mask is another tensor, whose version may be the same by chance.
        return {**self.__dict__, "_host": None}

    @property
    def kind(self) -> str:
        """``"lora"`` or ``"shortcut"``."""
        return "lora" if self.site is None else "shortcut"

    @property
    def lora_A(self) -> Tensor:
        return self.holder.lora_A

    @property
    def lora_B(self) -> Tensor:
        return self.holder.lora_B

    @property
    def mask(self) -> Tensor:
        """bool [r], True for active rows."""
        return self.holder.lora_mask

    def active_rows(self) -> tuple[bool, ...]:
        """The mask on the host; copied from the device only after it changed."""
        mask = self.mask
        if self._host is None or self._host[0] is not mask or self._host[1] != mask._version:
            self._host = (mask, mask._version, tuple(mask.tolist()))
        return self._host[2]

    @property
    def num_parameters(self) -> int:
        """Trainable parameters at full rank."""
        return self.lora_A.numel() + self.lora_B.numel()


@dataclass(eq=False)
class _Derived:
    scaling: Tensor
    gate: Tensor
    active: Tensor
    probe: Tensor
    #: The masks that gate and active were written from, with their versions.
    written: list[tuple[Tensor, int]] = field(default_factory=list)


@dataclass
class PathSet:
    """The paths of one patched module, and how to run them."""

    paths: list[Path]
    switches: Switches
    dropout_p: float = 0.0
    layer: LayerState | None = None
    group: MaskGroup | None = None
    packs: Packs | None = None
    derived: _Derived | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "derived": None}

    def refresh(self) -> None:
        """The module was moved or loaded: derive again, in place where the device is the same.

        While only some of the paths have been moved there is nothing to derive on; the last one to move does it.
        """
        if self.packs is not None:
            self.packs.drop()
        devices = {path.mask.device for path in self.paths}
        if len(devices) > 1:
            self.derived = None
        elif self.derived is None or self.derived.gate.device not in devices:
            self.derive(devices.pop())
        else:
            self.write_masks()

    def write_masks(self) -> None:
        """Write the masks into gate and active, in place."""
        derived = self.derived
        if derived is None:
            return
        masks = [path.mask for path in self.paths]
        with torch.inference_mode(False), torch.no_grad():
            derived.gate.copy_(torch.cat(masks))
            derived.active.copy_(torch.stack([_count_leading(mask) for mask in masks]))
        derived.written = [(mask, mask._version) for mask in masks]

    def derive(self, device: torch.device) -> _Derived:
        """Build scaling, gate, active and the probe on ``device``."""
        total = sum(path.r for path in self.paths)
        # Plain tensors whatever mode the first forward runs in: an inference tensor could never be written in place.
        with torch.inference_mode(False), torch.no_grad():
            probe = torch.zeros(total, NUM_COLUMNS, dtype=torch.float32, device=device, requires_grad=True)
            self.switches.ledger.attach(probe, self.paths[0].name)
            self.derived = _Derived(
                torch.tensor([path.scaling for path in self.paths], dtype=torch.float32, device=device),
                torch.zeros(total, dtype=torch.float32, device=device),
                torch.zeros(len(self.paths), dtype=torch.int32, device=device),
                probe)
        self.write_masks()
        return self.derived

    @contextmanager
    def everything_on(self) -> Iterator[None]:
        """Every row open in the block, by derived tensors of its own: a graph that waits for its backward keeps its own."""
        before = self.derived
        try:
            derived = self.derive(self.paths[0].mask.device)
            with torch.inference_mode(False), torch.no_grad():
                derived.gate.fill_(1.0)
                derived.active.copy_(torch.tensor([path.r for path in self.paths]))
            yield
        finally:
            self.derived = before

    def _current(self, device: torch.device) -> _Derived:
        derived = self.derived if self.derived is not None else self.derive(device)
        # Whoever writes a mask in place (an averaged copy of the model, say) is followed. A compiled graph is not asked.
        if not torch.compiler.is_compiling() and any(
                path.mask is not mask or mask._version != version for path, (mask, version) in zip(self.paths, derived.written)):
            self.write_masks()
        return derived

    def _prepare(self, x: Tensor, training: bool, device: torch.device):
        """Sources, parameters, key of the mask and probe of one call."""
        derived = self._current(device)
        sources = [self.layer.source(SHORTCUTS[path.site][0], path.name).to(x.dtype)
                   for path in self.paths if path.site is not None]
        dropout_p = self.dropout_p if training else 0.0
        probe = derived.probe if self.switches.ledger.collecting and torch.is_grad_enabled() else None
        return derived, sources, [p.lora_A for p in self.paths], [p.lora_B for p in self.paths], dropout_p, probe

    def _draw(self, key: Tensor, dropout_p: float) -> Tensor | None:
        if not dropout_p:
            return None
        return self.group.take(self.paths[0].name, key) if self.group is not None else draw_rng(key.device)

    def run_linear(self, module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """``base(x)`` and all paths in one op. weight: [N, K] as F.linear takes it."""
        key = x
        device_type = x.device.type
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        if autocast and x.dtype in _AUTOCAST_DTYPES:
            dtype = torch.get_autocast_dtype(device_type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        derived, sources, lora_A, lora_B, dropout_p, probe = self._prepare(x, module.training, weight.device)
        rng = self._draw(key, dropout_p)
        path_source, next_source = [], 0
        for path in self.paths:
            path_source.append(-1 if path.site is None else next_source)
            next_source += path.site is not None
        name = resolve(x.device, None, x.dtype)
        # A weight that autocast has just cast is another one in each call.
        packs = [] if autocast or self.packs is None else self.packs.of(name, weight, x)
        call = dict(rng=rng, dropout_p=dropout_p, probe=probe, packs=packs, backend=name)
        args = (x, [weight], [bias], sources, lora_A, lora_B, derived.scaling, derived.gate, derived.active,
                [0] * len(self.paths), path_source)
        if not autocast:
            return lora_linear_group(*args, **call)[0]
        with torch.autocast(device_type, enabled=False):
            return lora_linear_group(*args, **call)[0]

    def run_delta(self, module: nn.Module, base_out: Tensor) -> Tensor:
        """``base_out`` and all paths, for an output that something else computed."""
        device_type = base_out.device.type
        derived, sources, lora_A, lora_B, dropout_p, probe = self._prepare(base_out, module.training, base_out.device)
        args = (base_out, sources, lora_A, lora_B, derived.scaling, derived.gate, derived.active)
        call = dict(rng=self._draw(base_out, dropout_p), dropout_p=dropout_p, probe=probe)
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return lora_delta(*args, **call)
        with torch.autocast(device_type, enabled=False):
            return lora_delta(*args, **call)


def _count_leading(mask: Tensor) -> Tensor:
    """Last open row + 1, as a tensor of no dimension; 0 where all are closed."""
    return (torch.arange(1, mask.shape[0] + 1, dtype=torch.int32, device=mask.device) * mask).max()


class _Refreshes:
    """Whatever moves or loads a module's tensors makes its path set derive again."""

    def _apply(self, fn, recurse=True):
        module = super()._apply(fn, recurse)
        self._heterolora.refresh()
        return module

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._heterolora.refresh()

    def extra_repr(self) -> str:
        """The base's, and the active rows of every path: ``lora=8/8``."""
        paths = [f"{path.site or 'lora'}={sum(path.active_rows())}/{path.r}" for path in self._heterolora.paths]
        return ", ".join(filter(None, [super().extra_repr(), *paths]))

    def _replicate_for_data_parallel(self):
        raise RuntimeError("a patched model cannot run under nn.DataParallel, whose replicas share what a forward captures; "
                           "use DistributedDataParallel (torchrun), or show the process one GPU (CUDA_VISIBLE_DEVICES)")


class PatchedLinear(_Refreshes):
    """Mixin of ``nn.Linear``. ``_heterolora`` is its PathSet."""

    def patched_forward(self, base_forward, input):
        paths = self._heterolora
        return paths.run_linear(self, self.weight, self.bias, input) if paths.switches.enabled else base_forward(self, input)


class PatchedConv1D(_Refreshes):
    """Mixin of transformers' ``Conv1D``, which holds its weight as [K, N]."""

    def patched_forward(self, base_forward, x):
        paths = self._heterolora
        return paths.run_linear(self, self.weight.t(), self.bias, x) if paths.switches.enabled else base_forward(self, x)


class PatchedNorm(_Refreshes):
    """Mixin of a norm that stands between a linear and the residual addition: shortcuts join its output."""

    def patched_forward(self, base_forward, *args, **kwargs):
        out, paths = base_forward(self, *args, **kwargs), self._heterolora
        return paths.run_delta(self, out) if paths.switches.enabled else out


class ShortcutPath(_Refreshes, nn.Module):
    """Holder of one shortcut's parameters; the linear whose output it joins runs it.

    Shapes: lora_A [r, in_features], lora_B [out_features, r].
    """

    def __init__(self, in_features: int, out_features: int, paths: PathSet):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._heterolora = paths

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.lora_mask.shape[0]}"


def path_seed(seed: int, name: str) -> int:
    """Seed of a path's generator: the first 8 bytes of sha256 of ``"<seed>:<name>"``.

    The same whatever the order, the process or the number of paths.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def make_adapter(name: str, r: int, in_features: int, out_features: int, seed: int, init_B: str, dtype: torch.dtype,
                 device: torch.device) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """Fresh ``(lora_A [r, K], lora_B [N, r], lora_mask [r])``, all rows active.

    lora_A is kaiming_uniform(a = sqrt 5), that is uniform in +-1/sqrt(K), as in LoRA's and PEFT's code. lora_B is 0, or
    drawn in the same way over its own fan-in.
    """
    generator = torch.Generator().manual_seed(path_seed(seed, name))

    def draw(rows: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns) if columns else 0.0
        values = torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        return values.to(device=device, dtype=dtype)

    lora_A = draw(r, in_features)
    lora_B = draw(out_features, r) if init_B == "kaiming_uniform" else torch.zeros(out_features, r, dtype=dtype, device=device)
    return nn.Parameter(lora_A), nn.Parameter(lora_B), torch.ones(r, dtype=torch.bool, device=device)
