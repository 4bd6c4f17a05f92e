"""The fused op as functions of tensors: what layers are made of, and what can be used without them.

They take tensors of any leading shape, which their results have then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heterolora_kernels.backends import resolve
from heterolora_kernels.ops.autograd import call_lora_delta, call_lora_linear
from heterolora_kernels.ops.rng import draw_rng

_no_biases: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _no_bias(weight: Tensor) -> Tensor:
    """The empty tensor that stands for no bias; kept, since making one costs a tenth of a small call."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
        return weight.new_empty((0,))
    key = (weight.dtype, weight.device)
    bias = _no_biases.get(key)
    if bias is None:
        with torch.inference_mode(False):
            bias = torch.empty((0,), dtype=weight.dtype, device=weight.device)
        # Not what FakeTensorMode makes of it: every later call would compute without memory.
        if type(bias) is Tensor:
            _no_biases[key] = bias
    return bias


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _as_vector(name: str, values, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    vector = torch.as_tensor(values, dtype=dtype, device=device)
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(vector.shape)}")
    return vector


def lora_linear(x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, *, bias: Tensor | None = None,
                scaling: float = 1.0, shortcuts: Sequence[tuple[Tensor, Tensor, Tensor, float]] = (),
                dropout_p: float = 0.0, gate: Tensor | None = None, rng: Tensor | None = None,
                backend: str | None = None) -> Tensor:
    """``x W^T + bias + s (drop(x) A^T * gate) B^T + sum_j s_j (drop(u_j) A_j^T * gate_j) B_j^T`` in one op.

    Args:
        x: [..., K]; float16, bfloat16, float32 or float64.
        weight: [N, K], x's dtype, any strides.
        lora_A: [r, K], or None for no path of x.
        lora_B: [N, r], or None.
        bias: [N] or None.
        scaling: s, for example ``lora_alpha / r``.
        shortcuts: tuples ``(source [..., K_j], lora_A [r_j, K_j], lora_B [N, r_j], scaling)``; every source has as many
            rows as x.
        dropout_p: probability with which an element of x and of each source is dropped before ``lora_A``.
        gate: float32 [sum of ranks], one number per rank, x's path first; ones by default. It gets no gradient.
        rng: int64 [1], the key of the dropout mask; drawn from torch's generator by default.
        backend: one of :func:`heterolora_kernels.available_backends`; chosen by device by default.

    Returns:
        [..., N] in x's dtype. Gradients reach x, weight, bias, every lora_A and lora_B, and every source.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: LoRA, arXiv 2106.09685, section 4.1; shortcuts: HeteroLoRA, arXiv 2406.14956.
    """
    _require_tensor("x", x)
    _require_tensor("weight", weight)
    for name, value in (("bias", bias), ("gate", gate), ("rng", rng)):
        if value is not None:
            _require_tensor(name, value)
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number in [0, 1], got {dropout_p!r}")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B must be given together, got one of them")
    paths = [] if lora_A is None else [(-1, lora_A, lora_B, scaling)]
    sources = []
    for j, shortcut in enumerate(shortcuts):
        if not isinstance(shortcut, (tuple, list)) or len(shortcut) != 4:
            got = f"{len(shortcut)} entries" if isinstance(shortcut, (tuple, list)) else type(shortcut).__name__
            raise ValueError(f"shortcuts[{j}] must be (source, lora_A, lora_B, scaling), got {got}")
        source, a, b, s = shortcut
        _require_tensor(f"shortcuts[{j}][0]", source)
        paths.append((j, a, b, s))
        sources.append(source)
    for p, (_, a, b, s) in enumerate(paths):
        _require_tensor(f"lora_A[{p}]", a)
        _require_tensor(f"lora_B[{p}]", b)
        if a.dim() != 2:
            raise ValueError(f"lora_A[{p}] must be [r, K], got shape {list(a.shape)}")
        if not isinstance(s, (int, float, Tensor)) or isinstance(s, Tensor) and s.requires_grad:
            raise TypeError(f"scaling[{p}] must be a number or a tensor that requires no grad (it gets none), got {s!r}")
    ranks = [a.shape[0] for _, a, _, _ in paths]
    gates = torch.ones(sum(ranks), dtype=torch.float32, device=x.device) if gate is None else gate
    if dropout_p > 0 and rng is None:
        rng = draw_rng(x.device)
    return lora_linear_group(
        x, [weight], [bias], sources, [a for _, a, _, _ in paths], [b for _, _, b, _ in paths],
        _as_vector("scaling", [s for _, _, _, s in paths], len(paths), torch.float32, x.device), gates,
        torch.tensor(ranks, dtype=torch.int32, device=x.device), [0] * len(paths), [key for key, _, _, _ in paths],
        rng=rng if dropout_p > 0 else None, dropout_p=float(dropout_p), backend=backend)[0]


