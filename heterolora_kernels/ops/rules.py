"""What torch asks about the ops beside their values: how they batch, and how many operations they count as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula


def register_rules(library: torch.library.Library, op: str, packet: torch._ops.OpOverloadPacket) -> None:
    """Register the vmap rule and the FLOP formula of one op.

    Args:
        op: its name without the backend.
        packet: the op itself.
    """
    name, op_itself = packet._qualified_op_name, packet.default

    def rule(info, in_dims, *args):
        values, spec = tree_flatten(args)
        dims = [dim for arg, given in zip(args, in_dims) for dim in _spread(arg, given)]
        stacked, shape = _one_by_one(op_itself, values, dims, spec, info.batch_size)
        return tree_unflatten(stacked, shape), tree_unflatten([0] * len(stacked), shape)

    def legacy_rule(*args):
        return _batched_by_autograd(op_itself, args)

    torch.library.register_vmap(name, rule, lib=library)
    library.impl(name.partition("::")[2], legacy_rule, "Batched")
    register_flop_formula(packet)(_FLOPS[op])


def _one_by_one(op: Callable, values: Sequence, dims: Sequence[int | None], spec, size: int) -> tuple[list[Tensor], object]:
    """A call for every entry of the batch, each exactly what it would be alone; results stacked along a first dimension."""
    results = []
    for index in range(size):
        entry = [value if dim is None else value.select(dim, index).contiguous() for value, dim in zip(values, dims)]
        flat, shape = tree_flatten(op(*tree_unflatten(entry, spec)))
        results.append(flat)
    return [torch.stack(entries) for entries in zip(*results)], shape


def _spread(arg: object, dims: object) -> list[int | None]:
    """One dimension for every leaf of an argument; None: it has no batch."""
    leaves = tree_flatten(arg)[0]
    given = tree_flatten(dims, is_leaf=lambda dim: dim is None)[0]
    return given if len(given) == len(leaves) else [None] * len(leaves)


def _batched_by_autograd(op: Callable, args: tuple):
    """The rule for ``is_grads_batched`` of ``torch.autograd.grad`` (and ``vectorize`` of ``torch.autograd.functional``), whose
    batches are of another kind than torch.func's and have no public interface."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    values, spec = tree_flatten(args)
    is_batched = [isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value) for value in values]
    while level > 0:
        # A tensor that has no batch of this level gets one of size 1.
        opened = [torch._remove_batch_dim(value, level, 1, 0) if batched else value for value, batched in zip(values, is_batched)]
        size = max(value.shape[0] for value, batched in zip(opened, is_batched) if batched)
        has = [batched and value.shape[0] == size for value, batched in zip(opened, is_batched)]
        if size > 1 or level == 1:
            break
        level -= 1
    values = [value.squeeze(0) if batched and not own else value for value, batched, own in zip(opened, is_batched, has)]
    stacked, shape = _one_by_one(op, values, [0 if own else None for own in has], spec, size)
    return tree_unflatten([torch._add_batch_dim(out, 0, level) for out in stacked], shape)


def _low_rank(x_shape: Sequence[int], in_features: Sequence[int], out_features: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiplications and additions of ``drop(u) A^T`` and ``h B^T``, every row computed."""
    return sum(2 * x_shape[0] * r * (k + n) for k, n, r in zip(in_features, out_features, ranks))


def _sizes(lora_A: Sequence, lora_B: Sequence) -> tuple[list[int], list[int], list[int]]:
    return [a[1] for a in lora_A], [b[0] for b in lora_B], [a[0] for a in lora_A]


def _linear(x, weights, packs, biases, sources, lora_A, lora_B, *args, out_shape=None, **kwargs) -> int:
    base = sum(2 * x[0] * n * k for n, k in weights)
    return base + _low_rank(x, *_sizes(lora_A, lora_B))


def _delta(x, base_outs, sources, lora_A, lora_B, *args, out_shape=None, **kwargs) -> int:
    return _low_rank(x, *_sizes(lora_A, lora_B))


def _asked_for(x, lora_A, lora_B, path_source: Sequence[int], needs: int) -> int:
    """Of a backward: q = grad_out B; then grad_A, grad_B and the source's gradient where they are asked for."""
    total = 0
    for a, b, key in zip(lora_A, lora_B, path_source):
        (r, k), n = a, b[0]
        of_source, of_A = bool(needs & (1 if key == -1 else 2)), bool(needs & (4 | 16))
        total += 2 * x[0] * r * (n * (of_source or of_A) + k * of_A + k * of_source + n * bool(needs & (8 | 16)))
    return total


def _linear_backward(grad_outs, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                     path_source, dropout_p, flags, hidden, mask, needs, out_shape=None, **kwargs) -> int:
    base = sum(2 * x[0] * n * k for n, k in weights) if needs & 1 else 0
    return base + _asked_for(x, lora_A, lora_B, path_source, needs)


def _delta_backward(grad_outs, x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                    dropout_p, flags, hidden, mask, needs, out_shape=None, **kwargs) -> int:
    return _asked_for(x, lora_A, lora_B, path_source, needs)


_FLOPS = {"lora_linear": _linear, "lora_linear_backward": _linear_backward, "lora_delta": _delta,
          "lora_delta_backward": _delta_backward}


