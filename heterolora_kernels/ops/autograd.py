"""The autograd functions around the ops of every backend.

The statistics leave the backward as the gradient of ``proxy_probe``. Gradients of weights and biases, which LoRA freezes,
are plain matmuls here, outside the kernels: they exist where somebody asks for them.

Arguments are flat, because autograd sees only top-level tensors; ``counts`` says how many of each list follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heterolora_kernels.ops.schema import NAMESPACE, Flags, Needs


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
        needs = Needs.NONE
        for asked, need in ((needs_x, Needs.X), (any(needs_sources), Needs.SOURCES), (any(needs_A), Needs.LORA_A),
                            (any(needs_B), Needs.LORA_B), (needs_probe, Needs.STATISTICS)):
            if asked:
                needs |= need
        grad_outs = list(grad_outs)
        base_lists = (bases,) if ctx.op == "lora_delta" else (bases, packs, biases)
        grad_x, grad_sources, grad_A, grad_B, stats = _op(f"{ctx.op}_backward", ctx.backend)(
            grad_outs, x, *base_lists, sources, lora_A, lora_B, scaling, gate, active, rng, list(ctx.path_output),
            list(ctx.path_source), ctx.dropout_p, ctx.flags, hidden, mask, int(needs))
        if ctx.op == "lora_delta":
            grad_bases = _asked(grad_outs, needs_bases)
        else:
            grad_bases = [grad.t() @ x if asked else None for grad, asked in zip(grad_outs, needs_bases)]
        grad_biases = [grad.sum(0) if asked else None for grad, asked in zip(grad_outs, needs_biases)]
        return (None, None, None, None, None, None, None, stats if needs_probe else None, grad_x if needs_x else None,
                None, None, None, None, *grad_bases, *[None] * n_packs, *grad_biases, *_asked(grad_sources, needs_sources),
                *_asked(grad_A, needs_A), *_asked(grad_B, needs_B))


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
    flags = int(Flags.SAVE | (Flags.STATISTICS if probe is not None else Flags.NONE))
    counts = (len(bases), len(packs), len(biases), len(sources), len(lora_A))
    return list(_LoraOp.apply(op, backend, counts, tuple(path_output), tuple(path_source), dropout_p, flags, probe, x,
                              scaling, gate, active, rng, *tensors))


def call_lora_linear(backend: str, x: Tensor, weights: Sequence[Tensor], packs: Sequence[Tensor], biases: Sequence[Tensor],
                     sources: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor,
                     gate: Tensor, active: Tensor, rng: Tensor | None, path_output: Sequence[int],
                     path_source: Sequence[int], dropout_p: float, probe: Tensor | None = None) -> list[Tensor]:
    """``lora_linear`` of one backend with its gradients; without grad the forward op is called directly.

    Args: as in the op's schema. probe: float32 leaf [R, columns] whose gradient receives the statistics, or None.
    """
    return _call("lora_linear", backend, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng,
                 path_output, path_source, dropout_p, probe)


def call_lora_delta(backend: str, x: Tensor, base_outs: Sequence[Tensor], sources: Sequence[Tensor],
                    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, active: Tensor,
                    rng: Tensor | None, path_output: Sequence[int], path_source: Sequence[int], dropout_p: float,
                    probe: Tensor | None = None) -> list[Tensor]:
    """``lora_delta`` of one backend with its gradients; see :func:`call_lora_linear`."""
    return _call("lora_delta", backend, x, base_outs, (), (), sources, lora_A, lora_B, scaling, gate, active, rng,
                 path_output, path_source, dropout_p, probe)
