"""The contract in torch's own operations, for calls that no kernel can take: everything that torch transforms, it transforms.

Transforms of torch.func (vmap, grad, jvp, jacrev) and forward-mode differentiation look into these operations; so do second
derivatives. Slower than a kernel and without statistics. Nothing is read from the device: every row is computed, closed ones are
selected away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heterolora_kernels.ops.rng import dropout_keep, dropout_scale


def lora_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], sources: Sequence[Tensor],
                lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, rng: Tensor | None,
                path_output: Sequence[int], path_source: Sequence[int], dropout_p: float, probe: Tensor | None) -> list[Tensor]:
    """``out_i = x W_i^T + bias_i + sum_p s_p ((drop(u_p) A_p^T) * gate_p) B_p^T``; arguments as in the op's schema.

    Args:
        x, sources: [..., K] and [..., K_j].

    Returns:
        [..., N_i] each.

    Raises:
        RuntimeError: statistics are asked for.
    """
    outs = [F.linear(x, weight, bias if bias.numel() > 0 else None) for weight, bias in zip(weights, biases)]
    return lora_delta(x, outs, sources, lora_A, lora_B, scaling, gate, rng, path_output, path_source, dropout_p, probe)


def lora_delta(x: Tensor, base_outs: Sequence[Tensor], sources: Sequence[Tensor], lora_A: Sequence[Tensor],
               lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, rng: Tensor | None, path_output: Sequence[int],
               path_source: Sequence[int], dropout_p: float, probe: Tensor | None) -> list[Tensor]:
    """``base_out_i + sum_p s_p ((drop(u_p) A_p^T) * gate_p) B_p^T``; see :func:`lora_linear`."""
    if probe is not None and probe.requires_grad:
        raise RuntimeError("heterolora_kernels collects statistics (a search's window, a probe or collect_statistics is "
                           "open), which torch.func, forward-mode differentiation and nested or sparse inputs do not give: "
                           "differentiate outside it")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    keeps: dict[int, Tensor] = {}
    outs = list(base_outs)
    first = 0
    for p, (a, b) in enumerate(zip(lora_A, lora_B)):
        key = path_source[p]
        source = x if key == -1 else sources[key]
        value = source.to(dtype)
        if dropout_p > 0:
            if key not in keeps:
                keeps[key] = dropout_keep(rng, source.shape[:-1].numel(), source.shape[-1], key + 1, dropout_p)
            value = torch.where(keeps[key].reshape(source.shape), value * dropout_scale(dropout_p), 0.0)
        open_rows = gate[first:first + a.shape[0]].to(dtype)
        first += a.shape[0]
        # Selected, not multiplied: a closed row may hold anything, and 0 * nan is nan.
        rows = torch.where(open_rows[:, None] != 0, a.to(dtype) * (open_rows * scaling[p].to(dtype))[:, None], 0.0)
        columns = torch.where(open_rows != 0, b.to(dtype), 0.0)
        out = outs[path_output[p]]
        outs[path_output[p]] = out + F.linear(F.linear(value, rows), columns).to(out.dtype)
    return outs
