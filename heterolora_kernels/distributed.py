"""Agreement among the processes of a job, and the parts that they hold of sharded tensors.

Every function is the identity without a job, and for tensors that are whole. Sharded tensors are the DTensors of FSDP2
(``torch.distributed.fsdp.fully_shard``); in which way they are sharded is theirs to say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heterolora_kernels.layers import Path

Result = TypeVar("Result")


def world_size() -> int:
    """Processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return world_size() == 1 or dist.get_rank() == 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_to_first_(tensor: Tensor) -> None:
    """Move the sum over processes to the first one, whose state is the one that is saved; the others are left with 0."""
    sum_(tensor)
    if not is_first():
        tensor.zero_()


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


def on_every_process(function: Callable[[], Result], device: torch.device,
                     failed: str = "scoring failed on another process; no rank was changed") -> Result:
    """``function()``; if it fails on one process all raise, for one that left alone would let the others wait in a collective.

    Not for functions with collectives of their own. ``failed``: what those say that did not fail.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    if any_process(failure is not None, device):
        raise failure or RuntimeError(failed)
    return result


def broadcast_(tensor: Tensor) -> Tensor:
    """The first process's values everywhere, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


# ---- sharded tensors ----


def _loaded(module: str, name: str) -> type | tuple:
    """A class of torch.distributed, or what nothing is an instance of: before its module is imported there are none."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, _loaded("tensor", "DTensor"))


def count_dtensors(tensors: Iterable[Tensor]) -> int:
    """How many of the tensors are spread over processes."""
    cls = _loaded("tensor", "DTensor")
    return sum([isinstance(tensor, cls) for tensor in tensors])


def wrapper_of(model: nn.Module) -> str | None:
    """``"FSDP2"``, ``"FSDP1"`` or ``"DTensor"`` (tensor parallelism) where that holds the model's parameters, else None."""
    for module in model.modules():
        if is_fsdp(module):
            return "FSDP2"
        if isinstance(module, _loaded("fsdp", "FullyShardedDataParallel")):
            return "FSDP1"
    if count_dtensors(model.parameters()):
        return "DTensor"
    return "ZeRO-3" if any(zero_stage(parameter) == 3 for parameter in model.parameters()) else None


def zero_stage(parameter: Tensor) -> int | None:
    """3 or 2 (which stands for 1 too) where DeepSpeed's ZeRO has taken a parameter, else None."""
    # What it puts on parameters; nothing public tells.
    return 3 if hasattr(parameter, "ds_id") else 2 if hasattr(parameter, "_hp_mapping") else None


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole of a tensor: ZeRO-3 leaves an empty one in its place."""
    return getattr(tensor, "ds_shape", tensor.shape)


def refuse_zero(parameter: Tensor, what: str) -> None:
    """Refuse what cannot be done with parameters that ZeRO steps in flat partitions.

    Raises:
        ValueError: names the engine, the stage and the remedy.
    """
    stage = zero_stage(parameter)
    if stage is not None:
        raise ValueError(f"{what}: DeepSpeed {'ZeRO-3' if stage == 3 else 'ZeRO-1 or 2'} steps flat partitions of the "
                         "parameters, in which what has rank 0 cannot be frozen: set search='off' (ranks that `heterolora "
                         "search` chose can be trained so), or use DistributedDataParallel or FSDP2 (fully_shard)")


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module."""
    return isinstance(module, _loaded("fsdp", "FSDPModule"))


def check_wrapped(model: nn.Module, paths: Sequence[Path]) -> bool:
    """Whether the model is sharded.

    Raises:
        ValueError: its wrapper does not know the adapters, or holds them in a way in which they have no rows.
    """
    wrapper = wrapper_of(model)
    if wrapper == "FSDP1":
        raise ValueError("model is wrapped by FullyShardedDataParallel, which flattens parameters: an adapter has no rows there; "
                         "use torch.distributed.fsdp.fully_shard (FSDP2) or DistributedDataParallel")
    # Nothing public tells which parameters DDP reduces; without the attribute there is no saying.
    known = getattr(model, "_module_parameters", None) if isinstance(model, nn.parallel.DistributedDataParallel) else None
    if known is not None and not {id(path.lora_A) for path in paths} <= {id(p) for p in known}:
        raise ValueError("model was wrapped by DistributedDataParallel before apply_heterolora: it would not reduce the "
                         "adapters' gradients; patch first, then wrap")
    alone = [path.name for path in paths if path.site is not None and is_fsdp(path.holder)]
    if alone:
        raise ValueError(f"model: the shortcut {alone[0]!r} is a fully_shard group of its own, and its parameters are used in "
                         "its layer's forward: let the group of its layer hold them")
    return wrapper is not None


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its sharded parameters: a forward without a backward leaves those of the root gathered."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


def reduces_gradients(model: nn.Module) -> bool:
    """Whether every FSDP2 module reduces its gradients in the next backward: not so in the midst of an accumulation."""
    modules = [module for module in model.modules() if is_fsdp(module)]
    # Nothing public tells. In older versions of torch a module has one group or none.
    states = [module._get_fsdp_state() for module in modules]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]]
    return all(group.reduce_grads for group in groups if group is not None)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached; a collective where it is sharded."""
    if hasattr(tensor, "ds_id"):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()


@torch.no_grad()
def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this process holds of a tensor, as a view of it, and where that lies in the whole."""
    if not is_dtensor(tensor):
        return tensor.detach(), tuple(slice(0, size) for size in tensor.shape)
    # Imported here because it takes long, and whoever has a DTensor has it already.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, tuple(slice(first, first + size) for first, size in zip(offsets, local.shape))


def is_first_copy(tensor: Tensor) -> bool:
    """Whether no process before this one holds the same part of a sharded tensor (HSDP replicates shards)."""
    if not is_dtensor(tensor):
        return True
    place = tensor.device_mesh.get_coordinate()
    return place is not None and not any(index for index, how in zip(place, tensor.placements) if how.is_replicate())


def copy_(target: Tensor, values: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    local, where = local_part(target)
    local.copy_(values[where])
