"""Which paths training reaches: those that some backward gave a gradient.

A linear may never be called: its weight is read past it, its part of the model is not used, or what it computes is thrown away.
Nothing is recorded while the model runs; optimizers' steps look for gradients, until every path has had one.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from heterolora_kernels import distributed
from heterolora_kernels.allocation import Scores, allocate, get_allocator
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.layers import Path
from heterolora_kernels.leftovers import listed_by_pattern


class Reach:
    """What is known of the paths of one model.

    Attributes:
        unreached: names of the paths that took part in no backward before the steps that were taken.
        is_told: whether they were named.
    """

    def __init__(self) -> None:
        self._reached: set[str] = set()
        self.unreached: set[str] = set()
        self.is_told = False

    def observe(self, paths: Sequence[Path]) -> None:
        """Look for gradients. A gradient of zeros is one: an inactive path that runs has it.

        Args:
            paths: those whose parameters an optimizer is about to step.
        """
        if len(self._reached) == len(paths) and not self.unreached:
            return
        for path in paths:
            if path.name in self._reached:
                continue
            lora_A, lora_B = path.lora_A, path.lora_B
            if lora_A.grad is not None or lora_B.grad is not None:
                self._reached.add(path.name)
                self.unreached.discard(path.name)
            elif lora_A.requires_grad or lora_B.requires_grad:
                self.unreached.add(path.name)

    def unreached_everywhere(self, names: Sequence[str], device: torch.device) -> set[str]:
        """The paths among ``names`` that no process has reached; a collective where there are several."""
        missed = torch.tensor([name in self.unreached for name in names], dtype=torch.int32, device=device)
        return {name for name, count in zip(names, distributed.sum_(missed).tolist()) if count == distributed.world_size()}

    def tell(self, model: nn.Module) -> None:
        """Name the paths that were not reached, once."""
        if self.is_told or not (self.unreached or self._reached):
            return
        self.is_told = True
        if not self.unreached:
            return
        past = {name for name in self.unreached if is_read_past(model, name)}
        parts = []
        if past:
            parts.append(f"{listed_by_pattern(sorted(past))}: the weight is read past the module, so LoRA has no effect there")
        if self.unreached - past:
            parts.append(f"{listed_by_pattern(sorted(self.unreached - past))}: no forward calls them, or the loss does not "
                         "use what they compute")
        warnings.warn(f"{len(self.unreached)} paths took no part in the first step: {'; '.join(parts)}. They take no budget "
                      f"and no turn in "
                      "a warm-up until they take part; name them in exclude_modules to leave them out", stacklevel=6)


def is_read_past(model: nn.Module, name: str) -> bool:
    """Tell whether the code of the module that holds a linear reads the linear's weight itself."""
    parent, _, leaf = name.rpartition(".")
    try:
        holder = model.get_submodule(parent)
    except AttributeError:
        return False
    return any(re.search(rf"\b{re.escape(leaf)}\.weight\b", _source(cls)) for cls in type(holder).__mro__
               if issubclass(cls, nn.Module) and not cls.__module__.startswith(("torch.", "heterolora_kernels.")))


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def allocated(paths: Mapping[str, Path], scores: Scores, config: HeteroLoraConfig, generator: torch.Generator,
              unreached: set[str]) -> dict[str, int | list[bool]]:
    """Share the config's budget out among the paths that are reached; the others get nothing.

    A share is one of what is left. A number that is larger than all of that buys all of it.
    """
    reached = {name: paths[name] for name in without(paths, unreached)}
    per_rank = get_allocator(config.ranks).per_rank
    costs, ranks = ({name: value(path) for name, path in reached.items()} for value in (lambda p: p.num_parameters,
                                                                                        lambda p: p.r))
    budget = config.budget
    if len(reached) < len(paths) and not isinstance(budget, float):
        sizes = costs if config.budget_unit == "parameters" else ranks if per_rank else dict.fromkeys(reached, 1)
        budget = min(budget, sum(size for name, size in sizes.items() if config.mode != "lora_only"
                                 or paths[name].kind == "lora"))
    nothing = {name: [False] * path.r if per_rank else 0 for name, path in paths.items() if name not in reached}
    return nothing | allocate(
        {name: scores[name] for name in reached}, costs, budget, kinds={name: path.kind for name, path in reached.items()},
        max_ranks=ranks, mode=config.mode, ranks=config.ranks, budget_unit=config.budget_unit, rank_step=config.rank_step,
        min_rank=config.min_rank, generator=generator)


def without(names: Iterable[str], left: set[str]) -> list[str]:
    """The names that are not left out; all, where nothing would remain."""
    names = list(names)
    kept = [name for name in names if name not in left]
    return kept or names