def lora_linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sources: Sequence[Tensor],
                      lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Tensor, gate: Tensor, active: Tensor,
                      path_output: Sequence[int], path_source: Sequence[int], *, rng: Tensor | None = None,
                      dropout_p: float = 0.0, packs: Sequence[Tensor] = (), probe: Tensor | None = None,
                      backend: str | None = None) -> list[Tensor]:
    """The whole contract: linears that read one x, any number of paths, device-side ranks, statistics.

    ``out_i = x W_i^T + bias_i + sum over p with path_output[p] = i of s_p * ((drop(u_p) A_p^T) * gate_p) B_p^T``

    Args:
        x: [..., K].
        weights: [N_i, K] each, x's dtype, any strides.
        biases: [N_i] or None each.
        sources: [..., K_j] each, as many rows as x: what paths read beside x.
        lora_A: [r_p, K_p] per path.
        lora_B: [N_i, r_p] per path.
        scaling: float32 [P], s_p.
        gate: float32 [R], one number per rank of every path, R their sum.
        active: int32 [P], leading rows of each path that must be computed; without a probe the others are not.
        path_output: the i that each path adds to.
        path_source: the j that each path reads; -1 is x.
        rng: int64 [1], the key of the dropout mask; needed exactly where ``dropout_p`` > 0.
        dropout_p: probability with which an element of a path's source is dropped.
        packs: empty, or two opaque tensors per weight from the backend's ``pack_weight``.
        probe: float32 [R, columns] that requires grad: its gradient is the statistics. None: they are not computed.
        backend: one of :func:`heterolora_kernels.available_backends`; chosen by device by default.

    Returns:
        One tensor [..., N_i] per weight.

    Raises:
        ValueError, TypeError: name the argument.
    """
    return run_group(resolve(x.device, backend, x.dtype), x, list(weights), list(packs), biases, list(sources), list(lora_A),
                     list(lora_B), scaling, gate, active, rng, list(path_output), list(path_source), dropout_p, probe)


def run_group(backend: str, x: Tensor, weights: list[Tensor], packs: list[Tensor], biases: Sequence[Tensor | None],
              sources: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], scaling: Tensor, gate: Tensor, active: Tensor,
              rng: Tensor | None, path_output: list[int], path_source: list[int], dropout_p: float,
              probe: Tensor | None) -> list[Tensor]:
    """:func:`lora_linear_group` on a backend that was resolved; every argument in its place, lists as such."""
    # F.linear adds the bias after the product where x is strided and of more than two dimensions, and inside it
    # elsewhere; the reference promises the bits of F.linear.
    bias_last = backend == "reference" and x.dim() > 2 and not x.is_contiguous()
    outs = call_lora_linear(
        backend, x, weights, packs,
        [_no_bias(weight) if bias is None or bias_last else bias for weight, bias in zip(weights, biases)],
        sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source, dropout_p, probe)
    return [out if bias is None else out + bias for out, bias in zip(outs, biases)] if bias_last else outs


def lora_delta(base_out: Tensor, sources: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
               scaling: Tensor, gate: Tensor, active: Tensor, *, x: Tensor | None = None,
               path_source: Sequence[int] | None = None, rng: Tensor | None = None, dropout_p: float = 0.0,
               probe: Tensor | None = None, backend: str | None = None) -> Tensor:
    """``base_out + sum_p s_p (drop(u_p) A_p^T * gate_p) B_p^T`` for an output that something else computed.

    Args:
        base_out: [..., N], for example the output of a norm or of a quantised linear.
        sources: tensors [..., K_j] with as many rows as base_out.
        lora_A, lora_B: [r_p, K_p] and [N, r_p] per path.
        x: [..., K], what paths with ``path_source`` -1 read.
        path_source: the source of each path, an index into ``sources`` or -1 for x; by default path p reads ``sources[p]``.
        scaling, gate, active, rng, dropout_p, probe, backend: as in :func:`lora_linear_group`.

    Returns:
        [..., N] in base_out's dtype.

    Raises:
        ValueError, TypeError: name the argument.
    """
    if x is None and path_source is not None and -1 in path_source:
        raise ValueError("x must be given where path_source has -1, got None")
    # Where no path reads x it only tells M and the dtype: detached, it asks for no gradient and is no duplicate input.
    return call_lora_delta(
        resolve(base_out.device, backend, base_out.dtype), base_out.detach() if x is None else x, [base_out], list(sources),
        list(lora_A), list(lora_B), scaling, gate, active, rng, [0] * len(lora_A),
        list(range(len(sources)) if path_source is None else path_source), dropout_p, probe)[0]
