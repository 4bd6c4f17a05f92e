"""Zero-cost proxies: one function each, from the ledger's columns to a score.

A proxy sees the columns already summed over the rows of a path (or one row each, for scores per rank), so one elementwise
function serves both.
"""

from __future__ import annotations

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
        formula: ``{column: tensor} -> tensor`` of the same shape.
        degree: degree in the scaling s, for normalisation; 0 is never normalised.
        needs_data: False for a score that no batch changes.
        streaming_only: the sum over batches of squares: never taken from the accumulated gradient.
        zero_at_zero_B: 0 for every path whose lora_B is 0.
    """

    name: str
    formula: Callable[[Mapping[str, Tensor]], Tensor]
    degree: int = 1
    needs_data: bool = True
    streaming_only: bool = False
    zero_at_zero_B: bool = False


_proxies: dict[str, Proxy] = {}


def register_proxy(name: str, **attributes):
    """Register ``formula(columns) -> scores`` as a proxy; ``attributes`` are those of :class:`Proxy`."""
    def register(formula):
        _proxies[name] = Proxy(name, formula, **attributes)
        return formula
    return register


def available_proxies() -> list[str]:
    """Names that ``config.proxy`` can take."""
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
