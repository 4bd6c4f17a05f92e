"""Plain PyTorch on any device: the ground truth of every other backend, float64 included.

The base matmul is ``F.linear`` in x's dtype, so a freshly patched model computes the bits it computed before. Everything
of low rank is computed in float32 (float64 for float64), and ``hidden`` is stored in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heterolora_kernels.ops import ledger
from heterolora_kernels.ops import rng as dropout
from heterolora_kernels.ops.ledger import NUM_COLUMNS
from heterolora_kernels.ops.schema import (
    NAMESPACE,
    Flags,
    Needs,
    check_backward,
    check_lora_delta,
    check_lora_linear,
    define_ops,
    hidden_offsets,
    mask_offsets,
    rank_offsets,
)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_computed(active: Tensor, ranks: Sequence[int], every_row: bool) -> list[int]:
    """Leading rows of each path to compute. Reads the device only where that costs no synchronisation."""
    if every_row or active.device.type != "cpu":
        return list(ranks)
    return [max(0, min(count, rank)) for count, rank in zip(active.tolist(), ranks)]


def _row_mask(active: Tensor, path: int, rows: int, every_row: bool) -> Tensor | None:
    """bool [rows], False where a row is not to be computed though it was (devices on which ``active`` is not read)."""
    if every_row or active.device.type == "cpu":
        return None
    return torch.arange(rows, device=active.device) < active[path]


def _dropped(source: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """drop(u) in the compute dtype."""
    value = source.to(_compute_dtype(source))
    return value if keep is None else torch.where(keep, value * dropout.dropout_scale(dropout_p), 0.0)


def _open_rows(value: Tensor, open_rows: Tensor) -> Tensor:
    """``value`` [..., r] with 0 in closed rows: their numbers may be anything, not finite included (0 * nan is nan)."""
    return torch.where(open_rows != 0, value, 0.0)


def _forward_paths(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                   dropout_p, flags):
    """Add every path to its base output; returns (outs, hidden, mask)."""
    dtype, rows = _compute_dtype(x), x.shape[0]
    ranks = [a.shape[0] for a in lora_A]
    columns, first_rows = hidden_offsets(ranks), rank_offsets(ranks)
    every_row = bool(flags & Flags.STATISTICS)
    computed = _rows_computed(active, ranks, every_row)
    saves = bool(flags & Flags.SAVE)
    hidden = x.new_zeros((rows, columns[-1]) if saves else (0,))
    keeps: dict[int, Tensor] = {}
    if dropout_p > 0:
        for key in mask_offsets(x, sources, path_source):
            source = x if key == -1 else sources[key]
            keeps[key] = dropout.dropout_keep(rng, rows, source.shape[1], key + 1, dropout_p)
    dropped: dict[int, Tensor] = {}
    deltas: dict[int, Tensor] = {}
    for p, (a, b) in enumerate(zip(lora_A, lora_B)):
        k = computed[p]
        if k == 0:
            continue
        key = path_source[p]
        if key not in dropped:
            dropped[key] = _dropped(x if key == -1 else sources[key], keeps.get(key), dropout_p)
        h = dropped[key] @ a[:k].to(dtype).t()  # (M, k)
        row_mask = _row_mask(active, p, k, every_row)
        if row_mask is not None:
            h = h * row_mask
        if saves:
            hidden[:, columns[p]:columns[p] + k] = h.to(x.dtype)
        open_rows = gate[first_rows[p]:first_rows[p] + k].to(dtype)
        scaled = _open_rows(h * (open_rows * scaling[p].to(dtype)), open_rows)
        delta = scaled @ _open_rows(b[:, :k].to(dtype), open_rows).t()  # (M, N)
        output = path_output[p]
        deltas[output] = deltas[output] + delta if output in deltas else delta
    outs = [(base.to(dtype) + deltas[i]).to(x.dtype) if i in deltas else base for i, base in enumerate(base_outs)]
    mask = x.new_empty((0,), dtype=torch.uint8)
    if dropout_p > 0 and saves:
        packed = [dropout.pack_mask(keep) for keep in keeps.values()]
        mask = torch.cat(packed, dim=1) if packed else x.new_empty((rows, 0), dtype=torch.uint8)
    return outs, hidden, mask


def _backward_paths(grad_outs, grad_x, x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source,
                    dropout_p, flags, hidden, mask, needs):
    """Add the own paths to ``grad_x`` (the base's part, compute dtype, or None) and compute all other gradients."""
    dtype = _compute_dtype(x)
    ranks = [a.shape[0] for a in lora_A]
    columns, first_rows = hidden_offsets(ranks), rank_offsets(ranks)
    every_row = bool(flags & Flags.STATISTICS)
    computed = _rows_computed(active, ranks, every_row)
    grad_A = [a.new_zeros(a.shape) if needs & Needs.LORA_A else a.new_empty((0,)) for a in lora_A]
    grad_B = [b.new_zeros(b.shape) if needs & Needs.LORA_B else b.new_empty((0,)) for b in lora_B]
    stats = x.new_zeros((first_rows[-1], NUM_COLUMNS) if needs & Needs.STATISTICS else (0,), dtype=torch.float32)
    keeps = {key: dropout.unpack_mask(mask[:, first:end], (x if key == -1 else sources[key]).shape[1])
             for key, (first, end) in mask_offsets(x, sources, path_source).items()} if dropout_p > 0 else {}
    dropped: dict[int, Tensor] = {}
    low_rank: dict[int, Tensor] = {}
    for p, (a, b) in enumerate(zip(lora_A, lora_B)):
        k, key = computed[p], path_source[p]
        if k == 0:
            continue
        scale = scaling[p].to(dtype)
        row_mask = _row_mask(active, p, k, every_row)
        open_rows = gate[first_rows[p]:first_rows[p] + k].to(dtype)
        grad_out = grad_outs[path_output[p]].to(dtype)
        a_rows, b_columns = a[:k].to(dtype), b[:, :k].to(dtype)
        q = grad_out @ b_columns  # (M, k)
        if row_mask is not None:
            q = q * row_mask
        h = hidden[:, columns[p]:columns[p] + k].to(dtype)
        if needs & (Needs.LORA_A | Needs.STATISTICS):
            if key not in dropped:
                dropped[key] = _dropped(x if key == -1 else sources[key], keeps.get(key), dropout_p)
            shadow_A = scale * (q.t() @ dropped[key])  # (k, K)
            if needs & Needs.LORA_A:
                grad_A[p][:k] = _open_rows(open_rows * shadow_A.t(), open_rows).t().to(a.dtype)
        if needs & (Needs.LORA_B | Needs.STATISTICS):
            shadow_B = scale * (grad_out.t() @ h)  # (N, k)
            if needs & Needs.LORA_B:
                grad_B[p][:, :k] = _open_rows(open_rows * shadow_B, open_rows).to(b.dtype)
        if needs & Needs.STATISTICS:
            stats[first_rows[p]:first_rows[p] + k] = ledger.row_statistics(
                a_rows, b_columns, shadow_A, shadow_B,
                hidden_sq=h.square().sum(0), gate_grad=scale * (q * h).sum(0)).to(torch.float32)
        if needs & (Needs.X if key == -1 else Needs.SOURCES):
            scaled = _open_rows(q * (open_rows * scale), open_rows)
            part = scaled @ _open_rows(a_rows.t(), open_rows).t()  # (M, K)
            low_rank[key] = low_rank[key] + part if key in low_rank else part
    for key, part in low_rank.items():
        if key in keeps:
            low_rank[key] = torch.where(keeps[key], part * dropout.dropout_scale(dropout_p), 0.0)
    grad_sources = [low_rank[j].to(u.dtype) if j in low_rank else
                    u.new_zeros(u.shape if needs & Needs.SOURCES else (0,))
                    for j, u in enumerate(sources)]
    if not needs & Needs.X:
        return x.new_empty((0,)), grad_sources, grad_A, grad_B, stats
    if -1 in low_rank:
        grad_x = low_rank[-1] if grad_x is None else grad_x.to(dtype) + low_rank[-1]
    if grad_x is None:
        grad_x = x.new_zeros(x.shape)
    return grad_x.to(x.dtype), grad_sources, grad_A, grad_B, stats


def _lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                 dropout_p, flags):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    bases = [F.linear(x, w, b if b.numel() > 0 else None) for w, b in zip(weights, biases)]
    return _forward_paths(x, bases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                          dropout_p, flags)


