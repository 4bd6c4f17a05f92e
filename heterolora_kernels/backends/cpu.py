"""The compiled backend of the CPU: defines the ops, whose implementations are registered by the extension ``_C``.

The kernels live in ``csrc/cpu``. Which instruction set runs is chosen by the processor when the extension is loaded, or by the
environment variable ``HETEROLORA_CPU_ISA``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heterolora_kernels import _env
from heterolora_kernels.ops.autograd import register_compiled
from heterolora_kernels.ops.ledger import COLUMNS
from heterolora_kernels.ops.schema import NAMESPACE, define_ops

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
define_ops(_library, "cpu")

from heterolora_kernels import _C  # noqa: E402 - its implementations need the ops

register_compiled("cpu", _C.lora_linear, _C.lora_delta)
_ops = torch.ops.heterolora_kernels
if tuple(_ops.cpu_stats_columns()) != COLUMNS:
    raise RuntimeError(f"heterolora_kernels._C counts {_ops.cpu_stats_columns()}, this package {list(COLUMNS)}: build it again")
if _env.cpu_isa() is not None:
    _ops.set_cpu_isa(_env.cpu_isa())


def instruction_sets() -> tuple[str, dict[str, str]]:
    """The instruction set whose kernels run, and ``{name: reason}`` of those that cannot run here."""
    reasons = {name: _ops.cpu_isa_missing(name) for name in _ops.cpu_isas()}
    return _ops.cpu_isa(), {name: reason for name, reason in reasons.items() if reason}


def packed_bytes(weight: Tensor, needs_grad: bool) -> int:
    """Bytes of :func:`pack_weight`'s tensors; 0 for dtypes whose packed form would be larger than the weight."""
    return _ops.cpu_packed_bytes(weight, needs_grad)


def pack_weight(weight: Tensor, needs_grad: bool) -> list[Tensor]:
    """Copies of a weight [N, K] in the order in which the forward and (``needs_grad``, else empty) the gradient of x read it."""
    return _ops.cpu_pack_weight(weight, needs_grad)


def row_statistics(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], grad_A: Sequence[Tensor],
                   grad_B: Sequence[Tensor]) -> Tensor:
    """The ledger's rows float32 [R, columns] of all paths in one pass over their gradients.

    Args: per path [r, K] and [N, r], gradients like their parameters; float32, bfloat16 or float16.
    """
    return _ops.cpu_row_statistics(lora_A, lora_B, grad_A, grad_B)
