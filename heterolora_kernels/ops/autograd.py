"""The autograd functions around the ops of every backend.

The statistics leave the backward as the gradient of ``proxy_probe``. Gradients of weights and biases, which LoRA freezes,
are plain matmuls here, outside the kernels: they exist where somebody asks for them. An output that the loss does not use is
left out of the backward, with its paths: its parameters get None, as they would from a linear of its own.

Arguments are flat, because autograd sees only top-level tensors; ``counts`` says how many of each list follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from heterolora_kernels.ops import composite
from heterolora_kernels.ops.schema import NAMESPACE, Flags, Needs, hidden_offsets, mask_offsets, rank_offsets

# As plain numbers: an IntFlag's operators cost a microsecond each, in every call.
_SAVE, _SAVE_STATISTICS = int(Flags.SAVE), int(Flags.SAVE | Flags.STATISTICS)
_X, _SOURCES, _LORA_A, _LORA_B, _STATISTICS = map(int, (Needs.X, Needs.SOURCES, Needs.LORA_A, Needs.LORA_B, Needs.STATISTICS))


#: Per op and backend: what a backend brings in the place of the functions here.
_compiled: dict[tuple[str, str], Callable] = {}


def register_compiled(backend: str, lora_linear: Callable, lora_delta: Callable) -> None:
    """Call these functions of a backend instead of the ones below wherever nothing is traced.

    They take the arguments of :func:`call_lora_linear` and :func:`call_lora_delta` after the backend, in order, and return what
    those do, or NotImplemented for tensors that are not theirs to take.
    """
    _compiled["lora_linear", backend], _compiled["lora_delta", backend] = lora_linear, lora_delta


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    lists, first = [], 0
    for count in counts:
        lists.append(list(tensors[first:first + count]))
        first += count
    return lists


def _op(name: str, backend: str):
    return getattr(getattr(torch.ops, NAMESPACE), f"{name}_{backend}").default


def _asked(grads: Sequence[Tensor], asked: Sequence[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, asked)]


class _LoraOp(torch.autograd.Function):
    """``lora_linear`` or ``lora_delta``; ``counts`` = numbers of weights (or base_outs), packs, biases, sources, paths."""

    @staticmethod
    def forward(ctx, op, backend, counts, path_output, path_source, dropout_p, flags, probe, x, scaling, gate, active, rng,
                *tensors):
        n_bases, n_packs, n_biases, n_sources, n_paths = counts
        bases, packs, biases, sources, lora_A, lora_B = _split(
            tensors, (n_bases, n_packs, n_biases, n_sources, n_paths, n_paths))
        base_lists = (bases,) if op == "lora_delta" else (bases, packs, biases)
        outs, hidden, mask = _op(op, backend)(x, *base_lists, sources, lora_A, lora_B, scaling, gate, active, rng,
                                              list(path_output), list(path_source), dropout_p, flags)
        # Zeros in the place of an unused output's gradient would cost its matmuls, and 0 * inf is nan.
        ctx.set_materialize_grads(False)
        ctx.op, ctx.backend, ctx.counts = op, backend, counts
        ctx.path_output, ctx.path_source, ctx.dropout_p, ctx.flags = path_output, path_source, dropout_p, flags
        ctx.save_for_backward(x, scaling, gate, active, rng, hidden, mask, *tensors)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outs):
        x, scaling, gate, active, rng, hidden, mask, *tensors = ctx.saved_tensors
        n_bases, n_packs, n_biases, n_sources, n_paths = ctx.counts
        bases, packs, biases, sources, lora_A, lora_B = _split(
            tensors, (n_bases, n_packs, n_biases, n_sources, n_paths, n_paths))
        # The first eight arguments: op, backend, counts, path_output, path_source, dropout_p, flags, probe.
        needs_probe, needs_x = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
        needs_bases, _, needs_biases, needs_sources, needs_A, needs_B = _split(
            ctx.needs_input_grad[13:], (n_bases, n_packs, n_biases, n_sources, n_paths, n_paths))
        needs = (needs_x * _X | any(needs_sources) * _SOURCES | any(needs_A) * _LORA_A | any(needs_B) * _LORA_B
                 | needs_probe * _STATISTICS)
        used = [i for i, grad in enumerate(grad_outs) if grad is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        call = _Backward(x, bases, packs, biases, sources, lora_A, lora_B, scaling, gate, active, list(ctx.path_output),
                         list(ctx.path_source), hidden, mask)
        part = call if len(used) == len(grad_outs) else call.of_outputs(used, ctx.dropout_p)
        base_lists = (part.bases,) if ctx.op == "lora_delta" else (part.bases, part.packs, part.biases)
        grad_x, grad_sources, grad_A, grad_B, stats = _op(f"{ctx.op}_backward", ctx.backend)(
            [grad_outs[i] for i in used], x, *base_lists, part.sources, part.lora_A, part.lora_B, part.scaling, part.gate,
            part.active, rng, part.path_output, part.path_source, ctx.dropout_p, ctx.flags, part.hidden, part.mask, needs)
        if part is not call:
            grad_sources, grad_A, grad_B, stats = part.spread(call, grad_sources, grad_A, grad_B, stats)
        if ctx.op == "lora_delta":
            grad_bases = _asked(grad_outs, needs_bases)
        else:
            grad_bases = [grad.t() @ x if asked and grad is not None else None for grad, asked in zip(grad_outs, needs_bases)]
        grad_biases = [grad.sum(0) if asked and grad is not None else None for grad, asked in zip(grad_outs, needs_biases)]
        return (None, None, None, None, None, None, None, stats if needs_probe else None, grad_x if needs_x else None,
                None, None, None, None, *grad_bases, *[None] * n_packs, *grad_biases, *_asked(grad_sources, needs_sources),
                *_asked(grad_A, needs_A), *_asked(grad_B, needs_B))


@dataclass
class _Backward:
    """The tensors of a backward that depend on which outputs take part."""

    x: Tensor
    bases: list[Tensor]
    packs: list[Tensor]
    biases: list[Tensor]
    sources: list[Tensor]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: Tensor
    gate: Tensor
    active: Tensor
    path_output: list[int]
    path_source: list[int]
    hidden: Tensor
    mask: Tensor
    #: Of the whole call, in a part of it: its paths and sources.
    paths: list[int] = field(default_factory=list)
    kept_sources: list[int] = field(default_factory=list)

    def of_outputs(self, used: list[int], dropout_p: float) -> _Backward:
        """The same call with the outputs ``used`` alone."""
        paths = [p for p, output in enumerate(self.path_output) if output in used]
        kept = [j for j in range(len(self.sources)) if any(self.path_source[p] == j for p in paths)]
        ranks = [a.shape[0] for a in self.lora_A]
        columns, rows = hidden_offsets(ranks), rank_offsets(ranks)
        offsets = mask_offsets(self.x, self.sources, self.path_source) if dropout_p > 0 else {}
        read = [key for key in offsets if any(self.path_source[p] == key for p in paths)]

        def joined(tensor: Tensor, bounds: list[tuple[int, int]], dim: int) -> Tensor:
            return torch.cat([tensor.narrow(dim, first, end - first) for first, end in bounds or [(0, 0)]], dim)

        return _Backward(
            self.x, [self.bases[i] for i in used], [self.packs[2 * i + k] for i in used for k in (0, 1)] if self.packs else [],
            [self.biases[i] for i in used] if self.biases else [], [self.sources[j] for j in kept],
            [self.lora_A[p] for p in paths], [self.lora_B[p] for p in paths],
            joined(self.scaling, [(p, p + 1) for p in paths], 0), joined(self.gate, [(rows[p], rows[p + 1]) for p in paths], 0),
            joined(self.active, [(p, p + 1) for p in paths], 0), [used.index(self.path_output[p]) for p in paths],
            [-1 if self.path_source[p] == -1 else kept.index(self.path_source[p]) for p in paths],
            joined(self.hidden, [(columns[p], columns[p + 1]) for p in paths], 1),
            joined(self.mask, [offsets[key] for key in read], 1) if dropout_p > 0 else self.mask, paths, kept)

    def spread(self, whole: _Backward, grad_sources: list[Tensor], grad_A: list[Tensor], grad_B: list[Tensor], stats: Tensor):
        """Results of this part in the places of the whole call; None, or 0 in the statistics, elsewhere."""
        def places(found: list[Tensor], where: list[int], count: int) -> list[Tensor | None]:
            return [found[where.index(i)] if i in where else None for i in range(count)]

        count, rows = len(whole.lora_A), rank_offsets([a.shape[0] for a in whole.lora_A])
        if stats.numel() > 0:
            parts = dict(zip(self.paths, stats.split([a.shape[0] for a in self.lora_A])))
            stats = torch.cat([parts[p] if p in parts else stats.new_zeros(rows[p + 1] - rows[p], stats.shape[1])
                               for p in range(count)])
        elif stats.dim() == 2:
            stats = stats.new_zeros(rows[-1], stats.shape[1])
        return (places(grad_sources, self.kept_sources, len(whole.sources)), places(grad_A, self.paths, count),
                places(grad_B, self.paths, count), stats)


def _call(op: str, backend: str, x: Tensor, bases: Sequence[Tensor], packs: Sequence[Tensor], biases: Sequence[Tensor],
          sources: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor,
          active: Tensor, rng: Tensor | None, path_output: Sequence[int], path_source: Sequence[int], dropout_p: float,
          probe: Tensor | None) -> list[Tensor]:
    tensors = (*bases, *packs, *biases, *sources, *lora_A, *lora_B)
    if not torch.is_grad_enabled() or not (x.requires_grad or any([t.requires_grad for t in tensors])
                                           or (probe is not None and probe.requires_grad)):
        base_lists = (bases,) if op == "lora_delta" else (bases, packs, biases)
        return _op(op, backend)(x, *base_lists, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                                path_source, dropout_p, 0)[0]
    flags = _SAVE if probe is None else _SAVE_STATISTICS
    counts = (len(bases), len(packs), len(biases), len(sources), len(lora_A))
    return list(_LoraOp.apply(op, backend, counts, tuple(path_output), tuple(path_source), dropout_p, flags, probe, x,
                              scaling, gate, active, rng, *tensors))


def _is_composite(x: Tensor) -> bool:
    """Whether the call must be one of torch's own operations: under a transform of torch.func, inside a level of forward-mode
    differentiation, or for tensors that the ops do not know (nested, sparse, mkldnn)."""
    if torch.compiler.is_compiling():
        return False
    return (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or x.is_nested
            or x.layout != torch.strided)


def _flat(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K], which the ops take."""
    return tensor if tensor.dim() in (0, 2) else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _shaped(out: Tensor, like: Tensor) -> Tensor:
    """[M, N] with the leading dimensions of ``like`` in the place of M."""
    return out if like.dim() == 2 else out.reshape(*like.shape[:-1], out.shape[-1])


