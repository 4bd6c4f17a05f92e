"""The op contract: schema strings, flags, checks and fakes, once for every backend.

An op exists once per backend (``heterolora_kernels::lora_linear_reference``, ...): a dispatcher key knows devices, not
backends, so the backend is part of the op's name from the forward call on. Each backend registers four ops with
:func:`define_ops`; nothing here computes.

Sizes: M tokens, K in_features, N_i out_features of linear i, P paths, R the sum of their ranks, H the sum of their ranks
each rounded up to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntFlag

import torch
from torch import Tensor

from heterolora_kernels.ops.ledger import NUM_COLUMNS
from heterolora_kernels.ops.rules import register_rules

NAMESPACE = "heterolora_kernels"

_PATHS = ("Tensor[] sources, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor gate, Tensor active, Tensor? rng, "
          "int[] path_output, int[] path_source, float dropout_p, int flags")
_LINEAR = f"Tensor x, Tensor[] weights, Tensor[] packs, Tensor[] biases, {_PATHS}"
_DELTA = f"Tensor x, Tensor[] base_outs, {_PATHS}"
_FORWARD = "-> (Tensor[] outs, Tensor hidden, Tensor mask)"
_BACKWARD = ("Tensor hidden, Tensor mask, int needs) -> (Tensor grad_x, Tensor[] grad_sources, Tensor[] grad_A, Tensor[] "
             "grad_B, Tensor stats)")

#: Arguments and results of every op, to be prefixed with ``<op>_<backend>``.
SCHEMAS: dict[str, str] = {
    "lora_linear": f"({_LINEAR}) {_FORWARD}",
    "lora_linear_backward": f"(Tensor[] grad_outs, {_LINEAR}, {_BACKWARD}",
    "lora_delta": f"({_DELTA}) {_FORWARD}",
    "lora_delta_backward": f"(Tensor[] grad_outs, {_DELTA}, {_BACKWARD}",
}


class Flags(IntFlag):
    """What a forward has to do beside its outputs."""

    NONE = 0
    #: Statistics will be collected: compute every row, the inactive ones too.
    STATISTICS = 1
    #: A backward may follow: return ``hidden`` and ``mask``.
    SAVE = 2


class Needs(IntFlag):
    """What a backward has to return; everything else comes back empty."""

    NONE = 0
    X = 1
    SOURCES = 2
    LORA_A = 4
    LORA_B = 8
    STATISTICS = 16


def padded_rank(rank: int) -> int:
    """Columns that a path takes in ``hidden``: its rank rounded up to 8 (16 bytes in 16-bit types)."""
    return (rank + 7) // 8 * 8


def hidden_offsets(ranks: Sequence[int]) -> list[int]:
    """First column of each path in ``hidden``, and the width H at the end."""
    offsets = [0]
    for rank in ranks:
        offsets.append(offsets[-1] + padded_rank(rank))
    return offsets


def rank_offsets(ranks: Sequence[int]) -> list[int]:
    """First row of each path in ``gate`` and the statistics, and R at the end."""
    offsets = [0]
    for rank in ranks:
        offsets.append(offsets[-1] + rank)
    return offsets


def mask_offsets(x: Tensor, sources: Sequence[Tensor], path_source: Sequence[int]) -> dict[int, tuple[int, int]]:
    """First byte and end of each source's columns in ``mask``, keyed as in ``path_source`` (-1 is x).

    x comes first, and only if a path reads it.
    """
    offsets: dict[int, tuple[int, int]] = {}
    first = 0
    for key in range(-1, len(sources)):
        if key == -1 and -1 not in path_source:
            continue
        width = ((x if key == -1 else sources[key]).shape[1] + 7) // 8
        offsets[key] = (first, first + width)
        first += width
    return offsets


def _expect(condition: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message())


def _check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    _expect(tensor.dtype == x.dtype, lambda: f"{name} must have the dtype of x ({x.dtype}), got {tensor.dtype}", TypeError)
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    _expect(tensor.device == x.device, lambda: f"{name} must be on the device of x ({x.device}), got {tensor.device}")


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int, x: Tensor) -> None:
    _expect(tensor.dtype == dtype, lambda: f"{name} must be {dtype}, got {tensor.dtype}", TypeError)
    _expect(tuple(tensor.shape) == (size,), lambda: f"{name} must have shape [{size}], got {list(tensor.shape)}")
    _check_device(name, tensor, x)


def _check_x(x: Tensor) -> None:
    _expect(x.dim() == 2, lambda: f"x must be [M, K], got shape {list(x.shape)}")
    _expect(x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
            lambda: f"x must be float16, bfloat16, float32 or float64, got {x.dtype}", TypeError)


def _check_paths(x: Tensor, out_features: Sequence[int], sources, lora_A, lora_B, scaling, gate, active, rng,
                 path_output, path_source, dropout_p, flags) -> None:
    num_paths = len(lora_A)
    for name, value in (("lora_B", lora_B), ("path_output", path_output), ("path_source", path_source)):
        _expect(len(value) == num_paths, lambda: f"{name} must have one entry per path ({num_paths}), got {len(value)}")
    for j, source in enumerate(sources):
        _expect(source.dim() == 2, lambda: f"sources[{j}] must be [M, K_{j}], got shape {list(source.shape)}")
        _expect(source.shape[0] == x.shape[0],
                lambda: f"sources[{j}] must have M = {x.shape[0]} rows as x has, got {source.shape[0]}")
        _check_like_x(f"sources[{j}]", source, x)
        _expect(j in path_source, lambda: f"sources[{j}] is read by no path: no entry of path_source is {j}")
    total = 0
    for p in range(num_paths):
        output, source_id = path_output[p], path_source[p]
        _expect(0 <= output < len(out_features),
                lambda: f"path_output[{p}] must be in [0, {len(out_features)}), got {output}")
        _expect(-1 <= source_id < len(sources),
                lambda: f"path_source[{p}] must be in [-1, {len(sources)}), got {source_id}")
        in_features = (x if source_id == -1 else sources[source_id]).shape[1]
        a, b = lora_A[p], lora_B[p]
        _expect(a.dim() == 2 and a.shape[1] == in_features,
                lambda: f"lora_A[{p}] must be [r, {in_features}], got shape {list(a.shape)}")
        _expect(tuple(b.shape) == (out_features[output], a.shape[0]),
                lambda: f"lora_B[{p}] must be [{out_features[output]}, {a.shape[0]}], got shape {list(b.shape)}")
        _expect(a.dtype.is_floating_point, lambda: f"lora_A[{p}] must be a floating type, got {a.dtype}", TypeError)
        _expect(a.dtype != torch.float64 or x.dtype == torch.float64,
                lambda: f"lora_A[{p}] may be float64 only where x is, and x is {x.dtype}", TypeError)
        _expect(b.dtype == a.dtype, lambda: f"lora_B[{p}] must have the dtype of lora_A[{p}] ({a.dtype}), got {b.dtype}",
                TypeError)
        _check_device(f"lora_A[{p}]", a, x)
        _check_device(f"lora_B[{p}]", b, x)
        total = total + a.shape[0]
    _check_vector("scaling", scaling, torch.float32, num_paths, x)
    _check_vector("gate", gate, torch.float32, total, x)
    _check_vector("active", active, torch.int32, num_paths, x)
    _expect(0.0 <= dropout_p <= 1.0, lambda: f"dropout_p must be in [0, 1], got {dropout_p}")
    _expect((rng is None) == (dropout_p == 0.0), lambda: "rng must be given exactly where dropout_p > 0, "
            f"got dropout_p={dropout_p} and rng={'None' if rng is None else 'a tensor'}")
    if rng is not None:
        _check_vector("rng", rng, torch.int64, 1, x)
    _expect(0 <= flags < 2 * Flags.SAVE, lambda: f"flags must be a union of Flags, got {flags}")


def check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags) -> None:
    """Check the inputs of ``lora_linear``: shapes, dtypes, devices and indices.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """
    _check_x(x)
    _expect(len(weights) > 0, lambda: "weights must hold at least one weight, got none")
    for i, weight in enumerate(weights):
        _expect(weight.dim() == 2 and weight.shape[1] == x.shape[1],
                lambda: f"weights[{i}] must be [N_{i}, {x.shape[1]}], got shape {list(weight.shape)}")
        _check_like_x(f"weights[{i}]", weight, x)
    _expect(len(packs) in (0, 2 * len(weights)),
            lambda: f"packs must be empty or hold two tensors per weight ({2 * len(weights)}), got {len(packs)}")
    _expect(len(biases) == len(weights),
            lambda: f"biases must have one entry per weight ({len(weights)}), empty where there is none, got {len(biases)}")
    for i, bias in enumerate(biases):
        if bias.numel() > 0 or weights[i].shape[0] == 0:
            _expect(tuple(bias.shape) == (weights[i].shape[0],),
                    lambda: f"biases[{i}] must be [{weights[i].shape[0]}] or empty, got shape {list(bias.shape)}")
            _check_like_x(f"biases[{i}]", bias, x)
    _check_paths(x, [w.shape[0] for w in weights], sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                 path_source, dropout_p, flags)


def check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags) -> None:
    """Check the inputs of ``lora_delta``; raises as :func:`check_lora_linear` does."""
    _check_x(x)
    _expect(len(base_outs) > 0, lambda: "base_outs must hold at least one output, got none")
    for i, out in enumerate(base_outs):
        _expect(out.dim() == 2 and out.shape[0] == x.shape[0],
                lambda: f"base_outs[{i}] must be [{x.shape[0]}, N_{i}], got shape {list(out.shape)}")
        _check_like_x(f"base_outs[{i}]", out, x)
    _check_paths(x, [out.shape[1] for out in base_outs], sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                 path_source, dropout_p, flags)


def check_backward(grad_outs: Sequence[Tensor], x: Tensor, out_features: Sequence[int], sources: Sequence[Tensor],
                   lora_A: Sequence[Tensor], path_source: Sequence[int], dropout_p: float, hidden: Tensor, mask: Tensor,
                   needs: int) -> None:
    """Check what a backward has beyond the inputs of its forward."""
    _expect(len(grad_outs) == len(out_features),
            lambda: f"grad_outs must have one entry per output ({len(out_features)}), got {len(grad_outs)}")
    for i, grad in enumerate(grad_outs):
        _expect(tuple(grad.shape) == (x.shape[0], out_features[i]),
                lambda: f"grad_outs[{i}] must be [{x.shape[0]}, {out_features[i]}], got shape {list(grad.shape)}")
        _check_like_x(f"grad_outs[{i}]", grad, x)
    width = hidden_offsets([a.shape[0] for a in lora_A])[-1]
    _expect(tuple(hidden.shape) == (x.shape[0], width),
            lambda: f"hidden must be [{x.shape[0]}, {width}], got {list(hidden.shape)}: was the forward run without Flags.SAVE?")
    _check_like_x("hidden", hidden, x)
    ends = [end for _, end in mask_offsets(x, sources, path_source).values()]
    shape = (x.shape[0], max(ends, default=0)) if dropout_p > 0 else (0,)
    _expect(tuple(mask.shape) == shape, lambda: f"mask must be {list(shape)}, got {list(mask.shape)}")
    _expect(mask.dtype == torch.uint8, lambda: f"mask must be torch.uint8, got {mask.dtype}", TypeError)
    _check_device("mask", mask, x)
    _expect(0 <= needs < 2 * Needs.STATISTICS, lambda: f"needs must be a union of Needs, got {needs}")


def empty_outputs(x: Tensor, out_features: Sequence[int], sources: Sequence[Tensor], lora_A: Sequence[Tensor],
                  path_source: Sequence[int], dropout_p: float, flags: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Uninitialised results of a forward, in the contract's shapes and dtypes."""
    rows = x.shape[0]
    outs = [x.new_empty((rows, n)) for n in out_features]
    if not flags & Flags.SAVE:
        return outs, x.new_empty((0,)), x.new_empty((0,), dtype=torch.uint8)
    hidden = x.new_empty((rows, hidden_offsets([a.shape[0] for a in lora_A])[-1]))
    offsets = mask_offsets(x, sources, path_source) if dropout_p > 0 else {}
    width = max((end for _, end in offsets.values()), default=0)
    mask = x.new_empty((rows, width) if dropout_p > 0 else (0,), dtype=torch.uint8)
    return outs, hidden, mask


