"""Agreement among the processes of a job; every function is the identity without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_(tensors: Sequence[Tensor]) -> None:
    """Average over processes, in place, by one flat all_reduce per dtype."""
    if world_size() == 1:
        return
    # The same order of dtypes on every process: each is one collective.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in members])
        dist.all_reduce(flat)
        flat /= world_size()
        first = 0
        for tensor in members:
            tensor.copy_(flat[first:first + tensor.numel()].view_as(tensor))
            first += tensor.numel()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def broadcast_(tensor: Tensor) -> Tensor:
    """The first process's values everywhere, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
