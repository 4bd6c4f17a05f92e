"""Mixins for linears that are not quite as their class says: x by another name, or a forward in the instance."""

from __future__ import annotations

from heterolora_kernels.instances import HIDDEN
from heterolora_kernels.layers import PatchedLinear, PatchedQuantised


class PatchedAnyName(PatchedLinear):
    """Mixin of a subclass of ``nn.Linear`` that computes the same, but calls its input something else."""

    def patched_forward(self, base_forward, *args, **kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        return super().patched_forward(base_forward, x)


class PatchedWrapped(PatchedQuantised):
    """Mixin of a linear whose instance has a forward that somebody put there, such as that of compressed-tensors.

    ``joined_forward`` stands in its place and calls it. It may call the class's forward, which stays the base's.
    """

    def patched_forward(self, base_forward, *args, **kwargs):
        return base_forward(self, *args, **kwargs)

    def joined_forward(self, *args, **kwargs):
        """The hidden forward's output, and all paths."""
        if "_heterolora" not in self.__dict__:
            # Somebody's reference to it that outlived the patch.
            return _hidden_forward(self, *args, **kwargs)
        return PatchedQuantised.patched_forward(self, _hidden_forward, *args, **kwargs)


def _hidden_forward(module, *args, **kwargs):
    return module.__dict__[HIDDEN](*args, **kwargs)