def empty_gradients(x: Tensor, sources: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
                    needs: int) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Uninitialised results of a backward, in the contract's shapes and dtypes."""
    nothing = (0,)
    grad_x = x.new_empty(x.shape if needs & Needs.X else nothing)
    grad_sources = [u.new_empty(u.shape if needs & Needs.SOURCES else nothing) for u in sources]
    grad_A = [a.new_empty(a.shape if needs & Needs.LORA_A else nothing) for a in lora_A]
    grad_B = [b.new_empty(b.shape if needs & Needs.LORA_B else nothing) for b in lora_B]
    total = rank_offsets([a.shape[0] for a in lora_A])[-1]
    stats = x.new_empty((total, NUM_COLUMNS) if needs & Needs.STATISTICS else nothing, dtype=torch.float32)
    return grad_x, grad_sources, grad_A, grad_B, stats


def _fake_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    return empty_outputs(x, [w.shape[0] for w in weights], sources, lora_A, path_source, dropout_p, flags)


def _fake_lora_linear_backward(grad_outs, x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng,
                               path_output, path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_linear(x, weights, packs, biases, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                      path_source, dropout_p, flags)
    check_backward(grad_outs, x, [w.shape[0] for w in weights], sources, lora_A, path_source, dropout_p, hidden, mask, needs)
    return empty_gradients(x, sources, lora_A, lora_B, needs)


def _fake_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    return empty_outputs(x, [out.shape[1] for out in base_outs], sources, lora_A, path_source, dropout_p, flags)


def _fake_lora_delta_backward(grad_outs, x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output,
                              path_source, dropout_p, flags, hidden, mask, needs):
    check_lora_delta(x, base_outs, sources, lora_A, lora_B, scaling, gate, active, rng, path_output, path_source,
                     dropout_p, flags)
    check_backward(grad_outs, x, [out.shape[1] for out in base_outs], sources, lora_A, path_source, dropout_p, hidden, mask,
                   needs)
    return empty_gradients(x, sources, lora_A, lora_B, needs)


_FAKES = {
    "lora_linear": _fake_lora_linear,
    "lora_linear_backward": _fake_lora_linear_backward,
    "lora_delta": _fake_lora_delta,
    "lora_delta_backward": _fake_lora_delta_backward,
}


def define_ops(library: torch.library.Library, backend: str) -> None:
    """Define the four ops of ``backend`` with their fakes; the backend registers the implementations itself."""
    for op, schema in SCHEMAS.items():
        name = f"{op}_{backend}"
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[op], lib=library)
        register_rules(library, op, getattr(getattr(torch.ops, NAMESPACE), name))