def _lora_linear_backward(grad_outs, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng,
                          path_output, path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    check_backward(grad_outs, x, [w.shape[0] for w in weights], sources, lora_A, path_source, dropout_p, hidden, mask, needs)
    grad_x = None
    if needs & Needs.X:
        for grad, weight in zip(grad_outs, weights):
            part = (grad @ weight).to(_compute_dtype(x))
            grad_x = part if grad_x is None else grad_x + part
    return _backward_paths(grad_outs, grad_x, x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source,
                           dropout_p, flags, hidden, mask, needs)


def _lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p,
                flags):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    outs, hidden, mask = _forward_paths(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                                        path_source, dropout_p, flags)
    # An op may not return its input, and the fake promises contiguous outputs.
    outs = [out.clone(memory_format=torch.contiguous_format) if out is base_outs[i] else out.contiguous()
            for i, out in enumerate(outs)]
    return outs, hidden, mask


def _lora_delta_backward(grad_outs, x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                         path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    check_backward(grad_outs, x, [out.shape[1] for out in base_outs], sources, lora_A, path_source, dropout_p, hidden, mask,
                   needs)
    return _backward_paths(grad_outs, None, x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source,
                           dropout_p, flags, hidden, mask, needs)


define_ops(_library, "reference")
for _name, _implementation in (
    ("lora_linear", _lora_linear),
    ("lora_linear_backward", _lora_linear_backward),
    ("lora_delta", _lora_delta),
    ("lora_delta_backward", _lora_delta_backward),
):
    _library.impl(f"{_name}_reference", _implementation, "CompositeExplicitAutograd")
