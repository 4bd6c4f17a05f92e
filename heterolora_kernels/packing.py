"""Packed copies of frozen weights: made by a backend in the layout its kernels read, kept by the patched module.

Whether a pack still belongs to its weight is checked inside the op at every call (address, version, a sample of the bits), which
reads the weight itself where it does not. Here packs are made, counted against the model's limit, and dropped.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heterolora_kernels import backends
from heterolora_kernels._env import available_memory

#: Share of the memory that is available at a model's first packed forward that its packs may take under ``pack="auto"``.
AUTO_SHARE = 0.25
#: Up to so many rows of x kernels read a weight where it lies, since packing it would cost more than the product.
FEW_ROWS = 16


@dataclass
class PackBudget:
    """What all packs of one model may take.

    Attributes:
        mode: ``"auto"`` (up to a share of the available memory), ``"copy"`` (without a limit) or ``"off"``.
        limit: bytes; None until the first pack is made, and without a limit.
        used: bytes that are packed now.
    """

    mode: str = "auto"
    limit: int | None = None
    used: int = 0

    def __getstate__(self) -> dict:
        # A copied model has no packs yet, and perhaps another machine.
        return {"mode": self.mode, "limit": None, "used": 0}

    def take(self, size: int, device: torch.device) -> bool:
        """Whether ``size`` bytes more may be packed; counts them if so."""
        if self.mode == "off":
            return False
        if self.mode == "auto":
            if self.limit is None:
                self.limit = int(AUTO_SHARE * (available_memory(device) or 0))
            if self.used + size > self.limit:
                return False
        self.used += size
        return True


@dataclass(eq=False)
class Packs:
    """The packs of one weight, for the forward and for the gradient of x.

    Attributes:
        budget: the model's, shared by its linears.
        tensors: none, or two; the second is empty until a forward needs gradients.
    """

    budget: PackBudget
    tensors: list[Tensor] = field(default_factory=list, repr=False)
    _made_for: tuple[str, weakref.ref[Tensor], int, bool] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        return {"budget": self.budget, "tensors": [], "_made_for": None}

    def of(self, backend: str, weight: Tensor, x: Tensor) -> list[Tensor]:
        """The packs for a call of ``backend`` with ``x`` [..., K], made at the first one; an empty list where there are none.

        Args:
            weight: [N, K] as the op takes it.
        """
        if torch.compiler.is_compiling():
            return self.tensors  # nothing can be made while tracing, and the op refuses what does not fit
        if x.numel() <= FEW_ROWS * weight.shape[1] or self.budget.mode == "off":
            return []
        # The gradient of x reads the weight along its other side.
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        version = 0 if weight.is_inference() else weight._version
        made = self._made_for
        # The base of a transposed view is what keeps its identity from call to call.
        owner = weight if weight._base is None else weight._base
        # Of all that makes a weight packable only whether it is trained can change.
        if (made is not None and made[1]() is owner and made[0] == backend and made[2] == version and made[3] >= needs_grad
                and not weight.requires_grad):
            return self.tensors
        if not _packable(weight):
            if self.tensors:
                self.drop()
            return []
        # What is made inside a dispatch mode may be without memory (FakeTensorMode), and would be kept; torch.jit.trace would
        # note it down.
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
            return []
        return self._make(backend, weight, owner, version, needs_grad)

    def _make(self, backend: str, weight: Tensor, owner: Tensor, version: int, needs_grad: bool) -> list[Tensor]:
        self.drop()
        pack = backends.extra(backend, "pack_weight")
        size = 0 if pack is None else backends.extra(backend, "packed_bytes")(weight, needs_grad)
        if size and self.budget.take(size, weight.device):
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = pack(weight.detach(), needs_grad)
        self._made_for = (backend, weakref.ref(owner), version, needs_grad)
        return self.tensors

    def drop(self) -> None:
        """Let go of the packs; the next call makes them anew."""
        self.budget.used -= sum(tensor.numel() for tensor in self.tensors)
        self.tensors, self._made_for = [], None


def _packable(weight: Tensor) -> bool:
    """Frozen, plain and there: what is trained changes in every step, and a tensor subclass (DTensor, quantised) has no rows."""
    return not weight.requires_grad and type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type != "meta"
