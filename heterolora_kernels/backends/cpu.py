"""The compiled backend of the CPU: defines the ops, whose implementations are registered by the extension ``_C``.

The kernels live in ``csrc/cpu``. Which instruction set runs is chosen by the processor when the extension is loaded, or by the
environment variable ``HETEROLORA_CPU_ISA``.
"""

from __future__ import annotations

import torch

from heterolora_kernels import _env
from heterolora_kernels.ops.ledger import COLUMNS
from heterolora_kernels.ops.schema import NAMESPACE, define_ops

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
define_ops(_library, "cpu")

from heterolora_kernels import _C  # noqa: E402, F401 - its implementations need the ops

_ops = torch.ops.heterolora_kernels
if tuple(_ops.cpu_stats_columns()) != COLUMNS:
    raise RuntimeError(f"heterolora_kernels._C was built for statistics {_ops.cpu_stats_columns()}, this is {COLUMNS}: build it again")
if _env.cpu_isa() is not None:
    _ops.set_cpu_isa(_env.cpu_isa())
