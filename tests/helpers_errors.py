"""The error rule: how far a result may be from the truth in float64, beside what plain PyTorch makes of it in the same dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def error_of(value: Tensor, truth: Tensor) -> float:
    """The largest absolute error."""
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_bounded(value: Tensor, yardstick: Tensor, truth: Tensor, factor: float, size: Tensor | float | None = None,
                   units: float = 1.0, name: str = "result") -> None:
    """At most ``factor`` times the yardstick's error, where that happens to be small ``units`` rounding units of the size.

    Args:
        size: what is added up in the result, where that is larger than the result (terms that cancel); default: the truth.
    """
    assert bool(torch.isfinite(value).all()), name
    assert bool(torch.isfinite(yardstick).all()), f"{name}: the yardstick is not finite"
    size = truth if size is None else size
    largest = size.abs().max().item() if isinstance(size, Tensor) and size.numel() else size if isinstance(size, float) else 0.0
    error, limit = error_of(value, truth), factor * error_of(yardstick, truth) + units * torch.finfo(value.dtype).eps * largest
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def assert_models_agree(model: nn.Module, other: nn.Module, outputs: Callable[[nn.Module], Tensor],
                        expected: Tensor | None = None) -> None:
    """Two models of one function: by the root mean square of all outputs, for errors of early layers travel through later ones.

    The other's outputs in its own dtype are the yardstick, in float64 the truth; three times its error is allowed, as in a
    backward, and a rounding unit or some.

    Args:
        expected: the other's outputs, where they were computed before.
    """
    yardstick = outputs(other) if expected is None else expected
    truth = outputs(copy.deepcopy(other).double())
    value = outputs(model)
    assert bool(torch.isfinite(value).all())
    error, usual = ((each.double() - truth).norm().item() for each in (value, yardstick))
    # Of few numbers the yardstick is exact by chance more often.
    units = 1 if truth.numel() >= 64 else 4
    limit = 3 * usual + units * torch.finfo(value.dtype).eps * truth.norm().item()
    assert error <= limit, f"error {error:.3g}, allowed {limit:.3g}"
