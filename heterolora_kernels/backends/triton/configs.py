"""Choice of tiles and variants from the shipped table ``configs.json``; nothing is searched or timed here.

The table is a list of rules per role, tried in order; the first whose conditions hold gives the configuration. A condition
is an inclusive range ``[low, high]`` (null: open) on ``rows`` (M), ``n`` (columns of the output), ``k`` (length of the sum) or
``rank`` (packed columns that meet in one accumulator), or a list of values of ``arch`` (compute capability as 80, 90, ...),
``itemsize`` (bytes per element of x), ``aligned`` (whether every row begins at 16 bytes), ``tf32`` (whether float32 may be
rounded to it) and ``dropout``. The last rule of a role has no conditions: it is safe on GPUs that nobody has listed.

In a configuration upper-case names are the kernel's tiles; ``persistent`` and ``tma`` ask for those forms of the fused linear
where the call allows them.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

#: How the base matmul and the low-rank part meet: two launches, hidden inside the K loop, or cuBLAS and an epilogue kernel.
VARIANTS = ("two_pass", "one_pass", "cublas")
_VALUES = ("arch", "itemsize", "aligned", "tf32", "dropout")


@functools.cache
def rules() -> dict[str, list[dict[str, Any]]]:
    """The whole table: ``{role: [{"when": conditions, "use": configuration}]}``."""
    text = resources.files("heterolora_kernels.backends.triton").joinpath("configs.json").read_text()
    return json.loads(text)


@functools.lru_cache(maxsize=65536)
def choose(role: str, arch: int | str, itemsize: int, aligned: bool, tf32: bool, dropout: bool, rows: int, n: int, k: int,
           rank: int) -> dict[str, Any]:
    """The configuration of a launch.

    Args:
        role: forward, hidden, q_grad_B, grad_x, grad_A, q_sum or finalize.
        arch: 80, 90, ...; "interpreter".
        itemsize: bytes per element of x.
        aligned, tf32, dropout, rows, n, k, rank: as in the conditions of the table.
    """
    shape = {"arch": arch, "itemsize": itemsize, "aligned": aligned, "tf32": tf32, "dropout": dropout, "rows": rows, "n": n,
             "k": k, "rank": rank}
    return next(rule["use"] for rule in rules()[role] if _holds(rule["when"], shape))


def _holds(conditions: dict[str, list], shape: dict[str, Any]) -> bool:
    for name, condition in conditions.items():
        if name in _VALUES:
            if shape[name] not in condition:
                return False
        else:
            low, high = condition
            if (low is not None and shape[name] < low) or (high is not None and shape[name] > high):
                return False
    return True
