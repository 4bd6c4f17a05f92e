"""What autograd keeps between a forward and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def held_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of all storages that the graph of one forward saves, each counted once.

    Args:
        own: tensors that are there anyway: parameters, buffers, packed weights.
    """
    known, found = {tensor.untyped_storage().data_ptr() for tensor in own}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # Held, so that no other tensor gets its address.
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outs = forward()
    held = sum(storage.nbytes() for storage in found.values())
    del outs
    return held
