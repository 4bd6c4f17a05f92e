"""Zero-cost proxies: one function each, from the ledger's columns to a score; and what makes scores comparable.

A proxy sees the columns already summed over the rows of a path (or one row each, for scores per rank), so one elementwise
function serves both. A proxy whose score is no function of the columns makes passes of its own
(:mod:`heterolora_kernels.synflow`, :mod:`heterolora_kernels.alpha_test`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heterolora_kernels.ops.ledger import COLUMNS, columns_of


@dataclass(frozen=True)
class Proxy:
    """One registered proxy.

    Attributes:
        name: what ``config.proxy`` says.
        formula: ``{column: tensor} -> tensor`` of the same shape; of a proxy with ``own_pass``
            ``ScoringPass -> {path: tensor}``, see :class:`heterolora_kernels.scoring.ScoringPass`.
        degree: degree in the scaling s, for normalisation; 0 is never normalised.
        needs_data: False for a score that no batch changes.
        streaming_only: the sum over batches of squares: never taken from the accumulated gradient.
        zero_at_zero_B: 0 for every path whose lora_B is 0.
        own_pass: the formula runs the model itself; such a proxy is always scored by a probe.
    """

    name: str
    formula: Callable
    degree: int = 1
    needs_data: bool = True
    streaming_only: bool = False
    zero_at_zero_B: bool = False
    own_pass: bool = False


_proxies: dict[str, Proxy] = {}


def register_proxy(name: str, **attributes):
    """Register ``formula(columns) -> scores`` as a proxy.

    Args:
        name: what ``config.proxy`` will say.
        attributes: those of :class:`Proxy`.

    Returns:
        A decorator, which gives back the formula.
    """
    def register(formula):
        _proxies[name] = Proxy(name, formula, **attributes)
        return formula
    return register


def available_proxies() -> list[str]:
    """Registered proxies.

    Returns:
        Names that ``config.proxy`` can take, sorted.
    """
    return sorted(_proxies)


def get_proxy(name: str) -> Proxy:
    """The proxy of that name.

    Raises:
        ValueError: names those that exist.
    """
    if name not in _proxies:
        raise ValueError(f"proxy must be one of {available_proxies()}, got {name!r}")
    return _proxies[name]


def scores_of(proxy: Proxy, rows: Tensor, per_rank: bool = False) -> Tensor:
    """Score one path from its ledger rows.

    Args:
        rows: [r, columns].
        per_rank: a score per row instead of one.

    Returns:
        float64, [r] or no dimension.
    """
    rows = rows.to(torch.float64)
    return proxy.formula(columns_of(rows if per_rank else rows.sum(0)))


@dataclass(frozen=True)
class PathSize:
    """What normalisation knows of a path: its scaling s, its parameters at full rank, its type of module."""

    scaling: float
    num_parameters: int
    type: str


def normalized(scores: Mapping[str, Tensor], proxy: Proxy, how: str, sizes: Mapping[str, PathSize]) -> dict[str, Tensor]:
    """Make scores of unlike paths comparable.

    Args:
        scores: ``{path: float64}``, [r] or no dimension.
        how: ``"none"``; ``"scale"``: divided by s^degree; ``"size"``: by the square root of the number of parameters (of a row,
            for scores per rank); ``"type"``: z-score within the paths of one type, 0 where all of them are equal.

    Returns:
        New tensors; the scores as they are for proxies of degree 0.
    """
    if how == "none" or proxy.degree == 0:
        return dict(scores)
    if how == "scale":
        return {path: score / sizes[path].scaling ** proxy.degree for path, score in scores.items()}
    if how == "size":
        # A row is one of r equal parts of its path.
        return {path: score * math.sqrt(max(score.numel(), 1) / sizes[path].num_parameters) for path, score in scores.items()}
    pools: dict[str, list[Tensor]] = {}
    for path, score in scores.items():
        pools.setdefault(sizes[path].type, []).append(score.reshape(-1))
    centers = {}
    for kind, values in pools.items():
        pool = torch.cat(values)
        spread = pool.std(correction=0)
        # Equal scores differ by rounding alone, which no division may blow up.
        is_flat = bool(spread <= 1e-12 * pool.abs().max())
        centers[kind] = pool.mean(), torch.full_like(spread, math.inf) if is_flat else spread
    return {path: (score - centers[sizes[path].type][0]) / centers[sizes[path].type][1] for path, score in scores.items()}


@register_proxy("constant", degree=0, needs_data=False)
def _constant(columns):
    """1: every path alike, so the allocator draws at random. The baseline of every comparison."""
    return torch.ones_like(columns[COLUMNS[0]])


@register_proxy("grad_norm")
def _grad_norm(columns):
    """``||grad_A|| + ||grad_B||``."""
    return columns["grad_A_sq"].sqrt() + columns["grad_B_sq"].sqrt()


@register_proxy("snip", zero_at_zero_B=True)
def _snip(columns):
    """``sum |A grad_A| + sum |B grad_B|`` (SNIP, arXiv 1810.02340)."""
    return columns["abs_A_grad_A"] + columns["abs_B_grad_B"]


@register_proxy("taylor", degree=2, zero_at_zero_B=True)
def _taylor(columns):
    """``sum (A grad_A)^2 + sum (B grad_B)^2`` (Molchanov et al., arXiv 1906.10771)."""
    return columns["taylor_sq"]


@register_proxy("fisher", degree=2, streaming_only=True)
def _fisher(columns):
    """``sum over batches of ||grad_A||^2 + ||grad_B||^2``."""
    return columns["grad_A_sq"] + columns["grad_B_sq"]


@register_proxy("gate", zero_at_zero_B=True)
def _gate(columns):
    """``|sum dLoss/d gate|``: to first order, what switching the path off would change."""
    return columns["gate_grad"].abs()
