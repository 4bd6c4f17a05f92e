"""What is wrong is not timed: every contender is compared with float64 first.

The rule is that of the tests: an output may be off by twice what plain PyTorch is off by in the same dtype, a gradient or a
statistic by three times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Results
from heterolora_kernels.ops.ledger import columns_of

#: An eighth of a unit in the last place of the largest value is granted where PyTorch happens to be exact.
_SLACK = 1 / 8


class WrongResult(Exception):
    """A contender computes something else; the message names the tensor and by how much it is off."""


def check(actual: Results, truth: Results, usual: Results, dtype: torch.dtype, *, strict: bool = True,
          tolerance: float = 1.0) -> None:
    """Compare with the float64 truth.

    Args:
        usual: what plain PyTorch gets in ``dtype``.
        strict: False for baselines, which may round at more places: ten times PyTorch's error.
        tolerance: multiplies what is allowed.

    Raises:
        WrongResult: a tensor is missing, has another shape or dtype, or is off.
    """
    factors = [tolerance * factor for factor in ((2, 3) if strict else (10, 10))]
    _same_names("outputs", range(len(actual.outs)), range(len(truth.outs)))
    for i, out in enumerate(actual.outs):
        _compare(f"outs[{i}]", out, truth.outs[i], usual.outs[i], dtype, factors[0])
    if not actual.grads and actual.statistics is None:
        return  # a forward without grad
    _same_names("gradients", actual.grads, truth.grads)
    for name, grad in actual.grads.items():
        _compare(f"gradient of {name}", grad, truth.grads[name], usual.grads[name], dtype, factors[1])
    if actual.statistics is None:
        return
    # Sums of a few ranks, in float32 whatever x is: PyTorch is exact by luck more often than over a matrix.
    slack = 8.0 if dtype == torch.float32 else 1.0
    found, exact, plain = (columns_of(results.statistics) for results in (actual, truth, usual))
    for name in found:
        _compare(f"statistic {name}", found[name], exact[name], plain[name], dtype, 3 * tolerance, slack)


def _same_names(what: str, found, expected) -> None:
    if set(found) != set(expected):
        raise WrongResult(f"{what}: expected {sorted(expected)}, got {sorted(found)}")


def _compare(name: str, actual: Tensor, truth: Tensor, usual: Tensor, dtype: torch.dtype, factor: float,
             slack: float = _SLACK) -> None:
    if actual.shape != truth.shape:
        raise WrongResult(f"{name}: expected shape {list(truth.shape)}, got {list(actual.shape)}")
    if actual.dtype != usual.dtype:
        raise WrongResult(f"{name}: expected {usual.dtype}, got {actual.dtype}")
    if not truth.numel():
        return
    error, expected = ((tensor.double() - truth.double()).abs().max().item() for tensor in (actual, usual))
    limit = factor * expected + slack * torch.finfo(dtype).eps * truth.abs().max().item()
    # Not `error > limit`, which lets NaN pass.
    if not error <= limit:
        raise WrongResult(f"{name}: off by {error:.3g}, at most {limit:.3g} is allowed (plain PyTorch: {expected:.3g})")