def call_lora_linear(backend: str, x: Tensor, weights: Sequence[Tensor], packs: Sequence[Tensor], biases: Sequence[Tensor],
                     sources: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor,
                     gate: Tensor, active: Tensor, rng: Tensor | None, path_output: Sequence[int],
                     path_source: Sequence[int], dropout_p: float, probe: Tensor | None = None) -> list[Tensor]:
    """``lora_linear`` of one backend with its gradients; without grad the forward op is called directly.

    Args: as in the op's schema, but x and sources may have any leading dimensions, of as many rows; probe: float32 leaf [R,
        columns] whose gradient receives the statistics, or None.

    Returns:
        [..., N_i] each, with the leading dimensions of x.
    """
    compiled = None if torch.compiler.is_compiling() else _compiled.get(("lora_linear", backend))
    if compiled is not None:
        outs = compiled(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                        dropout_p, probe)
        if outs is not NotImplemented:
            return outs
    if _is_composite(x):
        return composite.lora_linear(x, weights, biases, sources, lora_A, lora_B, scaling, gate, rng, path_output, path_source,
                                     dropout_p, probe)
    outs = _call("lora_linear", backend, _flat(x), weights, packs, biases, [_flat(u) for u in sources], lora_A, lora_B, scaling,
                 gate, active, rng, path_output, path_source, dropout_p, probe)
    return [_shaped(out, x) for out in outs]


def call_lora_delta(backend: str, x: Tensor, base_outs: Sequence[Tensor], sources: Sequence[Tensor],
                    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, active: Tensor,
                    rng: Tensor | None, path_output: Sequence[int], path_source: Sequence[int], dropout_p: float,
                    probe: Tensor | None = None) -> list[Tensor]:
    """``lora_delta`` of one backend with its gradients, every output like its base_out; see :func:`call_lora_linear`."""
    compiled = None if torch.compiler.is_compiling() else _compiled.get(("lora_delta", backend))
    if compiled is not None:
        outs = compiled(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p,
                        probe)
        if outs is not NotImplemented:
            return outs
    if _is_composite(base_outs[0]):
        return composite.lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, rng, path_output, path_source,
                                    dropout_p,
                                    probe)
    outs = _call("lora_delta", backend, _flat(x), [_flat(out) for out in base_outs], (), (), [_flat(u) for u in sources], lora_A,
                 lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, probe)
    return [_shaped(out, base_out) for out, base_out in zip(outs, base_outs)]
