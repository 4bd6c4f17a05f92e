"""The patched linear: a base module, the paths that join its output, and what is derived from their masks.

A path's parameters live on its *holder*: the linear itself for its LoRA, a :class:`ShortcutPath` inside the layer for a
shortcut. Beside each ``lora_A`` stands ``lora_mask``, a persistent bool buffer that says which rows are active: it alone is
the truth. scaling, gate, active and the probe are derived from it, on the weight's device, and written in place when ranks
change, so that no compiled graph or captured CUDA graph has to be made again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from heterolora_kernels.backends import resolve
from heterolora_kernels.functional import lora_delta, run_group
from heterolora_kernels.grouping import LinearGroup
from heterolora_kernels.ops.ledger import NUM_COLUMNS, Ledger
from heterolora_kernels.ops.rng import draw_rng
from heterolora_kernels.packing import PackBudget, Packs
from heterolora_kernels.sites import SHORTCUTS, LayerState
from heterolora_kernels.undo import put_back

_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _own(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)`` for a parameter.

    nn.Module's look-up costs as much as a small matmul, in each call of each path. FSDP has a plain attribute there while the
    module runs, a parametrization a property.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    return _own(linear, "weight"), _own(linear, "bias")


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
        return _own(self.holder, "lora_A")

    @property
    def lora_B(self) -> Tensor:
        return _own(self.holder, "lora_B")

    @property
    def mask(self) -> Tensor:
        """bool [r], True for active rows."""
        return self.holder._buffers["lora_mask"]

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
    path_output: list[int]
    path_source: list[int]
    #: The rows of the probe that are one path set's own, where several share it.
    rows: slice | None = None
    everything_on: bool = False
    #: The masks that gate and active were written from, with their versions.
    written: list[tuple[Tensor, int]] = field(default_factory=list)


@dataclass
class PathSet:
    """The paths of one patched module, and how to run them."""

    paths: list[Path]
    switches: Switches
    dropout_p: float = 0.0
    layer: LayerState | None = None
    group: LinearGroup | None = None
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

    def sharing(self, device: torch.device) -> list[PathSet]:
        """The path sets whose derived tensors lie in one: the group's, where all of it is on ``device``."""
        linears = [] if self.group is None else self.group.linears
        sets = [linear._heterolora for linear in linears]
        return sets if sets and all(path.mask.device == device for s in sets for path in s.paths) else [self]

    def derive(self, device: torch.device) -> _Derived:
        """Build scaling, gate, active and the probe on ``device``, with those of the group's other members."""
        sets = self.sharing(device)
        whole = _derive(sets, device)
        if len(sets) > 1:
            self.group.derived = whole
        for paths in sets:
            paths.write_masks()
        return self.derived

    @contextmanager
    def everything_on(self) -> Iterator[None]:
        """Every row open in the block, by derived tensors of its own: a graph that waits for its backward keeps its own.

        Those of the group's other members are then open too, and opening them again changes nothing.
        """
        if self.derived is not None and self.derived.everything_on:
            yield
            return
        device = self.paths[0].mask.device
        sets, group = self.sharing(device), self.group
        before, whole = [paths.derived for paths in sets], None if group is None else group.derived

        def undo() -> None:
            for paths, derived in zip(sets, before):
                paths.derived = derived
            if group is not None:
                group.derived = whole

        with put_back(undo):
            self.derive(device)
            with torch.inference_mode(False), torch.no_grad():
                for paths in sets:
                    paths.derived.everything_on = True
                    paths.derived.gate.fill_(1.0)
                    paths.derived.active.copy_(torch.tensor([path.r for path in paths.paths], device="cpu"))
            yield

    def _current(self, device: torch.device) -> _Derived:
        derived = self.derived if self.derived is not None else self.derive(device)
        # Whoever writes a mask in place (an averaged copy of the model, say) is followed. A compiled graph is not asked.
        if torch.compiler.is_compiling():
            return derived
        if derived.gate.device != device:
            # Moved by a write to `.data`, as FSDP2 brings a model to its devices.
            derived = self.derive(device)
        for path, (mask, version) in zip(self.paths, derived.written):
            if path.mask is not mask or mask._version != version:
                self.write_masks()
                break
        return derived

    def source(self, path: Path) -> Tensor:
        """What a shortcut reads."""
        return self.layer.source(SHORTCUTS[path.site][0], path.name)

    def _probe(self, derived: _Derived) -> Tensor | None:
        if not self.switches.ledger.collecting or not torch.is_grad_enabled():
            return None
        return derived.probe if derived.rows is None else derived.probe[derived.rows]

    def run_linear(self, module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """``base(x)`` and all paths in one op, alone or with its group. weight: [N, K] as F.linear takes it."""
        dropout_p, group = self.dropout_p if module.training else 0.0, self.group
        between = None if group is None else group.running()
        if between is None:
            rng = draw_rng(x.device) if dropout_p else None
            return self._run_alone(weight, bias, x, rng, dropout_p)
        index, collecting = group.members.index(self.paths[0].name), self.switches.ledger.collecting
        turn = group.enter(between, index, x)
        if turn.outs is not None:
            out = group.take(turn, index, x, collecting)
            if out is not None:
                return out
        rng = turn.key(x) if dropout_p else None
        if not group.may_run(turn, module, x):
            return self._run_alone(weight, bias, x, rng, dropout_p)
        members, device = [(linear._heterolora, *_weight_and_bias(linear)) for linear in group.linears], weight.device
        parts = [paths._current(device) for paths, _, _ in members]
        derived = group.derived
        if derived is None or any([part.probe is not derived.probe for part in parts]):
            return self._run_alone(weight, bias, x, rng, dropout_p)
        outs = _run_linears(members, derived, self._probe(derived), x, rng, dropout_p)
        return group.hold(turn, index, outs, collecting)

    def _run_alone(self, weight: Tensor, bias: Tensor | None, x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
        derived = self._current(weight.device)
        return _run_linears([(self, weight, bias)], derived, self._probe(derived), x, rng, dropout_p)[0]

    def run_delta(self, module: nn.Module, base_out: Tensor, x: Tensor | None = None) -> Tensor:
        """``base_out`` and all paths, for an output that something else computed. x: what the linear's own path reads."""
        derived, group = self._current(base_out.device), self.group
        dropout_p, rng = self.dropout_p if module.training else 0.0, None
        turn = None
        between = None if group is None else group.running()
        if between is not None:
            turn = group.enter(between, group.members.index(self.paths[0].name), x)
        if dropout_p:
            rng = draw_rng(base_out.device) if turn is None else turn.key(x)
        path_source = derived.path_source
        return call_delta(base_out, x if -1 in path_source else None, *_gather([self]), derived.scaling, derived.gate,
                          derived.active, path_source, rng=rng, dropout_p=dropout_p, probe=self._probe(derived))


def _gather(sets: Sequence[PathSet]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """sources, lora_A and lora_B of all paths, as the op takes them."""
    sources, lora_A, lora_B = [], [], []
    for paths in sets:
        for path in paths.paths:
            lora_A.append(path.lora_A)
            lora_B.append(path.lora_B)
            if path.site is not None:
                sources.append(paths.source(path))
    return sources, lora_A, lora_B


def _path_source(paths: Sequence[Path]) -> list[int]:
    """For each path -1 or the place of its source, in the order of :func:`_gather`."""
    places = count()
    return [-1 if path.site is None else next(places) for path in paths]


def _derive(sets: Sequence[PathSet], device: torch.device) -> _Derived:
    """Derived tensors over the paths of all sets; each set gets its part of them, as views, before any mask is written."""
    paths = [path for s in sets for path in s.paths]
    total = sum(path.r for path in paths)
    # Plain tensors whatever mode the first forward runs in: an inference tensor could never be written in place.
    with torch.inference_mode(False), torch.no_grad():
        probe = torch.zeros(total, NUM_COLUMNS, dtype=torch.float32, device=device, requires_grad=True)
        sets[0].switches.ledger.attach(probe, paths[0].name)
        whole = _Derived(
            torch.tensor([path.scaling for path in paths], dtype=torch.float32, device=device),
            torch.zeros(total, dtype=torch.float32, device=device),
            torch.zeros(len(paths), dtype=torch.int32, device=device),
            probe, [output for output, s in enumerate(sets) for _ in s.paths], _path_source(paths))
        if len(sets) == 1:
            sets[0].derived = whole
            return whole
        first, row = 0, 0
        for s in sets:
            end, last_row = first + len(s.paths), row + sum(path.r for path in s.paths)
            s.derived = _Derived(whole.scaling[first:end], whole.gate[row:last_row], whole.active[first:end], probe,
                                 [0] * len(s.paths), _path_source(s.paths), slice(row, last_row))
            first, row = end, last_row
    return whole


def _run_linears(members: Sequence[tuple[PathSet, Tensor, Tensor | None]], derived: _Derived, probe: Tensor | None, x: Tensor,
                 rng: Tensor | None, dropout_p: float) -> list[Tensor]:
    """Every member's output in one op. members: (path set, weight, bias) of each; derived and probe: over all their paths."""
    sources, lora_A, lora_B = _gather([paths for paths, _, _ in members])
    return call_linears(x, [weight for _, weight, _ in members], [bias for _, _, bias in members],
                        [paths.packs for paths, _, _ in members], sources, lora_A, lora_B, derived.scaling, derived.gate,
                        derived.active, derived.path_output, derived.path_source, rng=rng, dropout_p=dropout_p, probe=probe)


def call_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], packs: Sequence[Packs | None],
                 sources: Sequence[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], scaling: Tensor, gate: Tensor,
                 active: Tensor, path_output: list[int], path_source: list[int], *, rng: Tensor | None,
                 dropout_p: float, probe: Tensor | None = None) -> list[Tensor]:
    """:func:`~heterolora_kernels.functional.lora_linear_group` as a module calls it: under autocast in its dtype and with it off
    inside, with the packs of each weight (those of ``packs``, or None), sources in the dtype of x."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        backend = resolve(x.device, None, x.dtype)
        return run_group(backend, x, weights, _packs_of(packs, backend, weights, x), biases, [u.to(x.dtype) for u in sources],
                         lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, probe)
    if x.dtype in _AUTOCAST_DTYPES:
        dtype = torch.get_autocast_dtype(device_type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    sources = [source.to(x.dtype) for source in sources]
    # Without packs: a weight that autocast has just cast is another one in each call.
    with torch.autocast(device_type, enabled=False):
        return run_group(resolve(x.device, None, x.dtype), x, weights, [], biases, sources, lora_A, lora_B, scaling, gate, active,
                         rng, path_output, path_source, dropout_p, probe)


def call_delta(base_out: Tensor, x: Tensor | None, sources: Sequence[Tensor], lora_A: Sequence[Tensor],
               lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, active: Tensor, path_source: Sequence[int], *,
               rng: Tensor | None, dropout_p: float, probe: Tensor | None = None) -> Tensor:
    """:func:`~heterolora_kernels.functional.lora_delta` as a module calls it: x and sources in the dtype of base_out, autocast
    off inside."""
    device_type, dtype = base_out.device.type, base_out.dtype
    args = (base_out, [source.to(dtype) for source in sources], lora_A, lora_B, scaling, gate, active)
    call = dict(x=None if x is None else x.to(dtype), path_source=path_source, rng=rng, dropout_p=dropout_p, probe=probe)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return lora_delta(*args, **call)
    with torch.autocast(device_type, enabled=False):
        return lora_delta(*args, **call)


def _packs_of(owners: Sequence[Packs | None], backend: str, weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Two packs per weight, empty ones where a weight has none; an empty list where none has."""
    if len(owners) == 1:
        return [] if owners[0] is None else owners[0].of(backend, weights[0], x)
    found = [[] if packs is None else packs.of(backend, weight, x) for packs, weight in zip(owners, weights)]
    if not any(found):
        return []
    nothing = weights[0].new_empty((0,), dtype=torch.uint8)
    return [pack for pair in found for pack in pair or (nothing, nothing)]


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
        return paths.run_linear(self, *_weight_and_bias(self), input) if paths.switches.enabled else base_forward(self, input)


class PatchedConv1D(_Refreshes):
    """Mixin of transformers' ``Conv1D``, which holds its weight as [K, N]."""

    def patched_forward(self, base_forward, x):
        paths = self._heterolora
        return paths.run_linear(self, self.weight.t(), self.bias, x) if paths.switches.enabled else base_forward(self, x)


class PatchedQuantised(_Refreshes):
    """Mixin of a linear with quantised weights, which computes its output itself: the paths join it."""

    #: bitsandbytes asks this before it packs 4-bit weights for inference, in the first forward in eval mode whose input asks for
    #: no gradient. From then on its linears have no backward, and say nothing.
    support_avx512bf16_for_cpu = property(lambda self: False)

    def patched_forward(self, base_forward, *args, **kwargs):
        out, paths = base_forward(self, *args, **kwargs), self._heterolora
        # Libraries differ in its name.
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.is_grad_enabled() and x.requires_grad and not out.requires_grad:
            raise RuntimeError(f"the base of {paths.paths[0].name!r} ({type(self).__name__}) gives no gradient to its "
                               "input, so nothing before it would learn; has a library packed its weights for inference?")
        return paths.run_delta(self, out, x) if paths.switches.enabled else out


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
    # On the CPU whatever the default device: the values must not depend on it.
    generator = torch.Generator("cpu").manual_seed(path_seed(seed, name))

    def draw(rows: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns) if columns else 0.0
        values = torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        return values.to(device=device, dtype=dtype)

    lora_A = draw(r, in_features)
    lora_B = draw(out_features, r) if init_B == "kaiming_uniform" else torch.zeros(out_features, r, dtype=dtype, device=device)
    return nn.Parameter(lora_A), nn.Parameter(lora_B), torch.ones(r, dtype=torch.bool, device=device)
